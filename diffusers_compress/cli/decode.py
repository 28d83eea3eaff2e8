"""The command `decode`."""

from pathlib import Path

from diffusers_compress.cli import loading
from diffusers_compress.cli.info import describe
from diffusers_compress.cli.options import (
    AnyModel,
    Device,
    Dtype,
    Force,
    Guidance,
    MaxPixels,
    Model,
    Preview,
    Realism,
    Reconstruction,
    Seed,
    Source,
    Steps,
    Target,
)
from diffusers_compress.cli.paths import check_picture_format, check_target, picture_bytes, read_input, write_output
from diffusers_compress.cli.terminal import phase, say
from diffusers_compress.format.limits import DEFAULT_LIMITS, Limits


def decode_command(
    source: Source,
    target: Target,
    reconstruction: Reconstruction = "flow",
    preview: Preview = False,
    realism: Realism = 1.0,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = None,
    any_model: AnyModel = False,
    max_pixels: MaxPixels = DEFAULT_LIMITS.pixels,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "float32",
    force: Force = False,
):
    """Decompress a file to a picture, in the format that the suffix of OUT says; PNG to stdout."""
    check_target(target, source, force)
    data, limits = read_input(source), Limits(pixels=max_pixels)
    facts = describe(data, limits)
    check_picture_format(target, facts["width"], facts["height"])
    codec = facts["codec"].lower()
    pipe = loading.load(model, device, dtype, codec, facts.get("preset"))
    options = decoding(reconstruction, preview, steps, guidance, seed)
    if codec != "diffc":
        options = {name: value for name, value in options.items() if name in ("guidance_scale", "num_inference_steps")}
    if codec == "relic":
        options["realism"] = 0.0 if preview else realism
    seconds = decode(pipe, data, target, force, allow_other_model=any_model, limits=limits, **options)
    say(target, f"{target}: {facts['width']}x{facts['height']} pixels, {seconds:.1f} s")
    if not facts["complete"]:
        say(
            target, f"note: the file was cut short; the picture is made of {facts['steps_present']} of its {facts['steps']} steps"
        )


def decode(pipe, data: bytes, target: Path, force: bool, **options) -> float:
    """Decompress a file to a picture file; the seconds it took. `options` are those of `decompress`."""
    from diffusers_compress.codecs.diffc import drift

    with phase("decoding", pipe) as clock:
        out = pipe.decompress(data, **options)
    write_output(target, picture_bytes(out.images[0], target), force)
    if out.drift and (out.drift[0] or 0) > drift.BOUND:
        say(target, f"note: {drift.message(out.drift[0])}")
    return clock.seconds


def decoding(reconstruction: str, preview: bool, steps: int | None, guidance: float | None, seed: int | None) -> dict:
    """The options of `decompress` that the command line's options stand for."""
    options = {"reconstruction": "denoised" if preview else reconstruction}
    if guidance is not None:
        options["guidance_scale"] = guidance
    if steps is not None:
        options["num_inference_steps"] = steps
    if seed is not None:
        import torch

        options["generator"] = torch.Generator().manual_seed(seed)
    return options
