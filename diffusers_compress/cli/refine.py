"""The command `refine`."""

from typing import Annotated

import typer

from diffusers_compress.cli import loading
from diffusers_compress.cli.options import Device, Dtype, Force, Guidance, Model, Prompt, Realism, Source, Steps, Target
from diffusers_compress.cli.paths import check_target, picture_bytes, read_input, write_output
from diffusers_compress.cli.terminal import phase, say

Seed = Annotated[int, typer.Option(help="Of the noise that is added.")]


def refine_command(
    source: Source,
    target: Target,
    realism: Realism = 1.0,
    prompt: Prompt = "",
    steps: Steps = 8,
    guidance: Guidance = 1.0,
    seed: Seed = 0,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "float32",
    force: Force = False,
):
    """Paint what a JPEG, WebP, AVIF, JPEG XL or JPEG 2000 file lost. How much that is follows from the file."""
    check_target(target, source, force)
    data = read_input(source)
    pipe = loading.load(model, device, dtype, "refine")
    with phase("refining", pipe) as clock:
        out = pipe.refine(data, realism=realism, prompt=prompt, num_inference_steps=steps, guidance_scale=guidance, seed=seed)
    write_output(target, picture_bytes(out.images[0], target), force)
    say(target, f"{target}: {out.images[0].width}x{out.images[0].height} pixels, {clock.seconds:.1f} s")
    for note in out.notes[0]:
        say(target, f"note: {note}")
