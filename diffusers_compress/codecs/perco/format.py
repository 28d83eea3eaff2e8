"""PerCo's own part of a file, read without torch: parameters, payload, facts. FORMAT.md, section "PerCo", "Parameters"."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from diffusers_compress.contract import PERCO
from diffusers_compress.errors import Corrupt
from diffusers_compress.format import container
from diffusers_compress.format.bits import BitReader, BitWriter, read_varint, write_varint
from diffusers_compress.format.container import Header
from diffusers_compress.format.limits import DEFAULT_LIMITS, Limits

NO_CAPTION, WORDS, BYTES = range(3)  # how the caption is coded: see payload.py
MAX_SEED = 2**32 - 1


class Preset(NamedTuple):
    """A cell of the grid is `stride` x `stride` latent positions and takes log2(codebook_size) bits."""

    stride: int
    codebook_size: int


# Careil et al. 2024, table 2: nominal bits per pixel with an autoencoder of factor 8, where a stride of 8 is 64 pixels
PRESETS = {
    "0.0019": Preset(8, 256),
    "0.0024": Preset(8, 1024),
    "0.0098": Preset(4, 1024),
    "0.0313": Preset(2, 256),
    "0.0507": Preset(2, 8192),
    "0.0937": Preset(1, 64),
    "0.1250": Preset(1, 256),
}
NAMES = {(stride, (size - 1).bit_length()): name for name, (stride, size) in PRESETS.items()}
NUMBERS = {grid: number for number, grid in enumerate(NAMES, 1)}  # 0: another grid


@dataclass
class Parameters:
    """What a PerCo file says besides the size and the model.

    `stride`: latent positions along a side of a cell, a power of 2 up to 8; `bits`: of an index, 1 to 16; `modelled`: whether the
    indices are coded with a probability model, or as they are; `caption`: NO_CAPTION, WORDS or BYTES; `vocabulary`: a byte of the
    tokenizer's identity, for captions coded as WORDS; `seed` of the noise that the picture is painted from.
    """

    stride: int
    bits: int
    modelled: bool
    caption: int = NO_CAPTION
    vocabulary: int = 0
    seed: int = 0

    @property
    def preset(self) -> str:
        """Name in `PRESETS`, or what another grid is."""
        return NAMES.get((self.stride, self.bits), f"stride {self.stride}, {self.bits} bits")

    def to_bytes(self) -> bytes:
        """ValueError if a number is out of its field's range."""
        number = NUMBERS.get((self.stride, self.bits), 0)
        writer = BitWriter()
        for value, bits in ((number, 3), (self.modelled, 1), (self.caption, 2), (bool(self.seed), 1), (0, 1)):
            writer.write(int(value), bits)
        if not number:
            writer.write(self.stride.bit_length() - 1, 2)
            writer.write(self.bits - 1, 4)
            writer.write(0, 2)
        data = writer.to_bytes()
        if self.caption == WORDS:
            data += bytes([self.vocabulary])
        return data + (write_varint(self.seed) if self.seed else b"")

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Inverse of `to_bytes`. Corrupt for what no encoder writes."""
        reader = BitReader(data)
        number, modelled, caption, seeded, filler = (reader.read(bits) for bits in (3, 1, 2, 1, 1))
        grid = list(NUMBERS)[number - 1]
        if number == 0:
            grid = 1 << reader.read(2), reader.read(4) + 1
            filler |= reader.read(2)
        vocabulary = reader.read(8) if caption == WORDS else 0
        rest = data[len(data) - reader.bits_left // 8 :]
        seed, end = read_varint(rest, 0) if seeded else (0, 0)
        parameters = cls(*grid, bool(modelled), caption, vocabulary, seed)
        if filler or caption > BYTES or end != len(rest) or seed > MAX_SEED or parameters.to_bytes() != data:
            raise Corrupt("the file's parameters are none that an encoder writes; fetch or encode it again")
        return parameters


CAPTIONS = {NO_CAPTION: "none", WORDS: "in words of the model's tokenizer", BYTES: "in letters"}


def read_file(data: bytes, limits: Limits = DEFAULT_LIMITS) -> tuple[Header, Parameters, bytes]:
    """Parse a PerCo file up to its symbols: (header, parameters, payload)."""
    header, offset = container.read_header(data, limits)
    container.check_codec(header, PERCO)
    parameters = Parameters.from_bytes(header.parameters)
    return header, parameters, container.read_payload(data, offset)[0]


def describe(data: bytes, limits: Limits = DEFAULT_LIMITS) -> dict[str, Any]:
    """The facts of a PerCo file as plain values, without a model."""
    header, parameters, payload = read_file(data, limits)
    return container.facts(header, data) | {
        "preset": parameters.preset,
        "stride": parameters.stride,
        "index_bits": parameters.bits,
        "indices": "modelled" if parameters.modelled else "as they are",
        "caption": CAPTIONS[parameters.caption],
        "seed": parameters.seed,
        "payload": len(payload),
        "complete": True,  # a file that was cut short cannot be read
    }
