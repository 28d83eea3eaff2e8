"""The distribution of each index of a grid from those before it: FORMAT.md, section "PerCo", "Indices". All in integers.

Several experts foretell the next index, each with a distribution over the codebook: none is likelier than another; as often as in training; as
often as in this grid so far; near in the codebook to the cell on the left, above, to both, or to where their trend leads. Their distributions
are mixed with weights in proportion to the probability that each has given to the grid so far (Bayes), with a floor under the
weights, so that an expert that was wrong at the sky may be right at the grass (Herbster & Warmuth 1998, fixed share).
"""

import functools
import zlib
from dataclasses import dataclass

import numpy as np

from diffusers_compress.coding.range_coder import Decoder, Encoder

ONE = 1 << 20  # sum of an expert's distribution, about
WEIGHTS = 1 << 16  # sum of the weights, about
FLOOR = 64
SHIFT = 14  # the mixture has a sum of about 2^22
OWN = 8  # weight of one index in the grid's own counts, against 1 for each code
NEAR = 4  # experts of nearness
NEW, SEEN = 4, 8  # count of an octave of distances at first, and of one that was seen


@dataclass(frozen=True, eq=False)
class Codebook:
    """`frequency` [K]: of the codes in training, integers of at least 1; `places` [K, D]: the codes as integers in -127 ... 127."""

    frequency: np.ndarray
    places: np.ndarray

    @property
    def size(self) -> int:
        return len(self.frequency)

    def identity(self) -> int:
        """CRC-32 of all that decides a distribution."""
        return zlib.crc32(self.places.astype(np.int8).tobytes(), zlib.crc32(self.frequency.astype("<u2").tobytes()))

    def octaves(self, points: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """floor(log2(1 + rank)) of each code, ranked by its distance from points [P, D] / scales [P], equal ones by index: [P, K]."""
        # |s c - p|^2 - |p|^2, and the code's number to break ties
        distance = scales[:, None] ** 2 * self.norms - 2 * scales[:, None] * (points @ self.places.T)
        keys = distance * self.size + np.arange(self.size)
        edges = np.partition(keys, self.edges, axis=1)[:, self.edges]
        return np.array([np.searchsorted(*pair, side="right") for pair in zip(edges, keys)], dtype=np.int64).reshape(keys.shape)

    @functools.cached_property
    def norms(self) -> np.ndarray:
        return np.square(self.places).sum(1)

    @functools.cached_property
    def edges(self) -> np.ndarray:
        """Ranks at which an octave begins, but the first: 1, 3, 7, ..."""
        return np.array([(2 << octave) - 1 for octave in range(self.size.bit_length() - 1)])


def points(places: np.ndarray, grid: np.ndarray, row: int, column: int) -> tuple[np.ndarray, np.ndarray]:
    """Left, above, both, trend: points [4, D], to be divided by scales [4]. One that is missing is replaced by the other; no points at
    the first cell."""
    left = grid[row, column - 1] if column else None
    above = grid[row - 1, column] if row else None
    if left is None and above is None:
        return places[:0], np.zeros(0)
    left, above = above if left is None else left, left if above is None else above
    corner = grid[row - 1, column - 1] if row and column else left
    w, n, nw = places[left], places[above], places[corner]
    return np.stack([w, n, w + n, w + n - nw]), np.array([1, 1, 2, 1])


def walk(codebook: Codebook, shape: tuple[int, int]):
    """Generator: yields the frequencies [K] of each cell of a grid, in row-major order, and is sent its index; returns the grid."""
    grid = np.zeros(shape, dtype=np.int64)
    codes = np.diff(codebook.edges, prepend=0, append=codebook.size)  # in each octave
    fixed = [np.full(codebook.size, ONE // codebook.size), ONE * codebook.frequency // codebook.frequency.sum()]
    own, seen = np.ones(codebook.size, dtype=np.int64), np.full((NEAR, len(codes)), NEW)
    weights = np.full(3 + NEAR, WEIGHTS // (3 + NEAR))
    for row, column in np.ndindex(shape):
        octaves = codebook.octaves(*points(codebook.places, grid, row, column))
        near = (
            np.take_along_axis(ONE * seen // (seen.sum(1, keepdims=True) * codes), octaves, 1)
            if len(octaves)
            else fixed[:1] * NEAR
        )
        experts = np.stack([*fixed, ONE * own // own.sum(), *near])
        index = yield 1 + (weights @ experts >> SHIFT)

        share = weights * experts[:, index]
        weights = np.maximum(FLOOR, WEIGHTS * share // share.sum())
        seen[np.arange(len(octaves)), octaves[:, index]] += SEEN
        own[index] += OWN
        grid[row, column] = index
    return grid


def encode(encoder: Encoder, grid: np.ndarray, codebook: Codebook) -> None:
    """Append the indices [a, b] to a range coder."""
    steps, indices = walk(codebook, grid.shape), grid.flatten()
    frequencies = next(steps)
    for index in indices:
        encoder.encode_all(np.array([index]), frequencies[None])
        try:
            frequencies = steps.send(index)
        except StopIteration:
            return


def decode(decoder: Decoder, shape: tuple[int, int], codebook: Codebook) -> np.ndarray:
    """The indices [a, b] that `encode` wrote."""
    steps = walk(codebook, shape)
    frequencies = next(steps)
    while True:
        try:
            frequencies = steps.send(decoder.decode_all(frequencies[None])[0])
        except StopIteration as stop:
            return stop.value
