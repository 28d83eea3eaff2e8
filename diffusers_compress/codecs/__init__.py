"""What is one codec's own, a folder each. `describe` reads a file of any of them, without torch."""

from typing import Any

from diffusers_compress.contract import CODECS, known_numbers
from diffusers_compress.format.container import read_header
from diffusers_compress.format.limits import DEFAULT_LIMITS, Limits


def codec_of(data: bytes, limits: Limits = DEFAULT_LIMITS) -> str:
    """The key in `CODECS` of a file's codec; BitstreamError by kind if it is none of ours."""
    header, _ = read_header(data, limits)
    return known_numbers()[header.codec]


def describe(data: bytes, limits: Limits = DEFAULT_LIMITS) -> dict[str, Any]:
    """The facts of a compressed file as plain values, without a model; BitstreamError by kind if it is none of ours."""
    return CODECS[codec_of(data, limits)].format_module().describe(data, limits)
