"""The command `encode`."""

from pathlib import Path
from typing import TYPE_CHECKING

from diffusers_compress.cli import loading
from diffusers_compress.cli.options import (
    ENCODING,
    BaseCodec,
    Bpp,
    Captioner,
    CodecName,
    Coder,
    Device,
    Dtype,
    Fidelity,
    Force,
    Importance,
    Lossless,
    MaxBytes,
    Model,
    NoiseSeed,
    Options,
    Preset,
    Prompt,
    Psnr,
    Source,
    Target,
    TargetMetric,
    arguments_of,
    check_preset,
    given_rates,
)
from diffusers_compress.cli.paths import check_target, open_importance, open_picture, write_output
from diffusers_compress.cli.terminal import phase, say
from diffusers_compress.contract import DEFAULT

if TYPE_CHECKING:
    from PIL import Image


def encode_command(
    source: Source,
    target: Target,
    bpp: Bpp = None,
    max_bytes: MaxBytes = None,
    fidelity: Fidelity = None,
    psnr: Psnr = None,
    metric: TargetMetric = None,
    prompt: Prompt = None,
    coder: Coder = None,
    codec: CodecName = DEFAULT,
    preset: Preset = None,
    captioner: Captioner = None,
    seed: NoiseSeed = None,
    base: BaseCodec = None,
    importance: Importance = None,
    lossless: Lossless = False,
    option: Options = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "float32",
    force: Force = False,
):
    """Compress a picture. Give exactly one of --bpp, --max-bytes, --fidelity, --psnr and --metric, or none where the model decides."""
    options = {"--prompt": prompt, "--coder": coder, "--captioner": captioner, "--seed": seed, "--base": base}
    options |= {"--importance": importance, "--lossless": lossless or None}
    options |= given_rates(codec, bpp, max_bytes, fidelity, psnr, metric)
    check_preset(codec, preset)
    check_target(target, source, force)
    image = open_picture(source)
    arguments = arguments_of(codec, "compress", ENCODING, options, option)
    if importance is not None:
        arguments["importance"] = open_importance(importance)
    pipe = loading.load(model, device, dtype, codec, preset or bpp)
    if captioner is not None:
        arguments["captioner"] = loading.load_captioner(captioner, pipe.device)
    encode(pipe, image, target, force, **arguments)


def encode(pipe, image: "Image.Image", target: Path, force: bool, **arguments):
    """Compress a picture to a file and say what came of it. `arguments` are those of `compress`."""
    with phase("encoding", pipe) as clock:
        out = pipe.compress(image, **arguments)
    write_output(target, out.bitstreams[0], force)
    say(target, f"{target}: {len(out.bitstreams[0]):,} bytes, {out.bpp[0]:.4f} bpp, {clock.seconds:.1f} s")
    for note in out.notes[0]:
        say(target, f"note: {note}")
