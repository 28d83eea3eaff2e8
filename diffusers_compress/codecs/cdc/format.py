"""CDC's own part of a file, read without torch: parameters, payload, facts. FORMAT.md, section "CDC", "Parameters"."""

from dataclasses import dataclass
from typing import Any, Self

from diffusers_compress.contract import CDC
from diffusers_compress.errors import Corrupt
from diffusers_compress.format import container
from diffusers_compress.format.bits import need, read_varint, write_varint
from diffusers_compress.format.container import Header
from diffusers_compress.format.limits import DEFAULT_LIMITS, Limits

MAX_LEVEL = 255
MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class Parameters:
    """What a CDC file says besides the size and the model.

    `level`: of the rate, 0 to 255, the model's lowest first; `seed` of the noise that the picture is painted from.
    """

    level: int
    seed: int = 0

    def to_bytes(self) -> bytes:
        """ValueError if a number is out of its field's range."""
        return self.level.to_bytes(1, "little") + (write_varint(self.seed) if self.seed else b"")

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Inverse of `to_bytes`. Corrupt for what no encoder writes."""
        need(data, 1)
        seed, end = read_varint(data, 1) if len(data) > 1 else (0, 1)
        parameters = cls(data[0], seed)
        if end != len(data) or seed > MAX_SEED or parameters.to_bytes() != data:
            raise Corrupt("the file's parameters are none that an encoder writes; fetch or encode it again")
        return parameters


def read_file(data: bytes, limits: Limits = DEFAULT_LIMITS) -> tuple[Header, Parameters, bytes]:
    """Parse a CDC file up to its symbols: (header, parameters, payload)."""
    header, offset = container.read_header(data, limits)
    container.check_codec(header, CDC)
    parameters = Parameters.from_bytes(header.parameters)
    return header, parameters, container.read_payload(data, offset)[0]


def describe(data: bytes, limits: Limits = DEFAULT_LIMITS) -> dict[str, Any]:
    """The facts of a CDC file as plain values, without a model."""
    header, parameters, payload = read_file(data, limits)
    return container.facts(header, data) | {
        "level": parameters.level,
        "seed": parameters.seed,
        "payload": len(payload),
        "complete": True,  # a file that was cut short cannot be read
    }
