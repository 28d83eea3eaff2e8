"""The command `encode`."""

from pathlib import Path

from PIL import Image

from diffusers_compress.cli import loading
from diffusers_compress.cli.options import (
    Bpp,
    Captioner,
    Channel,
    CodecName,
    Device,
    Dtype,
    Force,
    MaxBytes,
    Model,
    NoiseSeed,
    Preset,
    Prompt,
    Quality,
    Source,
    Target,
    chosen_rate,
)
from diffusers_compress.cli.paths import check_target, open_picture, write_output
from diffusers_compress.cli.terminal import phase, say


def encode_command(
    source: Source,
    target: Target,
    bpp: Bpp = None,
    max_bytes: MaxBytes = None,
    quality: Quality = None,
    prompt: Prompt = "",
    channel: Channel = "trellis",
    codec: CodecName = "diffc",
    preset: Preset = None,
    captioner: Captioner = None,
    seed: NoiseSeed = 0,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "float32",
    force: Force = False,
):
    """Compress a picture. Give exactly one of --bpp, --max-bytes and --quality; for perco none is needed."""
    rate = chosen_rate(bpp, max_bytes, quality, codec)
    check_target(target, source, force)
    image = open_picture(source)
    pipe = loading.load(model, device, dtype, codec, preset or bpp)
    options = {"prompt": prompt} | ({"channel": channel} if codec == "diffc" else {})
    if codec == "perco":
        options |= {"seed": seed, "captioner": loading.load_captioner(captioner, pipe.device)}
    encode(pipe, image, target, force, **options, **rate)


def encode(pipe, image: Image.Image, target: Path, force: bool, **options):
    """Compress a picture to a file and say what came of it. `options` are those of `compress`."""
    with phase("encoding", pipe) as clock:
        out = pipe.compress(image, **options)
    write_output(target, out.bitstreams[0], force)
    say(target, f"{target}: {len(out.bitstreams[0]):,} bytes, {out.bpp[0]:.4f} bpp, {clock.seconds:.1f} s")
    for note in out.notes[0]:
        say(target, f"note: {note}")
