"""Lossless files: the file of a codec that is lossy by itself, and the pixels. FORMAT.md, section "Lossless files"."""

from dataclasses import dataclass

from diffusers_compress.contract import LOSSLESS
from diffusers_compress.errors import Corrupt, LimitExceeded
from diffusers_compress.format import container
from diffusers_compress.format.bits import need, read_varint, write_varint
from diffusers_compress.format.container import Header
from diffusers_compress.format.limits import DEFAULT_LIMITS, Limits

DIGEST_BYTES = 8
MAX_SIDE = 65_535
PIXELS_PER_BYTE = 4096  # at most, since even the likeliest value of each channel takes some of a bit


@dataclass(frozen=True)
class Prediction:
    """How the picture that predicts the pixels is rounded (nudge: 0 to 255), and the digest of what comes out."""

    nudge: int
    digest: bytes


@dataclass(frozen=True)
class LosslessFile:
    """`lossy`: the file within, cut if the whole one was; `prediction`: None if the pixels are coded by themselves; `pixels`: their
    bytes, None if they were cut."""

    header: Header
    lossy: bytes
    prediction: Prediction | None
    pixels: bytes | None


def pack(lossy: bytes, prediction: Prediction | None, pixels: bytes) -> bytes:
    """The bytes of a file."""
    header, _ = container.read_header(lossy, Limits(pixels=1 << 70, parameter_bytes=1 << 35))
    said = b"\0" if prediction is None else bytes([1, prediction.nudge]) + prediction.digest
    parameters = said + write_varint(len(lossy)) + write_varint(len(pixels))
    outer = Header(LOSSLESS + header.codec, header.width, header.height, header.fingerprint, parameters)
    return container.pack(outer, lossy + pixels)


def read(data: bytes, limits: Limits = DEFAULT_LIMITS) -> LosslessFile | None:
    """Parse a file; None if it is not a lossless one. BitstreamError by kind."""
    header, offset = container.read_header(data, limits)
    if header.codec < LOSSLESS:
        return None
    if max(header.width, header.height) > MAX_SIDE:
        raise LimitExceeded(f"a lossless file of {header.width}x{header.height} pixels has a side above {MAX_SIDE}")
    parameters, prediction, position = header.parameters, None, 1
    need(parameters, 1)
    if parameters[0] > 1:
        raise Corrupt(f"the file names prediction {parameters[0]}, known are 0 and 1")
    if parameters[0]:
        position = 2 + DIGEST_BYTES
        need(parameters, position)
        prediction = Prediction(parameters[1], parameters[2:position])
    size, position = read_varint(parameters, position)
    pixels, position = read_varint(parameters, position)
    if position != len(parameters):
        raise Corrupt("the file's parameters are longer than they say; fetch or encode the file again")
    if pixels < header.width * header.height // PIXELS_PER_BYTE:
        raise Corrupt(f"{pixels} bytes cannot hold {header.width}x{header.height} pixels; fetch or encode the file again")
    payload, complete = container.read_payload(data, offset, size + pixels)
    lossy = payload[:size]
    if complete:
        inner, _ = container.read_header(lossy, limits)
        same = (inner.codec, inner.width, inner.height, inner.fingerprint)
        if same != (header.codec - LOSSLESS, header.width, header.height, header.fingerprint):
            raise Corrupt("the file within is of another picture, codec or model; fetch or encode the file again")
    return LosslessFile(header, lossy, prediction, payload[size:] if complete else None)
