"""The command `extract`."""

from diffusers_compress.cli.options import Force, MaxPixels, Source, Target
from diffusers_compress.cli.paths import check_target, read_input, write_output
from diffusers_compress.cli.terminal import say
from diffusers_compress.codecs import codec_of
from diffusers_compress.contract import CODECS
from diffusers_compress.format.limits import DEFAULT_LIMITS, Limits


def extract_command(source: Source, target: Target, max_pixels: MaxPixels = DEFAULT_LIMITS.pixels, force: Force = False):
    """Take the JPEG, WebP, AVIF, JPEG XL or JPEG 2000 file out of a refined file, byte for byte, without a model."""
    check_target(target, source, force)
    data, limits = read_input(source), Limits(pixels=max_pixels)
    codec = CODECS[codec_of(data, limits)]
    if not hasattr(codec.format_module(), "base_file"):
        raise ValueError(f"{source}: a {codec.name} file holds no other file")
    base = codec.format_module().base_file(data, limits)
    write_output(target, base, force)
    say(target, f"{target}: {len(base):,} bytes")
