"""DiffC's own part of a file's header: the noise levels of its steps, their budgets, the prompt. FORMAT.md, section "Parameters"."""

from dataclasses import dataclass

from diffusers_compress.bitstream import BitReader, BitWriter, Corrupt, LimitExceeded

CHANNEL_NUMBERS = {"trellis": 1, "poisson": 2}
MAX_PROMPT_BYTES = 4096


@dataclass
class Parameters:
    """What a DiffC file says besides the size and the model (FORMAT.md, section "DiffC").

    Noise levels lie `spacing / 64` apart in alpha/sigma; only the last step covers `fraction / 128` of that. `budgets[j]` is what
    step j was allowed, in units of the channel.
    """

    channel: int
    spacing: int
    fraction: int
    budgets: list[int]
    prompt: str = ""

    def to_bytes(self):
        """At least 2 bytes. ValueError if a number is out of its field's range."""
        text = self.prompt.encode()
        writer = BitWriter()
        writer.write(self.channel, 2)
        writer.write(self.spacing - 1, 6)
        writer.write(self.fraction - 1, 7)
        writer.write(bool(text), 1)
        if text:
            writer.write(len(text), 16)
            for byte in text:
                writer.write(byte, 8)
        write_budgets(writer, self.budgets, self.fraction)
        return writer.to_bytes()  # filled up with ones: never a whole Rice codeword, so the list ends by itself

    @classmethod
    def from_bytes(cls, data):
        """Inverse of `to_bytes`. Corrupt or LimitExceeded for what no encoder writes."""
        reader = BitReader(data)
        channel, spacing, fraction, has_prompt = reader.read(2), reader.read(6) + 1, reader.read(7) + 1, reader.read(1)
        if channel not in CHANNEL_NUMBERS.values():
            raise Corrupt(f"the file names channel {channel}; known channels are {CHANNEL_NUMBERS}")
        prompt = b""
        if has_prompt:
            length = reader.read(16)
            if length > MAX_PROMPT_BYTES:
                raise LimitExceeded(f"the prompt has {length} bytes, more than {MAX_PROMPT_BYTES}")
            prompt = bytes(reader.read(8) for _ in range(length))
        try:
            return cls(channel, spacing, fraction, read_budgets(reader, fraction), prompt.decode())
        except UnicodeDecodeError as error:
            raise Corrupt("the prompt in the file is not UTF-8") from error


# Budgets are rounded to 5 significant bits (steps of 3 to 6 per cent). The first one's rank in that scale is sent as it is, each
# further one as its distance from the rank that the one before predicts.
RANK_BITS = 9
RICE = 1


def budget_of_rank(rank):
    """0, 1, ..., 31, 32, 34, ..., 62, 64, 68, ...: the integers of at most 5 significant bits."""
    return rank if rank < 16 else (16 + rank % 16) << (rank // 16 - 1)


def rank_of_budget(budget):
    """The rank of the largest such integer that is not above `budget`."""
    shift = max(0, int(budget).bit_length() - 5)
    return 16 * shift + (int(budget) >> shift)


def nearest_budget(budget):
    rank = rank_of_budget(budget)
    return min(budget_of_rank(rank), budget_of_rank(rank + 1), key=lambda b: abs(b - budget))


def predicted_rank(budget, step, fraction):
    """Levels equally far apart in alpha/sigma cost about the same, but for the first step, which starts where the SNR is zero."""
    return rank_of_budget(budget * (2 if step == 1 else 1) * fraction // 128)


def write_budgets(writer, budgets, fraction):
    if budgets:
        writer.write(rank_of_budget(budgets[0]), RANK_BITS)
    for step in range(1, len(budgets)):
        predicted = predicted_rank(budgets[step - 1], step, fraction if step == len(budgets) - 1 else 128)
        difference = rank_of_budget(budgets[step]) - predicted
        writer.write_rice(2 * difference if difference >= 0 else -2 * difference - 1, RICE)


def read_budgets(reader, fraction):
    if reader.bits_left < RANK_BITS:
        return []
    budgets, differences = [budget_of_rank(reader.read(RANK_BITS))], []
    while (code := reader.read_rice(RICE)) is not None:
        differences.append(-(code + 1) // 2 if code % 2 else code // 2)
    for step, difference in enumerate(differences, 1):
        rank = predicted_rank(budgets[-1], step, fraction if step == len(differences) else 128) + difference
        if not 0 <= rank < 2**RANK_BITS:
            raise Corrupt("a step's budget in the file is out of range")
        budgets.append(budget_of_rank(rank))
    return budgets
