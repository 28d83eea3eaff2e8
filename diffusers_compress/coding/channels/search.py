"""The sender's search of a trellis for the message with the largest total score.

A message of sum(bits) bits moves through len(bits) segments, in each of which bits[j] of them are read. Both algorithms take the scores
of all windows of the codebook, of the first segment and then for a run of segments at a time, [B, segments, 2^CODEBOOK_BITS], and give
messages [B, sum(bits)] uint8 of 0 and 1. What moves through a run is here in PyTorch, in `search_triton` as kernels for a GPU, and for
the M-algorithm on a CPU in `search_numpy`.
"""

import functools
import itertools
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from diffusers_compress.coding import randomness

CODEBOOK_BITS = 14  # the codebook has 2^14 normals
GOLDEN_RATIO = 0x9E3779B1  # its fraction, times 2^32, made odd: a hash (Knuth, TAOCP 3, section 6.4)


def place(state):
    """Where a state's window of the codebook begins: its last CODEBOOK_BITS bits, changed by a hash of the earlier ones."""
    earlier = state >> CODEBOOK_BITS
    return (state ^ (earlier * GOLDEN_RATIO & randomness.WORD) >> 32 - CODEBOOK_BITS) & 2**CODEBOOK_BITS - 1


@functools.cache
def on(device: torch.device) -> tuple[Callable, Callable]:
    """`follow` and `survivors` for this device: those of `search_triton`, if it runs there and finds the same messages, or those that are
    here; a CPU has its own `survivors`."""
    if device.type == "cpu":
        from diffusers_compress.coding.channels import search_numpy

        return follow, search_numpy.survivors
    if device.type != "cuda":
        return follow, survivors
    bits, scores = [CODEBOOK_BITS, 4, 3], randomness.normals(3 << CODEBOOK_BITS, randomness.CODEBOOK, 0, device)
    runs = scores.view(1, 3, -1).split([1, 2], 1)
    try:
        from diffusers_compress.coding.channels import search_triton

        kernels = search_triton.follow, search_triton.survivors
        ours, theirs = (
            np.stack([viterbi(bits, runs, along), m_algorithm(bits, runs, 2**10, among)])
            for along, among in ((follow, survivors), kernels)
        )
    except Exception:  # no Triton, no C compiler that it needs, a GPU that is too small or too old
        return follow, survivors
    return kernels if np.array_equal(ours, theirs) else (follow, survivors)


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
    """Nearly the best message, where a state has 32 bits: only the best few are followed from segment to segment."""
    total, kept = survivors(bits, scores, followed)
    survivor, ways = total.argmax(1, keepdim=True), []
    for width, best in zip(reversed(bits), reversed(kept)):
        chosen = best.gather(1, survivor)
        ways.append(chosen & 2**width - 1)
        survivor = (chosen >> width).long()
    return _message(list(torch.cat(ways[::-1], 1).cpu().numpy().T), bits)


def survivors(bits: list[int], scores: Iterable[Tensor], followed: int) -> tuple[Tensor, list[Tensor]]:
    """Totals of the messages that are left at the end [B, M], and for each segment those that were followed [B, M] int32: which one of the
    segment before it continues, and in the low `width` bits what it read."""
    each = (score for run in scores for score in run.unbind(1))
    first = next(each)
    total, state, kept = first.new_zeros(len(first), 1), torch.zeros(len(first), 1, dtype=torch.int64, device=first.device), []
    for width, score in zip(bits, itertools.chain([first], each)):
        state = state << width & randomness.WORD
        # The windows of the 2^width states that may follow lie side by side, in an order of their own.
        window = place(state)
        rows = torch.arange(len(score), device=score.device)[:, None] * (score.shape[1] >> width) + (window >> width)
        following = score.reshape(-1, 2**width).index_select(0, rows.flatten()).view(*rows.shape, 2**width)
        total = (following + total[..., None]).flatten(1)
        best = total.topk(min(followed, total.shape[1]), sorted=False).indices
        total, parent = total.gather(1, best), best >> width
        way = (best ^ window.gather(1, parent)) & 2**width - 1
        state = state.gather(1, parent) | way
        kept.append((parent << width | way).to(torch.int32))
    return total, kept


def _message(ways: list[np.ndarray], bits: list[int]) -> np.ndarray:
    """The bits of all segments' numbers [B], the highest first -> [B, sum(bits)] uint8."""
    digits = [way[:, None] >> np.arange(width)[::-1] & 1 for way, width in zip(ways, bits)]
    return np.concatenate(digits, 1).astype(np.uint8)
