"""UQDM's own part of a file, read without torch: parameters, sections, facts. FORMAT.md, section "UQDM", "Parameters"."""

from dataclasses import dataclass, field, replace
from itertools import accumulate

from diffusers_compress.contract import UQDM
from diffusers_compress.errors import Corrupt, LimitExceeded
from diffusers_compress.format import container
from diffusers_compress.format.bits import need, read_varint, write_varint
from diffusers_compress.format.limits import DEFAULT_LIMITS

MAX_STEPS = 127
CHECK_BYTES = 2


@dataclass
class Parameters:
    """What a UQDM file says besides the size and the model.

    `nudge`: by how many 256ths of its points the grid of means and scales is moved, 0 to 255; `checks`: of each step, what the
    sender's means and scales give in `dither.check_of`; `sizes`: bytes of the section of each step; `pixels`: bytes of the
    section with the pixels, None if the file is not lossless.
    """

    nudge: int = 0
    checks: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    pixels: int | None = None

    @property
    def sections(self) -> list[int]:
        """Bytes of all sections in their order."""
        return self.sizes + ([] if self.pixels is None else [self.pixels])

    def to_bytes(self) -> bytes:
        """ValueError if a number is out of its field's range."""
        if len(self.sizes) > MAX_STEPS:
            raise ValueError(f"{len(self.sizes)} steps are more than {MAX_STEPS}")
        data = bytes([2 * len(self.sizes) + (self.pixels is not None), self.nudge])
        data += b"".join(check.to_bytes(CHECK_BYTES, "little") for check in self.checks)
        return data + b"".join(map(write_varint, self.sections))

    @classmethod
    def from_bytes(cls, data: bytes, limits=DEFAULT_LIMITS) -> "Parameters":
        """Inverse of `to_bytes`. Corrupt or LimitExceeded for what no encoder writes."""
        need(data, 2)
        count, offset = data[0] >> 1, 2 + (data[0] >> 1) * CHECK_BYTES
        if count > limits.steps:
            raise LimitExceeded(f"the file has {count} steps, more than {limits.steps}; raise Limits.steps if you trust the file")
        need(data, offset)
        checks = [int.from_bytes(data[i : i + CHECK_BYTES], "little") for i in range(2, offset, CHECK_BYTES)]
        sizes = []
        for _ in range(count + data[0] % 2):
            size, offset = read_varint(data, offset)
            sizes.append(size)
        if offset != len(data):
            raise Corrupt("the file's parameters are longer than they say; fetch or encode the file again")
        return cls(data[1], checks, sizes[:count], sizes[count] if data[0] % 2 else None)


def read_file(data: bytes, limits=DEFAULT_LIMITS) -> tuple[container.Header, Parameters, list[bytes], bool]:
    """Parse a UQDM file with integers alone: (header, parameters, its whole sections, complete)."""
    header, offset = container.read_header(data, limits)
    container.check_codec(header, UQDM)
    parameters = Parameters.from_bytes(header.parameters, limits)
    payload, complete = container.read_payload(data, offset, sum(parameters.sections))
    ends = list(accumulate(parameters.sections))
    sections = [payload[end - size : end] for size, end in zip(parameters.sections, ends) if end <= len(payload)]
    return header, parameters, sections, complete


def shortened(header: container.Header, parameters: Parameters, sections: list[bytes], limit: float, fewest: int = 0) -> bytes:
    """The file with the most sections, at least so many, that is within the limit in bytes. ValueError if there is none."""
    for count in range(len(sections), fewest - 1, -1):
        steps = min(count, len(parameters.sizes))
        pixels = parameters.pixels if count > len(parameters.sizes) else None
        kept = Parameters(parameters.nudge, parameters.checks[:steps], parameters.sizes[:steps], pixels)
        data = container.pack(replace(header, parameters=kept.to_bytes()), b"".join(sections[:count]))
        if len(data) <= limit:
            return data
    raise ValueError(
        f"a {header.width}x{header.height} picture may take {int(limit)} bytes here; "
        f"{'the lossless' if fewest else 'the smallest'} file has {len(data)}"
    )


def describe(data: bytes, limits=DEFAULT_LIMITS) -> dict:
    """The facts of a UQDM file as plain values, without a model."""
    header, parameters, sections, complete = read_file(data, limits)
    return {
        "codec": "UQDM",
        "width": header.width,
        "height": header.height,
        "bytes": len(data),
        "bpp": 8 * len(data) / (header.width * header.height),
        "model": header.fingerprint.hex(),
        "steps": len(parameters.sizes),
        "steps_present": min(len(sections), len(parameters.sizes)),
        "step_bytes": parameters.sizes,
        "lossless": parameters.pixels is not None and len(sections) == len(parameters.sections),
        "complete": complete,
    }
