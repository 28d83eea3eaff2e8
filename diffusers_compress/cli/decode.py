"""The command `decode`."""

from pathlib import Path

from diffusers_compress.cli import loading
from diffusers_compress.cli.options import (
    DECODING,
    AnyModel,
    Device,
    Dtype,
    Finisher,
    Force,
    Guidance,
    MaxPixels,
    Model,
    Options,
    Preview,
    Realism,
    Reconstruction,
    Seed,
    Source,
    Steps,
    Target,
    arguments_of,
    preview_arguments,
)
from diffusers_compress.cli.paths import check_picture_format, check_target, picture_bytes, read_input, write_output
from diffusers_compress.cli.terminal import phase, say
from diffusers_compress.codecs import codec_of, describe, lossy_part
from diffusers_compress.format.limits import DEFAULT_LIMITS, Limits


def decode_command(
    source: Source,
    target: Target,
    reconstruction: Reconstruction = None,
    preview: Preview = False,
    realism: Realism = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = None,
    finisher: Finisher = None,
    option: Options = None,
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
    codec, facts = codec_of(data, limits), describe(data, limits)
    check_picture_format(target, facts["width"], facts["height"])
    arguments = decoding(codec, reconstruction, preview, realism, steps, guidance, seed, finisher, option)
    if preview:
        data = lossy_part(data, limits) or data
    pipe = loading.load(model, device, dtype, codec, facts.get("preset"))
    seconds = decode(pipe, data, target, force, allow_other_model=any_model, limits=limits, **arguments)
    say(target, f"{target}: {facts['width']}x{facts['height']} pixels, {seconds:.1f} s")


def decode(pipe, data: bytes, target: Path, force: bool, **arguments) -> float:
    """Decompress a file to a picture file; the seconds it took. `arguments` are those of `decompress`."""
    with phase("decoding", pipe) as clock:
        out = pipe.decompress(data, **arguments)
    write_output(target, picture_bytes(out.images[0], target), force)
    for note in out.notes[0]:
        say(target, f"note: {note}")
    return clock.seconds


def decoding(
    codec: str,
    reconstruction: str | None,
    preview: bool,
    realism: float | None,
    steps: int | None,
    guidance: float | None,
    seed: int | None,
    finisher: str | None = None,
    extra: list[str] | None = None,
) -> dict:
    """The arguments of `decompress` that the command line's options stand for."""
    options = dict(zip(DECODING, (reconstruction, realism, steps, guidance, seed, finisher), strict=True))
    arguments = arguments_of(codec, "decompress", DECODING, options, extra)
    if preview:
        arguments |= preview_arguments(codec, arguments)
    if seed is not None:
        import torch

        arguments["generator"] = torch.Generator().manual_seed(seed)
    return arguments
