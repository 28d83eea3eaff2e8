"""Numbers as bytes and bits: varints, and streams of bits that hold Rice codes."""

from diffusers_compress.errors import Corrupt

VARINT_BYTES = 5


def need(data: bytes, count: int) -> None:
    if len(data) < count:
        raise Corrupt("the header is cut short; fetch or encode the file again")


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
        need(data, offset + i + 1)
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
