"""DiffC's own part of a file, read without torch: parameters, messages, facts. FORMAT.md, section "Parameters"."""

from dataclasses import dataclass, field
from itertools import accumulate
from types import ModuleType
from typing import Any, NamedTuple, Self

from diffusers_compress.coding import channels
from diffusers_compress.contract import DIFFC
from diffusers_compress.errors import Corrupt, LimitExceeded, UnsupportedVersion
from diffusers_compress.format import container
from diffusers_compress.format.bits import BitReader, BitWriter
from diffusers_compress.format.container import Header
from diffusers_compress.format.limits import DEFAULT_LIMITS, Limits, check_prompt

MAX_PROMPT_BYTES, MAX_STEPS = DEFAULT_LIMITS.prompt_bytes, DEFAULT_LIMITS.steps
STRIDE_UNIT = 1024  # strides are counted in 1/1024 of alpha/sigma

# Budgets have 5 significant bits, strides 4. Their ranks number such integers in rising order.
BUDGET_DIGITS, BUDGET_RANK_BITS = 5, 9
STRIDE_DIGITS, STRIDE_RANK_BITS = 4, 8
RICE = 1
CHECK_BITS = 14  # see `drift`
MAX_SHORT_CHANNEL = 3  # larger numbers take eleven bits more


@dataclass
class Parameters:
    """What a DiffC file says besides the size and the model.

    All steps but the last have the same `budget`, in units of the channel; the last has at most that. `strides[j]`, an integer of
    STRIDE_DIGITS significant bits from 1 on, is the distance that step j goes in alpha/sigma, in units of 1 / STRIDE_UNIT. `check`:
    what the sender's last x_t gives in `drift.check_of`, or None.
    """

    channel: int
    budget: int
    last: int = 0
    strides: list[int] = field(default_factory=list)
    prompt: str = ""
    check: int | None = None

    @property
    def budgets(self) -> list[int]:
        return [self.budget] * (len(self.strides) - 1) + [self.last] if self.strides else []

    def to_bytes(self) -> bytes:
        """At least 2 bytes. ValueError if a number is out of its field's range."""
        text = self.prompt.encode()
        writer = BitWriter()
        if self.channel > MAX_SHORT_CHANNEL:
            for value, bits in ((0, 4), (self.channel, 8), (self.check is not None, 1)):
                writer.write(int(value), bits)
        else:
            writer.write(self.channel, 2 if self.check is None else 4)
        if self.check is not None:
            writer.write(self.check, CHECK_BITS)
        writer.write(bool(text), 1)
        if text:
            writer.write(len(text), 16)
            for byte in text:
                writer.write(byte, 8)
        writer.write(rank_of(self.budget, BUDGET_DIGITS), BUDGET_RANK_BITS)
        writer.write(self.last, self.budget.bit_length())
        ranks = [rank_of(stride, STRIDE_DIGITS) for stride in self.strides]
        if ranks:
            writer.write(ranks[0], STRIDE_RANK_BITS)
        for before, rank in zip(ranks, ranks[1:]):
            writer.write_rice(2 * (rank - before) if rank >= before else 2 * (before - rank) - 1, RICE)
        return writer.to_bytes()  # filled up with ones: never a whole Rice codeword, so the list ends by itself

    @classmethod
    def from_bytes(cls, data: bytes, limits: Limits = DEFAULT_LIMITS) -> Self:
        """Inverse of `to_bytes`. Corrupt or LimitExceeded for what no encoder writes, UnsupportedVersion for a channel to come."""
        reader = BitReader(data)
        channel = reader.read(2)
        checked = channel == 0
        if checked:
            channel = reader.read(2)
            if channel == 0:
                channel, checked = reader.read(8), reader.read(1)
                if channel <= MAX_SHORT_CHANNEL:
                    raise Corrupt(f"the file names channel {channel} in eight bits where two are enough")
        check = reader.read(CHECK_BITS) if checked else None
        if channel not in (row.number for row in channels.CHANNELS.values()):
            raise UnsupportedVersion(f"the file names channel {channel}, which is not known here; upgrade diffusers_compress")
        prompt = b""
        if reader.read(1):
            length = reader.read(16)
            check_prompt(length, limits)
            prompt = bytes(reader.read(8) for _ in range(length))
        budget = number_of(reader.read(BUDGET_RANK_BITS), BUDGET_DIGITS)
        last = reader.read(budget.bit_length())
        if last > budget:
            raise Corrupt(f"the file's last budget, {last}, is above that of the other steps, {budget}")
        try:
            return cls(channel, budget, last, read_strides(reader, limits.steps), prompt.decode(), check)
        except UnicodeDecodeError as error:
            raise Corrupt("the prompt in the file is not UTF-8") from error


def read_strides(reader: BitReader, most: int) -> list[int]:
    if reader.bits_left < STRIDE_RANK_BITS:
        return []
    ranks = [reader.read(STRIDE_RANK_BITS)]
    while (code := reader.read_rice(RICE)) is not None:
        if len(ranks) == most:
            raise LimitExceeded(f"the file has more than {most} steps; raise Limits.steps if you trust the file")
        ranks.append(ranks[-1] + (-(code + 1) // 2 if code % 2 else code // 2))
    if not all(1 <= rank < 2**STRIDE_RANK_BITS for rank in ranks):
        raise Corrupt("a stride in the file is out of range")
    return [number_of(rank, STRIDE_DIGITS) for rank in ranks]


def number_of(rank: int, digits: int) -> int:
    """Of 5 digits: 0, 1, ..., 31, 32, 34, ..., 62, 64, 68, ...: the integers of at most so many significant bits."""
    half = 2 ** (digits - 1)
    return rank if rank < half else (half + rank % half) << (rank // half - 1)


def rank_of(number: float, digits: int) -> int:
    """The rank of the largest such integer that is not above `number`."""
    half, number = 2 ** (digits - 1), int(number)
    shift = max(0, number.bit_length() - digits)
    return half * shift + (number >> shift)


def nearest(number: float, digits: int) -> int:
    """The nearest such integer."""
    rank = rank_of(number, digits)
    return min(number_of(rank, digits), number_of(rank + 1, digits), key=lambda candidate: abs(candidate - number))


class File(NamedTuple):
    """A file that was read; `payload`: the messages of its whole steps; `complete`: whether it was not cut."""

    header: Header
    parameters: Parameters
    payload: list
    complete: bool

    def notes(self) -> list[str]:
        """What to tell of a file that was cut."""
        steps = f"{len(self.payload)} of its {len(self.parameters.budgets)} steps"
        return [] if self.complete else [f"the file was cut short; the picture is made of {steps}"]


def read_parts(data: bytes, limits: Limits = DEFAULT_LIMITS) -> tuple[Header, Parameters, ModuleType, bytes, bool]:
    """A DiffC file before its messages are parsed: (header, parameters, module of the payload's form, payload, complete)."""
    header, offset = container.read_header(data, limits)
    container.check_codec(header, DIFFC)
    parameters = Parameters.from_bytes(header.parameters, limits)
    form = channels.payload_of(parameters.channel)
    payload, complete = container.read_payload(data, offset, form.payload_bytes(parameters.budgets, data[offset:]))
    return header, parameters, form, payload, complete


def read_file(data: bytes, limits: Limits = DEFAULT_LIMITS) -> File:
    """Parse a DiffC file with integers alone."""
    header, parameters, form, payload, complete = read_parts(data, limits)
    return File(header, parameters, form.unpack(payload, parameters.budgets), complete)


def describe(data: bytes, limits: Limits = DEFAULT_LIMITS) -> dict[str, Any]:
    """The facts of a DiffC file as plain values, without a model."""
    header, parameters, form, payload, complete = read_parts(data, limits)
    return container.facts(header, data) | {
        "coder": channels.name_of(parameters.channel),
        "prompt": parameters.prompt,
        "steps": len(parameters.budgets),
        "steps_present": form.steps_present(payload, parameters.budgets),
        "budgets": parameters.budgets,
        "levels": [stride / STRIDE_UNIT for stride in accumulate(parameters.strides)],
        "complete": complete,
    }
