"""The container of a .dfc file: header, payload, checksums, limits and errors. FORMAT.md is the normative text.

A file is `header | payload | CRC-32`. What the parameters and the payload mean is the codec's own affair. Reading takes two
calls, because only the codec can tell from its parameters how long the payload should be, and so whether a file was cut:

    header, offset = read_header(data)
    payload, complete = read_payload(data, offset, length)
"""

import binascii
import contextlib
import os
import secrets
import zlib
from dataclasses import dataclass

VERSION = 1
DIFFC, RELIC, PERCO = 1, 2, 3
CODECS = {DIFFC: "DiffC", RELIC: "Relic", PERCO: "PerCo"}
FINGERPRINT_BYTES = 4
CHECKSUM_BYTES = 4
VARINT_BYTES = 5


class BitstreamError(ValueError):
    """A file that cannot be decoded; the kinds below say why."""


class NotABitstream(BitstreamError):
    """The data is something else than a file of this package."""


class UnsupportedVersion(BitstreamError):
    """Written by another version of the format, or by a codec that this version does not know."""


class Corrupt(BitstreamError):
    """The data was damaged, or cut where it cannot be."""


class WrongModel(BitstreamError):
    """The file was made with other weights, or by another codec, than those at hand."""


class LimitExceeded(BitstreamError):
    """The file asks for more than the limits allow."""


@dataclass(frozen=True)
class Limits:
    """The most that a file may ask for: pixels of the picture, bytes of codec parameters, of them bytes of the prompt, and coded steps
    (network calls). Pass larger ones for more."""

    pixels: int = 100_000_000
    parameter_bytes: int = 65_536
    prompt_bytes: int = 4096
    steps: int = 256


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Header:
    """Codec number, size of the upright original picture in pixels, fingerprint of the model (4 bytes), codec parameters."""

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
    _need(data, 3)
    codec, offset = data[2], 3
    width, offset = read_varint(data, offset)
    height, offset = read_varint(data, offset)
    fingerprint = data[offset : offset + FINGERPRINT_BYTES]
    length, start = read_varint(data, offset + FINGERPRINT_BYTES)
    end = start + length
    _need(data, end + 2)
    if int.from_bytes(data[end : end + 2], "little") != _crc16(data[:end]):
        raise Corrupt("the header's checksum is wrong: the file was damaged; fetch or encode it again")
    # Only a header whose checksum is right gets this far, so what follows is about what its encoder wrote.
    if codec not in CODECS:
        raise UnsupportedVersion(f"codec number {codec} is not known here, only {CODECS}; upgrade diffusers_compress")
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
        made_by = CODECS[header.codec]
        raise WrongModel(
            f"the file was made by {made_by}, this decodes {CODECS[codec]} files; load the model as {made_by}Pipeline"
        )


def check_prompt(length: int, limits: Limits) -> None:
    if length > limits.prompt_bytes:
        raise LimitExceeded(
            f"the prompt has {length} bytes, more than {limits.prompt_bytes}; raise Limits.prompt_bytes if you trust the file"
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


def _header_bytes(header: Header) -> bytes:
    if header.codec not in CODECS:
        raise ValueError(f"codec is {header.codec}, permitted are {CODECS}")
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
    _need(data, 2)
    version = data[1] & 0x0F
    if version != VERSION:
        raise UnsupportedVersion(f"the file has format version {version}, this is version {VERSION}; upgrade diffusers_compress")


def _need(data: bytes, count: int) -> None:
    if len(data) < count:
        raise Corrupt("the header is cut short; fetch or encode the file again")


def _crc16(data: bytes) -> int:
    return binascii.crc_hqx(data, 0xFFFF)


def write_varint(value: int) -> bytes:
    """LEB128: 7 bits a byte, least significant first, high bit set on all but the last. `value` below 2**35."""
    if not 0 <= value < 1 << 7 * VARINT_BYTES:
        raise ValueError(f"{value} is outside 0 .. 2**{7 * VARINT_BYTES} - 1")
    out = bytearray()
    while value > 0x7F:
        out.append(0x80 | value & 0x7F)
        value >>= 7
    return bytes(out) + bytes([value])


def read_varint(data: bytes, offset: int) -> tuple[int, int]:
    """Value, and the offset behind it. Corrupt if it is cut, longer than 5 bytes, or longer than it need be."""
    value = 0
    for i in range(VARINT_BYTES):
        _need(data, offset + i + 1)
        byte = data[offset + i]
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            if byte == 0 and i > 0:
                raise Corrupt("a number in the header is longer than it need be: the file was damaged; fetch or encode it again")
            return value, offset + i + 1
    raise Corrupt(f"a number in the header is longer than {VARINT_BYTES} bytes: the file was damaged; fetch or encode it again")


class BitWriter:
    """Collects bits, most significant first."""

    def __init__(self):
        self._digits = []

    def write(self, value: int, bits: int) -> None:
        """Append `value` as `bits` bits. ValueError if it does not fit."""
        if bits < 0 or not 0 <= value < 1 << bits:
            raise ValueError(f"{value} does not fit in {bits} bits")
        if bits:
            self._digits.append(f"{value:0{bits}b}")

    def write_rice(self, value: int, k: int) -> None:
        """Rice code: value >> k ones, a zero, then the k low bits."""
        if value < 0:
            raise ValueError(f"a Rice code holds no negative number, got {value}")
        self._digits.append("1" * (value >> k) + "0")
        self.write(value & ((1 << k) - 1), k)

    def to_bytes(self, pad: int = 1) -> bytes:
        """The bits, filled up to a whole byte with `pad` bits. An unfinished Rice code is all that ones can be read as."""
        digits = "".join(self._digits)
        digits += str(pad) * (-len(digits) % 8)
        return int(digits or "0", 2).to_bytes(len(digits) // 8, "big")


class BitReader:
    """Reads back what BitWriter wrote."""

    def __init__(self, data: bytes):
        self._data = bytes(data)
        self.bits_left = 8 * len(data)

    def read(self, bits: int) -> int:
        """The next `bits` bits. Corrupt if there are fewer."""
        if bits > self.bits_left:
            raise Corrupt(f"{bits} bits wanted where {self.bits_left} are left; fetch or encode the file again")
        position = 8 * len(self._data) - self.bits_left
        first, last = position // 8, (position + bits + 7) // 8
        self.bits_left -= bits
        word = int.from_bytes(self._data[first:last], "big")
        return word >> (8 * last - position - bits) & ((1 << bits) - 1)

    def read_rice(self, k: int) -> int | None:
        """The next number of a Rice code, or None if the bits ran out within it (then none are left)."""
        quotient = 0
        while self.bits_left > k:
            if self.read(1) == 0:
                return quotient << k | self.read(k)
            quotient += 1
        self.bits_left = 0
        return None


def write_file(path: str | os.PathLike, data: bytes, overwrite: bool = False) -> None:
    """Write all of `data` or nothing. FileExistsError if the file is there, unless `overwrite`."""
    path = os.path.realpath(path)
    if os.path.exists(path) and not (overwrite and os.path.isfile(path)):
        raise FileExistsError(f"{path} exists already" if os.path.isfile(path) else f"{path} exists and is not a regular file")
    temporary = os.path.join(os.path.dirname(path), f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the name with nothing behind it
        (os.replace if overwrite else _move_new)(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def _move_new(source: str, target: str) -> None:
    """Move a file, never onto another one that appeared in the meantime."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise FileExistsError(f"{target} exists already") from None
    except OSError:  # a file system without hard links
        if os.path.exists(target):
            raise FileExistsError(f"{target} exists already") from None
        os.replace(source, target)
