"""The distribution of each quantized latent from those before it, without training: FORMAT.md, section "Relic", "Adaptive model".

All in integers, in units of 1/512 of the step width (`logistic.UNIT`). Positions are visited from a coarse grid to the finest, so
that all but the first lie between others that are known. What the latent has shown so far gives the mean by recursive least squares
from neighbours and earlier channels, the expected error likewise, and for each size of that error the scale that would have cost
fewest bits (context selection after Wu & Memon 1997, CALIC; least squares after Ye & Hou 2003).

A model is a generator: it yields (channel, positions [N], mean [N], index [N]) and is sent the values v [N] of these positions.
"""

import functools
from dataclasses import dataclass

import numpy as np

from diffusers_compress.coding import logistic
from diffusers_compress.coding.logistic import UNIT

STRIDE = 16  # of the coarsest grid
BATCH = 256  # positions that share one state of the model, about
NEAR = 4  # the first neighbours are the nearest ones

# Where the known neighbours of a position lie, in steps of the grid: of one between four others diagonally, of one between two
# in its row, of one between two in its column (the others of its kind are then known as well).
FAR_DIAGONAL = [(1, 3), (1, -3), (-1, 3), (-1, -3), (3, 1), (3, -1), (-3, 1), (-3, -1)]
KNIGHT = [(1, 2), (1, -2), (-1, 2), (-1, -2), (2, 1), (2, -1), (-2, 1), (-2, -1)]
DIAGONAL = [(1, 1), (1, -1), (-1, 1), (-1, -1)]
DIRECT = [(0, 1), (0, -1), (1, 0), (-1, 0)]
OFFSETS = {1: DIAGONAL + FAR_DIAGONAL, 2: DIRECT + KNIGHT, 3: DIRECT + DIAGONAL + KNIGHT[:4]}
NEIGHBOURS = 12


@dataclass(frozen=True, eq=False)
class Batch:
    """Positions [N] in row-major order and their neighbours [N, 12], as indices; h w stands for one outside.

    kind: 0 the coarsest grid, without neighbours; 1, 2, 3 as in OFFSETS. `step`: distance of the nearest neighbours' rows or columns.
    """

    kind: int
    step: int
    positions: np.ndarray
    neighbours: np.ndarray


@functools.lru_cache(32)
def batches(h: int, w: int, stride: int = STRIDE, size: int = BATCH) -> list[Batch]:
    """All positions of an h x w grid, once each, in the order of coding; `stride`: that of the coarsest, a power of 2."""
    y, x = np.mgrid[0:h:stride, 0:w:stride].reshape(2, -1)
    found = [Batch(0, stride, y * w + x, np.full((len(y), NEIGHBOURS), h * w))]
    step = stride // 2
    while step:
        for kind, (top, left) in ((1, (step, step)), (2, (0, step)), (3, (step, 0))):
            y, x = np.mgrid[top : h : 2 * step, left : w : 2 * step].reshape(2, -1)
            for part in np.array_split(np.arange(len(y)), max(1, len(y) // size)):
                if len(part):
                    neighbours = _neighbours(h, w, y[part], x[part], step, OFFSETS[kind])
                    found.append(Batch(kind, step, y[part] * w + x[part], neighbours))
        step //= 2
    return found


def _neighbours(h, w, y, x, step, offsets):
    """Indices [N, 12]; what lies outside is mirrored at the position itself, and is h w if that lies outside too."""
    columns = []
    for dy, dx in offsets:
        row, column = y + dy * step, x + dx * step
        row = np.where((row < 0) | (row >= h), y - dy * step, row)
        column = np.where((column < 0) | (column >= w), x - dx * step, column)
        inside = (row >= 0) & (row < h) & (column >= 0) & (column < w)
        columns.append(np.where(inside, row * w + column, h * w))
    return np.stack(columns, -1)


def surroundings(v, batch, unit):
    """Mean of the near neighbours [..., N], their spread [..., N] (above UNIT / 8), all neighbours less the mean [..., N, 12].

    v: [..., h w + 1], 0 where h w stands for, an integer array or tensor; `unit` [..., 1] or an integer: the channel's standard
    deviation, which is the spread where there are no neighbours.
    """
    known = v[..., batch.neighbours]
    centre = known[..., :NEAR].sum(-1) + NEAR // 2 >> 2
    difference = known - centre[..., None]
    near, far = abs(difference[..., :NEAR]).sum(-1), abs(difference[..., NEAR:]).sum(-1)
    spread = (near + (far >> 1) >> 3) if batch.kind else unit + 0 * centre
    return centre, spread + UNIT // 8 + 1, difference


def relative(x, spread, limit, parts=64):
    """x in parts of the spread, within +-limit."""
    return (x * parts // spread).clip(-limit, limit)


# ------------------------------------------------------------------------------------------------------------ adaptive model

LIMIT = 1023
WEIGHT_BITS = 12
THRESHOLDS = np.rint(2.0 ** (np.arange(2, 34) / 2)).astype(np.int64)  # of expected errors: half octaves
CANDIDATES = np.arange(48)  # scales among which each size of error has its own
COST_UNIT = 64  # parts of a bit in which their costs are counted
FIRST_ERROR = 48  # expected error before any is known, in 64ths of the spread


class LeastSquares:
    """target ~ weights . features over all that was seen, in integers; features [N, n] and targets [N] below 2^10."""

    def __init__(self, ridge):
        """ridge: what is added to each feature's moment, so that the weights start small."""
        self.ridge, self.moments, self.products = ridge, 0, 0

    def add(self, features, target):
        self.moments = self.moments + features.T @ features
        self.products = self.products + features.T @ target

    def predict(self, features, first):
        """[N]; `first` before anything was seen."""
        if isinstance(self.moments, int):
            return np.full(len(features), first)
        weights = solve(self.moments + self.ridge * np.eye(len(self.moments), dtype=np.int64), self.products)
        return features @ weights >> WEIGHT_BITS


def solve(matrix, vector):
    """weights [n] in units of 2^-12 with matrix @ weights about vector * 2^12: elimination without pivoting, divisions rounded down.

    matrix: symmetric, positive definite.
    """
    rows = [[*map(int, row), int(value)] for row, value in zip(matrix, vector)]
    n = len(rows)
    for i, pivot in enumerate(rows):
        for row in rows[i + 1 :]:
            factor = (row[i] << 24) // max(1, pivot[i])
            for j in range(i + 1, n + 1):
                row[j] -= factor * pivot[j] >> 24
    weights = [0] * n
    for i in reversed(range(n)):
        rest = (rows[i][n] << WEIGHT_BITS) - sum(a * b for a, b in zip(rows[i][i + 1 : n], weights[i + 1 :]))
        weights[i] = max(-(1 << 20), min(1 << 20, rest // max(1, rows[i][i])))
    return np.array(weights, dtype=np.int64)


class Scales:
    """For each size of the expected error the scale that the values so far would have taken fewest bits with."""

    def __init__(self):
        # Before anything was seen: the logistic's mean absolute error is 2 ln 2 times its scale; a bit for each step off that.
        sizes = np.arange(len(THRESHOLDS) + 1)
        likely = 2 * sizes + 3 - logistic.PER_OCTAVE * 9 + logistic.PER_OCTAVE * 5 - 2  # in quarter octaves, 2^9 being the UNIT
        self.costs = COST_UNIT * np.abs(CANDIDATES - likely[:, None])

    def index(self, size):
        return CANDIDATES[self.costs.argmin(1)][size]

    def add(self, size, k, mean):
        lengths = np.rint(COST_UNIT * logistic.code_length(k[:, None], mean[:, None], CANDIDATES)).astype(np.int64)
        total = np.zeros_like(self.costs)
        for each in np.unique(size):
            total[each] = lengths[size == each].sum(0)
        self.costs += 3 * total
        self.costs[1:] += total[:-1]
        self.costs[:-1] += total[1:]


def adaptive(h, w, units, dither):
    """Generator over an h x w latent; `units`: standard deviation of each channel, 0 for one that is not coded.

    dither: [C, h w] in [-UNIT / 2, UNIT / 2], the shared noise that is added before rounding; v = UNIT k - dither.
    """
    channels = order(units)
    v, error = np.zeros((2, len(units), h * w + 1), dtype=np.int64)
    means = {(kind, c): LeastSquares(1 << 20) for kind in range(4) for c in channels}
    errors = {(kind, c): LeastSquares(1 << 16) for kind in range(4) for c in channels}
    scales = {c: Scales() for c in channels}
    for batch in batches(h, w):
        deviations, magnitudes = [], []  # of the earlier channels at these positions
        for c in channels:
            centre, spread, difference = surroundings(v[c], batch, units[c])
            around = relative(difference, spread[:, None], LIMIT).T if batch.kind else []
            features = np.stack([*around, *deviations, 0 * spread], -1)
            near, far = error[c][batch.neighbours[:, :NEAR]].sum(1) >> 2, error[c][batch.neighbours[:, NEAR:]].sum(1) >> 3
            around = [relative(near, spread, LIMIT), relative(far, spread, LIMIT)] if batch.kind else []
            error_features = np.stack([*around, *magnitudes, 0 * spread + 64], -1)

            slope = means[batch.kind, c].predict(features, 0)
            mean = centre + (slope.clip(-8 * LIMIT, 8 * LIMIT) * spread >> 6)
            expected = errors[batch.kind, c].predict(error_features, FIRST_ERROR).clip(4, LIMIT)
            size = np.searchsorted(THRESHOLDS, np.maximum(1, expected * spread >> 6), side="right")

            noise = dither[c][batch.positions]
            value = yield c, batch.positions, mean + noise, scales[c].index(size)

            v[c][batch.positions] = value
            miss = np.abs(value - mean)
            error[c][batch.positions] = miss
            deviations.append(relative(value - centre, spread, LIMIT))
            magnitudes.append(relative(miss, spread, LIMIT))
            means[batch.kind, c].add(features, deviations[-1])
            errors[batch.kind, c].add(error_features, magnitudes[-1])
            scales[c].add(size, (value + noise) // UNIT, mean + noise)


def order(units):
    """Channels that are coded, the most powerful first."""
    return sorted((c for c, unit in enumerate(units) if unit), key=lambda c: (-units[c], c))


def units_of(std, steps, coded):
    """Standard deviation of each channel in parts of its step, an integer; 0 for a channel that is not coded."""
    return [max(1, round(deviation * UNIT / step)) if yes else 0 for deviation, step, yes in zip(std, steps, coded, strict=True)]
