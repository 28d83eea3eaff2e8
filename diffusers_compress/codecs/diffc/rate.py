"""How many bits a DiffC file and its steps take."""

from bisect import bisect_left, bisect_right
from dataclasses import replace

from diffusers_compress.codecs.diffc.format import (
    BUDGET_DIGITS,
    BUDGET_RANK_BITS,
    STRIDE_UNIT,
    number_of,
)
from diffusers_compress.coding.channels import CHANNELS
from diffusers_compress.format import container

MIN_BUDGET = 64  # bits of a step: below that, a step's start costs too much


def overhead(header, parameters):
    """Bytes of a file with these parameters that are not payload."""
    return container.overhead(replace(header, parameters=parameters.to_bytes()))


def budget_to_fill(header, parameters, steps, max_bytes):
    """The smallest budget with which so many steps fill the file; with less than MIN_BUDGET a step, it is fewer steps' budget."""
    channel = CHANNELS[parameters.channel]

    def size(budget, steps):
        filled = replace(parameters, budget=budget, last=budget, strides=[STRIDE_UNIT] * steps)
        return overhead(header, filled) + channel.payload_bytes(filled.budgets)

    steps = max(1, bisect_right(range(1, steps + 1), max_bytes, key=lambda count: size(MIN_BUDGET, count)))
    ranks = range(2**BUDGET_RANK_BITS - 1)
    return number_of(bisect_left(ranks, max_bytes, key=lambda rank: size(number_of(rank, BUDGET_DIGITS), steps)), BUDGET_DIGITS)
