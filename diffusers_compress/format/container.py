"""The container of a .dfc file: header, payload and checksums. FORMAT.md is the normative text.

A file is `header | payload | CRC-32`. What the parameters and the payload mean is the codec's own affair. Reading takes two
calls, because only the codec can tell from its parameters how long the payload should be, and so whether a file was cut:

    header, offset = read_header(data)
    payload, complete = read_payload(data, offset, length)
"""

import binascii
import zlib
from dataclasses import dataclass
from typing import Any

from diffusers_compress.contract import LOSSLESS, known_numbers, name_of
from diffusers_compress.errors import Corrupt, LimitExceeded, NotABitstream, UnsupportedVersion, WrongModel
from diffusers_compress.format.bits import need, read_varint, write_varint
from diffusers_compress.format.limits import DEFAULT_LIMITS, Limits

VERSION = 1
FINGERPRINT_BYTES = 4
CHECKSUM_BYTES = 4


@dataclass(frozen=True)
class Header:
    """Codec number (plus LOSSLESS), size of the upright original picture in pixels, fingerprint of the model (4 bytes), codec parameters."""

    codec: int
    width: int
    height: int
    fingerprint: bytes
    parameters: bytes


def pack(header: Header, payload: bytes) -> bytes:
    """The bytes of a file. ValueError if the header holds what the format cannot."""
    data = _header_bytes(header) + payload
    return data + zlib.crc32(data).to_bytes(CHECKSUM_BYTES, "little")


def overhead(header: Header) -> int:
    """Bytes of a file with this header that are not payload."""
    return len(_header_bytes(header)) + CHECKSUM_BYTES


def read_header(data: bytes, limits: Limits = DEFAULT_LIMITS) -> tuple[Header, int]:
    """Header, and where the payload starts. Raises NotABitstream, UnsupportedVersion, Corrupt or LimitExceeded."""
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise NotABitstream(f"a bitstream is bytes, not {type(data).__name__}; read the file first")
    data = bytes(data)
    _check_magic(data)
    need(data, 3)
    codec, offset = data[2], 3
    width, offset = read_varint(data, offset)
    height, offset = read_varint(data, offset)
    fingerprint = data[offset : offset + FINGERPRINT_BYTES]
    length, start = read_varint(data, offset + FINGERPRINT_BYTES)
    end = start + length
    need(data, end + 2)
    if int.from_bytes(data[end : end + 2], "little") != _crc16(data[:end]):
        raise Corrupt("the header's checksum is wrong: the file was damaged; fetch or encode it again")
    # Only a header whose checksum is right gets this far, so what follows is about what its encoder wrote.
    if codec % LOSSLESS not in known_numbers():
        raise UnsupportedVersion(f"codec number {codec} is not known here, only {known_numbers()}; upgrade diffusers_compress")
    if width == 0 or height == 0:
        raise Corrupt(f"a picture of {width}x{height} pixels has no pixels")
    if width * height > limits.pixels:
        raise LimitExceeded(
            f"{width}x{height} pixels are more than the limit of {limits.pixels}; raise Limits.pixels if you trust the file"
        )
    if length > limits.parameter_bytes:
        raise LimitExceeded(
            f"{length} bytes of parameters are more than the limit of {limits.parameter_bytes}; "
            "raise Limits.parameter_bytes if you trust the file"
        )
    return Header(codec, width, height, fingerprint, data[start:end]), end + 2


def check_codec(header: Header, codec: int) -> None:
    """WrongModel if the file is another codec's."""
    if header.codec != codec:
        made_by = name_of(header.codec)
        raise WrongModel(
            f"the file was made by {made_by}, this decodes {name_of(codec)} files; load the model as {made_by}Pipeline"
        )


def read_payload(data: bytes, offset: int, length: int | None = None) -> tuple[bytes, bool]:
    """Payload from `offset` on, and whether it is complete. `length`: its bytes when whole, if the parameters tell.

    With a length, a shorter file was cut: the result is the payload that is left, and False. No checksum covers that, so only
    a codec whose payload may be cut should take it. Without a length, cut and damaged look alike. Corrupt for damage and for
    trailing bytes.
    """
    end = len(data) - CHECKSUM_BYTES
    if length is not None:
        if end < offset + length:
            return bytes(data[offset : offset + length]), False
        if end > offset + length:
            raise Corrupt(f"{end - offset - length} bytes too many at the end; cut them off, or fetch or encode the file again")
    if end < offset or int.from_bytes(data[end:], "little") != zlib.crc32(data[:end]):
        kind = "damaged" if length is not None else "cut short or damaged"
        raise Corrupt(f"the file's checksum is wrong: it was {kind}; fetch or encode it again")
    return bytes(data[offset:end]), True


def facts(header: Header, data: bytes) -> dict[str, Any]:
    """What every file tells, as plain values."""
    return {
        "codec": name_of(header.codec),
        "width": header.width,
        "height": header.height,
        "bytes": len(data),
        "bpp": 8 * len(data) / (header.width * header.height),
        "model": header.fingerprint.hex(),
    }


def _header_bytes(header: Header) -> bytes:
    if header.codec % LOSSLESS not in known_numbers():
        raise ValueError(f"codec is {header.codec}, permitted are {known_numbers()}")
    if header.width < 1 or header.height < 1:
        raise ValueError(f"width and height are {header.width} and {header.height}, both must be at least 1")
    if len(header.fingerprint) != FINGERPRINT_BYTES:
        raise ValueError(f"fingerprint has {len(header.fingerprint)} bytes, permitted are {FINGERPRINT_BYTES}")
    data = bytes([0xDF, 0xC0 | VERSION, header.codec]) + write_varint(header.width) + write_varint(header.height)
    data += header.fingerprint + write_varint(len(header.parameters)) + header.parameters
    return data + _crc16(data).to_bytes(2, "little")


def _check_magic(data: bytes) -> None:
    if not data:
        raise NotABitstream("the file is empty")
    if data[0] != 0xDF or (len(data) > 1 and data[1] & 0xF0 != 0xC0):
        raise NotABitstream(f"not a .dfc file: it starts with {data[:2].hex()}, not dfc{VERSION}")
    need(data, 2)
    version = data[1] & 0x0F
    if version != VERSION:
        raise UnsupportedVersion(f"the file has format version {version}, this is version {VERSION}; upgrade diffusers_compress")


def _crc16(data: bytes) -> int:
    return binascii.crc_hqx(data, 0xFFFF)
