"""What is one codec's own, a folder each. `describe` reads a file of any of them, without torch."""

from typing import Any

from diffusers_compress.contract import CODECS, LOSSLESS, known_numbers
from diffusers_compress.format import lossless
from diffusers_compress.format.container import read_header
from diffusers_compress.format.limits import DEFAULT_LIMITS, Limits


def codec_of(data: bytes, limits: Limits = DEFAULT_LIMITS) -> str:
    """The key in `CODECS` of a file's codec; BitstreamError by kind if it is none of ours."""
    header, _ = read_header(data, limits)
    return known_numbers()[header.codec % LOSSLESS]


def lossy_part(data: bytes, limits: Limits = DEFAULT_LIMITS) -> bytes | None:
    """The lossy file within a lossless one; None if the file is another. BitstreamError by kind."""
    file = lossless.read(data, limits)
    return None if file is None else file.lossy


def describe(data: bytes, limits: Limits = DEFAULT_LIMITS) -> dict[str, Any]:
    """The facts of a compressed file as plain values, without a model; BitstreamError by kind if it is none of ours."""
    describe_lossy = CODECS[codec_of(data, limits)].format_module().describe
    file = lossless.read(data, limits)
    if file is None:
        return describe_lossy(data, limits)
    return describe_lossy(file.lossy, limits) | {
        "bytes": len(data),
        "bpp": 8 * len(data) / (file.header.width * file.header.height),
        "lossless": file.pixels is not None,
        "lossy_bytes": len(file.lossy),
        "predicted": file.prediction is not None,
        "complete": file.pixels is not None,
    }
