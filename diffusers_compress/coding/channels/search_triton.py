"""The searches of `search` as one kernel each for a GPU: a program follows one picture through a whole run of segments.

Imported only where Triton is. The messages are those of `search.follow` and `search_numpy`: the same sums in the same order, and only
between equal ones may the choice be another.
"""

import itertools
from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusers_compress.coding.channels.search import CODEBOOK_BITS, GOLDEN_RATIO

STATES = tl.constexpr(2**CODEBOOK_BITS)
HIGH_BITS = tl.constexpr(CODEBOOK_BITS)
HASH = tl.constexpr(GOLDEN_RATIO)
TILE = 4096  # candidates looked at together
WARPS = 16


def follow(total: Tensor, run: Tensor, widths: list[int]) -> tuple[Tensor, list[Tensor]]:
    """As `search.follow`."""
    total, came_from, at = total.contiguous().clone(), [], 0
    for width, equal in itertools.groupby(widths):
        count = len(list(equal))
        tables = torch.empty(len(run), count, run.shape[2] >> width, dtype=torch.int16, device=run.device)
        viterbi_kernel[(len(run),)](run[:, at:], total, tables, run.stride(0), count, width, num_warps=WARPS, num_stages=1)
        came_from += tables.unbind(1)
        at += count
    return total, came_from


@triton.jit(do_not_specialize=["segments"])
def viterbi_kernel(scores, total, came_from, stride, segments, WIDTH: tl.constexpr):
    """total: [B, STATES], in and out. The states stay in registers, and change their order through shared memory. stride: of a picture."""
    WAYS: tl.constexpr = 1 << WIDTH
    KEPT: tl.constexpr = STATES >> WIDTH
    picture = tl.program_id(0).to(tl.int64)
    low = tl.arange(0, KEPT)
    state = tl.arange(0, WAYS)[:, None] * KEPT + low[None, :]
    following = low[:, None] * WAYS + tl.arange(0, WAYS)[None, :]
    best = tl.load(total + picture * STATES + state)
    for segment in range(segments):
        # State k follows the WAYS states whose low bits are the high bits of k.
        most, high = tl.max(best, 0, return_indices=True)
        tl.store(came_from + (picture * segments + segment) * KEPT + low, high.to(tl.int16))
        score = tl.load(scores + picture * stride + segment * STATES + following)
        best = tl.reshape(score + most[:, None], [WAYS, KEPT])
    tl.store(total + picture * STATES + state, best)


def survivors(bits: list[int], scores: Iterable[Tensor], followed: int) -> tuple[Tensor, list[Tensor]]:
    """As `search.m_algorithm` wants it."""
    runs = iter(scores)
    first = next(runs)
    device, pictures = first.device, len(first)
    widths = torch.tensor([*bits, 0], dtype=torch.int32).to(device)
    totals = torch.zeros(2, pictures, followed, device=device)  # where they come from and where they go, in turn
    states, places = torch.zeros(2, 2, pictures, followed, dtype=torch.int32, device=device)
    done, count, kept = 0, 1, []
    for run in itertools.chain([first], runs):
        segments = run.shape[1]
        chosen = torch.empty(pictures, segments, followed, dtype=torch.int32, device=device)
        arguments = run.contiguous(), widths, totals, states, places, chosen, done, segments, count, followed
        m_algorithm_kernel[(pictures,)](*arguments, totals.stride(0), TILE, num_warps=WARPS, num_stages=1)
        for way, width in zip(chosen.long().unbind(1), bits[done : done + segments]):
            count = min(count << width, followed)
            kept.append(way[:, :count])
        done += segments
    return totals[done % 2, :, :count], kept


@triton.jit(do_not_specialize=["start", "segments", "count"])
def m_algorithm_kernel(
    scores, widths, totals, states, places, chosen, start, segments, count, followed, other, TILE: tl.constexpr
):
    """totals, states, places: [2, B, followed]; those of segment j come from the half j % 2. other: elements of a half."""
    picture = tl.program_id(0).to(tl.int64)
    for segment in range(segments):
        width = tl.load(widths + start + segment)
        next_width = tl.load(widths + start + segment + 1)
        half = (start + segment) % 2
        source = picture * followed + half * other
        target = picture * followed + (1 - half) * other
        row = picture * segments + segment
        score = scores + row * STATES
        candidates = count << width
        count = tl.minimum(candidates, followed)

        # The count-th largest total, by bisection of the integers that are ordered as the numbers are
        least, most = tl.full([TILE], float("inf"), tl.float32), tl.full([TILE], float("-inf"), tl.float32)
        for first in range(0, candidates, TILE):
            inside, _, _, total = candidate(totals + source, places + source, score, first, candidates, width, TILE)
            least = tl.minimum(least, tl.where(inside, total, float("inf")))
            most = tl.maximum(most, total)
        low, high = order_of(tl.min(least, 0)).to(tl.int64), order_of(tl.max(most, 0)).to(tl.int64) + 1
        reached = candidates
        while high - low > 1:
            middle = (low + high) >> 1
            threshold = number_of(middle.to(tl.int32))
            above = tl.zeros([TILE], tl.int32)
            for first in range(0, candidates, TILE):
                _, _, _, total = candidate(totals + source, places + source, score, first, candidates, width, TILE)
                above += (total >= threshold).to(tl.int32)
            found = tl.sum(above, 0)
            enough = found >= count
            reached = tl.where(enough, found, reached)
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
        threshold = number_of(low.to(tl.int32))

        # All above it, and as many equal to it as there is room for
        filled, equals = 0, 0
        for first in range(0, candidates, TILE):
            _, parent, way, total = candidate(totals + source, places + source, score, first, candidates, width, TILE)
            equal = (total == threshold).to(tl.int32)
            spare = equals + tl.cumsum(equal, 0) <= reached - count
            keep = (total > threshold) | ((equal == 1) & (spare == 0))
            at = filled + tl.cumsum(keep.to(tl.int32), 0) - 1
            state = (tl.load(states + source + parent, keep, 0).to(tl.uint32) << width.to(tl.uint32)) | way.to(tl.uint32)
            tl.store(totals + target + at, total, keep)
            tl.store(states + target + at, state.to(tl.int32), keep)
            tl.store(places + target + at, place_of(state << next_width.to(tl.uint32)), keep)
            tl.store(chosen + row * followed + at, (parent << width) | way, keep)
            filled += tl.sum(keep.to(tl.int32), 0)
            equals += tl.sum(equal, 0)
        tl.debug_barrier()  # what was written is read by others now


@triton.jit
def candidate(totals, places, score, first, candidates, width, TILE: tl.constexpr):
    """TILE messages from `first` on: (whether there are so many, the message each continues, the bits it reads, its total)."""
    number = first + tl.arange(0, TILE)
    inside = number < candidates
    parent, way = number >> width, number & ((1 << width) - 1)
    total = tl.load(totals + parent, inside, 0.0)
    window = tl.load(places + parent, inside, 0) ^ way
    return inside, parent, way, tl.where(inside, total + tl.load(score + window, inside, 0.0), float("-inf"))


@triton.jit
def place_of(state):
    """As `search.place`, of 32 bits."""
    hashed = ((state >> HIGH_BITS) * HASH) >> (32 - HIGH_BITS)
    return ((state ^ hashed) & (STATES - 1)).to(tl.int32)


@triton.jit
def order_of(number):
    """Integers ordered as the numbers are."""
    bits = number.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def number_of(order):
    """Inverse of `order_of`."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
