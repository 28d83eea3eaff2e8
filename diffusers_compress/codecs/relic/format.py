"""Relic's own part of a file, read without torch: parameters, payload, facts. FORMAT.md, section "Relic", "Parameters"."""

from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Self

from diffusers_compress.contract import RELIC
from diffusers_compress.errors import Corrupt
from diffusers_compress.format import container
from diffusers_compress.format.bits import BitReader, BitWriter
from diffusers_compress.format.container import Header
from diffusers_compress.format.limits import DEFAULT_LIMITS, Limits, check_prompt

MODEL_NUMBERS = {"adaptive": 1, "hyperprior": 2}
ROUNDINGS = ("plain", "dithered")
MAX_PROMPT_BYTES = DEFAULT_LIMITS.prompt_bytes

# Step widths have nine significant bits, so that they and what follows from them are exact: 2^-6, ..., 2^10 - 2^1.
STEPS_PER_OCTAVE = 256
STEP_BITS = 12
SMALLEST_STEP = 2.0**-6
SCALES_PER_OCTAVE = 16  # of a channel's own scale
SCALE_STEPS = STEPS_PER_OCTAVE // SCALES_PER_OCTAVE
SCALE_BITS, SHIFT_BITS = 6, 6
SHIFT_PARTS = 16  # of a step, in which shifts are given
TIMESTEP_BITS = 14
LEVEL_BITS, SIDE_BITS = 2, 5  # of a map of levels
MAX_SIDE, MAX_LEVEL = 2**SIDE_BITS, 2**LEVEL_BITS - 1


@dataclass
class Parameters:
    """What a Relic file says besides the size and the model (FORMAT.md, section "Relic").

    `step`: number of the step width; `tables`: two bytes that tell what the entropy model was made of; `coded`: of each channel;
    `scales` and `shifts`: of each channel, or empty for none at all; `levels`: rows of a coarse map, or none at all: where it has l,
    steps are 2^l times as wide.
    """

    model: int
    dithered: bool
    step: int
    timestep: int
    tables: int
    coded: list[bool]
    scales: list[int] = field(default_factory=list)
    shifts: list[int] = field(default_factory=list)
    levels: list[list[int]] = field(default_factory=list)
    prompt: str = ""

    def to_bytes(self) -> bytes:
        """ValueError if a number is out of its field's range."""
        text = self.prompt.encode()
        writer = BitWriter()
        for value, bits in ((self.model, 2), (self.dithered, 1), (bool(self.scales), 1), (bool(text), 1)):
            writer.write(int(value), bits)
        for value, bits in ((self.step, STEP_BITS), (bool(self.levels), 1), (self.timestep, TIMESTEP_BITS)):
            writer.write(int(value), bits)
        for value, bits in ((self.tables, 16), (len(self.coded) - 1, 8)):
            writer.write(value, bits)
        for coded in self.coded:
            writer.write(int(coded), 1)
        for scale, shift in zip(self.scales, self.shifts, strict=True):
            writer.write(scale + (1 << SCALE_BITS - 1), SCALE_BITS)
            writer.write(shift + (1 << SHIFT_BITS - 1), SHIFT_BITS)
        if self.levels:
            write_levels(writer, self.levels)
        return writer.to_bytes(pad=0) + text

    @classmethod
    def from_bytes(cls, data: bytes, limits: Limits = DEFAULT_LIMITS) -> Self:
        """Inverse of `to_bytes`. Corrupt or LimitExceeded for what no encoder writes."""
        reader = BitReader(data)
        model, dithered, affine, has_prompt = (reader.read(bits) for bits in (2, 1, 1, 1))
        step, has_levels, timestep, tables, channels = (reader.read(bits) for bits in (STEP_BITS, 1, TIMESTEP_BITS, 16, 8))
        if model not in MODEL_NUMBERS.values():
            raise Corrupt(f"the file names entropy model {model}; known are {MODEL_NUMBERS}")
        coded = [bool(reader.read(1)) for _ in range(channels + 1)]
        scales, shifts = [], []
        for _ in coded if affine else ():
            scales.append(reader.read(SCALE_BITS) - (1 << SCALE_BITS - 1))
            shifts.append(reader.read(SHIFT_BITS) - (1 << SHIFT_BITS - 1))
        levels = read_levels(reader) if has_levels else []
        filler = reader.read(reader.bits_left % 8)
        length = reader.bits_left // 8
        check_prompt(length, limits)
        if filler or bool(length) != bool(has_prompt):
            raise Corrupt("the parameters' filler is not zero, or the prompt's flag is wrong")
        try:
            prompt = bytes(reader.read(8) for _ in range(length)).decode()
        except UnicodeDecodeError as error:
            raise Corrupt("the prompt in the file is not UTF-8") from error
        return cls(model, bool(dithered), step, timestep, tables, coded, scales, shifts, levels, prompt)


def write_levels(writer: BitWriter, levels: list[list[int]]) -> None:
    """A map: its sides; of each row whether it is that above (0 above the first), otherwise its runs, by length (Elias gamma) and level."""
    above = [0] * len(levels[0])
    writer.write(len(levels) - 1, SIDE_BITS)
    writer.write(len(above) - 1, SIDE_BITS)
    for row in levels:
        writer.write(row == above, 1)
        for level, run in groupby(row) if row != above else ():
            length = len(list(run))
            writer.write(length, 2 * length.bit_length() - 1)
            writer.write(level, LEVEL_BITS)
        above = row


def read_levels(reader: BitReader) -> list[list[int]]:
    """Inverse of `write_levels`. Corrupt for a run beyond its row's end."""
    rows, columns = (reader.read(SIDE_BITS) + 1 for _ in range(2))
    levels, above = [], [0] * columns
    for _ in range(rows):
        if not reader.read(1):
            above = []
            while len(above) < columns:
                zeros = next((n for n in range(SIDE_BITS + 1) if reader.read(1)), None)
                if zeros is None:
                    raise Corrupt("a run of the file's map of step widths is too long")
                length = (1 << zeros) + reader.read(zeros)
                above += [reader.read(LEVEL_BITS)] * length
            if len(above) > columns:
                raise Corrupt("a run of the file's map of step widths goes beyond its row")
        levels.append(above)
    return levels


def step_width(number: int) -> float:
    """Step width number 0 ... 4095, exactly; a number outside counts as the nearest one."""
    number = max(0, min(2**STEP_BITS - 1, number))
    return SMALLEST_STEP * (1 + number % STEPS_PER_OCTAVE / STEPS_PER_OCTAVE) * 2 ** (number // STEPS_PER_OCTAVE)


def step_number(width: float) -> int:
    """The number whose step width is nearest to `width`."""
    return min(range(2**STEP_BITS), key=lambda number: abs(step_width(number) - width))


def read_file(data: bytes, limits: Limits = DEFAULT_LIMITS) -> tuple[Header, Parameters, bytes]:
    """Parse a Relic file up to its symbols: (header, parameters, payload)."""
    header, offset = container.read_header(data, limits)
    container.check_codec(header, RELIC)
    parameters = Parameters.from_bytes(header.parameters, limits)
    return header, parameters, container.read_payload(data, offset)[0]


def describe(data: bytes, limits: Limits = DEFAULT_LIMITS) -> dict[str, Any]:
    """The facts of a Relic file as plain values, without a model."""
    header, parameters, payload = read_file(data, limits)
    return container.facts(header, data) | {
        "prompt": parameters.prompt,
        "entropy_model": next(name for name, number in MODEL_NUMBERS.items() if number == parameters.model),
        "rounding": ROUNDINGS[parameters.dithered],
        "step": step_width(parameters.step),
        "timestep": parameters.timestep,
        "regions": bool(parameters.levels),
        "payload": len(payload),
        "complete": True,  # a file that was cut short cannot be read
    }
