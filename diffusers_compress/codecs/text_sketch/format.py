"""Text+Sketch's own part of a file, read without torch: parameters, payload, facts. FORMAT.md, section "Text+Sketch", "Parameters"."""

from dataclasses import dataclass
from typing import Any, Self

from diffusers_compress.contract import TEXT_SKETCH
from diffusers_compress.errors import Corrupt
from diffusers_compress.format import container
from diffusers_compress.format.bits import BitReader, BitWriter, need, read_varint, write_varint
from diffusers_compress.format.container import Header
from diffusers_compress.format.limits import DEFAULT_LIMITS, Limits

NO_PROMPT, WORDS, IDS = range(3)  # how the prompt's tokens are coded: see payload.py
MAX_LEVELS = 8
MAX_SIDE = 512  # cells along the longer side of a sketch
MAX_THUMBNAIL = 32  # and of a thumbnail
MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class Parameters:
    """What a Text+Sketch file says besides the size and the model.

    `prompt`: NO_PROMPT, WORDS or IDS; `levels` of a sketch's cells, 2 to 8, and `side`, the cells along its longer side (0: no sketch);
    `thumbnail`: cells along the longer side of a thumbnail (0: none); `seed` of the noise that the picture is painted from.
    """

    prompt: int = NO_PROMPT
    levels: int = 0
    side: int = 0
    thumbnail: int = 0
    seed: int = 0

    def to_bytes(self) -> bytes:
        """ValueError if a number is out of its field's range."""
        writer = BitWriter()
        levels = self.levels - 1 if self.side else 0
        for value, bits in ((self.prompt, 2), (levels, 3), (bool(self.thumbnail), 1), (bool(self.seed), 1), (0, 1)):
            writer.write(int(value), bits)
        data = writer.to_bytes() + (write_varint(self.side) if self.side else b"")
        data += self.thumbnail.to_bytes(1, "little") if self.thumbnail else b""
        return data + (write_varint(self.seed) if self.seed else b"")

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Inverse of `to_bytes`. Corrupt for what no encoder writes."""
        need(data, 1)
        reader = BitReader(data[:1])
        prompt, levels, has_thumbnail, seeded, filler = (reader.read(bits) for bits in (2, 3, 1, 1, 1))
        side, end = read_varint(data, 1) if levels else (0, 1)
        need(data, end + has_thumbnail)
        thumbnail = data[end] if has_thumbnail else 0
        end += has_thumbnail
        seed, end = read_varint(data, end) if seeded else (0, end)
        parameters = cls(prompt, levels + 1 if levels else 0, side, thumbnail, seed)
        within = prompt <= IDS and side <= MAX_SIDE and thumbnail <= MAX_THUMBNAIL and seed <= MAX_SEED
        if filler or not within or end != len(data) or parameters.to_bytes() != data:
            raise Corrupt("the file's parameters are none that an encoder writes; fetch or encode it again")
        return parameters


def grid_shape(height: int, width: int, side: int) -> tuple[int, int]:
    """Rows and columns of a grid over a picture whose longer side has `side` cells, or as many as the picture has pixels."""
    longer = max(height, width)
    side = min(side, longer)
    rows, columns = (max(1, (2 * pixels * side + longer) // (2 * longer)) for pixels in (height, width))
    return rows, columns


PROMPTS = {NO_PROMPT: "none", WORDS: "tokens, by their frequency", IDS: "tokens, as they are"}


def read_file(data: bytes, limits: Limits = DEFAULT_LIMITS) -> tuple[Header, Parameters, bytes]:
    """Parse a Text+Sketch file up to its symbols: (header, parameters, payload)."""
    header, offset = container.read_header(data, limits)
    container.check_codec(header, TEXT_SKETCH)
    parameters = Parameters.from_bytes(header.parameters)
    return header, parameters, container.read_payload(data, offset)[0]


def describe(data: bytes, limits: Limits = DEFAULT_LIMITS) -> dict[str, Any]:
    """The facts of a Text+Sketch file as plain values, without a model."""
    header, parameters, payload = read_file(data, limits)

    def cells(side):
        return list(grid_shape(header.height, header.width, side)) if side else "none"

    return container.facts(header, data) | {
        "prompt": PROMPTS[parameters.prompt],
        "sketch": cells(parameters.side),
        "levels": parameters.levels,
        "thumbnail": cells(parameters.thumbnail),
        "seed": parameters.seed,
        "payload": len(payload),
        "complete": True,  # a file that was cut short cannot be read
    }
