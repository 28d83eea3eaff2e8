"""The command `extract`."""

from diffusers_compress.cli.options import Force, MaxPixels, Source, Target
from diffusers_compress.cli.paths import check_target, read_input, write_output
from diffusers_compress.cli.terminal import say
from diffusers_compress.codecs import codec_of, lossy_part
from diffusers_compress.contract import CODECS
from diffusers_compress.format.limits import DEFAULT_LIMITS, Limits


def extract_command(source: Source, target: Target, max_pixels: MaxPixels = DEFAULT_LIMITS.pixels, force: Force = False):
    """Take the file within out, byte for byte, without a model: the lossy one of a lossless file, the base of a refined one (JPEG, WebP, AVIF,
    JPEG XL or JPEG 2000)."""
    check_target(target, source, force)
    data, limits = read_input(source), Limits(pixels=max_pixels)
    codec, within = CODECS[codec_of(data, limits)], lossy_part(data, limits)
    if within is None:
        if not hasattr(codec.format_module(), "base_file"):
            raise ValueError(f"{source}: a {codec.name} file holds no other file")
        within = codec.format_module().base_file(data, limits)
    write_output(target, within, force)
    say(target, f"{target}: {len(within):,} bytes")
