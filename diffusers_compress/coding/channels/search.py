"""The sender's search of a trellis for the message with the largest total score.

A message of sum(bits) bits moves through len(bits) segments, in each of which bits[j] of them are read. Both algorithms take the scores
of all windows of the codebook, of the first segment and then for a run of segments at a time, [B, segments, 2^CODEBOOK_BITS], and give
messages [B, sum(bits)] uint8 of 0 and 1. What moves through a run is in `search_triton` as kernels for a GPU. Everywhere else Viterbi's
algorithm takes PyTorch, and the M-algorithm `search_numpy` on the CPU.
"""

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from diffusers_compress.coding import randomness

CODEBOOK_BITS = 14  # the codebook has 2^14 normals
SURVIVORS = 2**13  # messages that the M-algorithm follows: more bring little, for as many times the time (BENCHMARKS.md)
GOLDEN_RATIO = 0x9E3779B1  # its fraction, times 2^32, made odd: a hash (Knuth, TAOCP 3, section 6.4)


def place(state):
    """Where a state's window of the codebook begins: its last CODEBOOK_BITS bits, changed by a hash of the earlier ones."""
    earlier = state >> CODEBOOK_BITS
    return (state ^ (earlier * GOLDEN_RATIO & randomness.WORD) >> 32 - CODEBOOK_BITS) & 2**CODEBOOK_BITS - 1


@functools.cache
def on(device: torch.device) -> tuple[Callable, Callable]:
    """`follow` and `survivors` for this device: on a GPU those of `search_triton`, if they work there, otherwise what runs everywhere.

    Warns:
        RuntimeWarning: if a GPU goes without the kernels, with the reason.
    """
    from diffusers_compress.coding.channels import search_numpy

    everywhere = follow, search_numpy.survivors
    if device.type != "cuda":
        return everywhere
    try:
        from diffusers_compress.coding.channels import search_triton

        kernels = search_triton.follow, search_triton.survivors
        compare(everywhere, kernels, device)
    except Exception as error:  # no Triton, no C compiler that it needs, a GPU that is too small or too old
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        warnings.warn(
            f"{device} searches without its kernels, so that encoding takes longer: {reason}", RuntimeWarning, stacklevel=2
        )
        return everywhere
    return kernels


def compare(ours: tuple[Callable, Callable], theirs: tuple[Callable, Callable], device: torch.device | str) -> None:
    """RuntimeError if two of what `on` returns find different messages of a few segments of two pictures."""
    bits, shape = [CODEBOOK_BITS, 4, 4, 4, 3], (2, 5, 2**CODEBOOK_BITS)
    runs = randomness.normals(math.prod(shape), randomness.CODEBOOK, 0, device).view(shape).split([1, 4], 1)
    for name, (own, other) in {
        "Viterbi's algorithm": [viterbi(bits, runs, along) for along, _ in (ours, theirs)],
        "the M-algorithm": [m_algorithm(bits, runs, SURVIVORS, among) for _, among in (ours, theirs)],
    }.items():
        if not np.array_equal(own, other):
            raise RuntimeError(f"{name} finds other messages there")


# ------------------------------------------------------------------------------------------------------------------- Viterbi


def viterbi(bits: list[int], scores: Iterable[Tensor], follow: Callable) -> np.ndarray:
    """The best message, where a state has CODEBOOK_BITS bits."""
    runs, widths, came_from = iter(scores), iter(bits), []
    # With fewer bits than that only the lowest states can be reached.
    total = next(runs)[:, 0, : 2 ** next(widths)]
    for run in runs:
        total, tables = follow(total, run, list(itertools.islice(widths, run.shape[1])))
        came_from += tables

    # One copy from the device for all
    found = torch.cat([*came_from, total.argmax(1, keepdim=True)], 1).to(torch.int16).cpu().numpy()
    *tables, state = np.split(found.astype(np.int64), np.cumsum([table.shape[1] for table in came_from]), 1)
    state, ways = state[:, 0], []
    for width, table in zip(bits[:0:-1], reversed(tables)):
        ways.append(state & 2**width - 1)
        kept = state >> width
        state = kept | table[np.arange(len(state)), kept] << CODEBOOK_BITS - width
    return _message([state, *ways[::-1]], bits)


def follow(total: Tensor, run: Tensor, widths: list[int]) -> tuple[Tensor, list[Tensor]]:
    """All states [B, 2^CODEBOOK_BITS] through a run: their totals at its end, and for each segment the high bits of the best predecessor
    of each state without its last `width` bits [B, 2^(CODEBOOK_BITS - width)]."""
    came_from = []
    for width, score in zip(widths, run.unbind(1)):
        # State k follows the 2^width states whose low bits are the high bits of k.
        total, high = total.view(len(score), 2**width, -1).max(1)
        came_from.append(high)
        total = (score.view(len(score), -1, 2**width) + total[..., None]).flatten(1)
    return total, came_from


# --------------------------------------------------------------------------------------------------------------- M-algorithm


def m_algorithm(bits: list[int], scores: Iterable[Tensor], followed: int, survivors: Callable) -> np.ndarray:
    """Nearly the best message, where a state has 32 bits: only the best few are followed from segment to segment.

    survivors(bits, scores, followed) gives totals of the messages that are left at the end [B, M], and for each segment those that were
    followed [B, M] int64: which one of the segment before it continues, and in the low `width` bits what it read.
    """
    total, kept = survivors(bits, scores, followed)
    survivor, chosen = total.argmax(1, keepdim=True), []
    for width, best in zip(reversed(bits), reversed(kept)):
        chosen.append(best.gather(1, survivor))
        survivor = chosen[-1] >> width
    return _message(list(torch.cat(chosen[::-1], 1).cpu().numpy().T), bits)


def _message(ways: list[np.ndarray], bits: list[int]) -> np.ndarray:
    """The low bits of all segments' numbers [B], the highest first -> [B, sum(bits)] uint8."""
    digits = [way[:, None] >> np.arange(width)[::-1] & 1 for way, width in zip(ways, bits)]
    return np.concatenate(digits, 1).astype(np.uint8)
