"""The probability of each cell of a sketch from those before it: FORMAT.md, section "Text+Sketch", "Sketch". All in integers.

As JBIG2's generic regions (ITU-T T.88, 6.2), a cell is foretold from how often the same pattern of cells around it was followed by a line.
Five patterns, of 3 to 18 cells, have their say: their log odds are added with weights that follow by gradient descent on the bits spent
(logistic mixing, Mahoney 2005, PAQ). Nothing is trained; a small sketch is learned by its small patterns, a large one by the large ones.

A sketch of several levels is as many such pictures, one above the other: "above 0", of those "above 1", and so on.
"""

import math
from collections.abc import Generator

import numpy as np

from diffusers_compress.coding.range_coder import Decoder, Encoder

# Known cells (rows, columns) by distance, the nearest first; a pattern is as many of the first as PATTERNS says
CELLS = [
    *((0, -1), (-1, 0), (-1, -1), (-1, 1), (0, -2), (-2, 0), (-1, -2), (-1, 2), (-2, -1), (-2, 1)),
    *((0, -3), (-3, 0), (-2, -2), (-2, 2), (-1, -3), (-1, 3), (-3, -1), (-3, 1)),
]
PATTERNS = (3, 6, 10, 14, 18)
EDGE = 3  # cells outside the sketch that a pattern sees, all 0

NAT = 256  # parts of a nat in which log odds are given
ONE = 1 << 16  # of a probability, and of a weight
MOST = 60  # cells of one pattern after which they count half
LOG = [round(NAT * math.log(n + 0.4)) for n in range(MOST + 1)]
REACH = 8 * NAT  # of log odds
PROBABILITY = [round(ONE / (1 + math.exp(-x / NAT))) for x in range(-REACH, REACH + 1)]
FIRST_WEIGHT = ONE * 11 // 32
RATE = 14  # shift of the descent


class Plane:
    """What was seen of one threshold: for each pattern how often what followed was 0 and 1; weights for each of the smallest patterns."""

    def __init__(self):
        self.seen = [{} for _ in PATTERNS]
        self.weights = [[FIRST_WEIGHT] * len(PATTERNS) for _ in range(1 << PATTERNS[0])]

    def foretell(self, near: list[int]) -> int:
        """The probability of a 1, in parts of ONE, after these bits of CELLS."""
        self.counts, pattern, start = [], 0, 0
        for size, seen in zip(PATTERNS, self.seen):
            for bit in near[start:size]:
                pattern = 2 * pattern + bit
            start = size
            self.counts.append(seen.setdefault(pattern, [0, 0]))
            if size == PATTERNS[0]:
                self.own = self.weights[pattern]
        self.odds = [LOG[ones] - LOG[zeros] for zeros, ones in self.counts]
        total = sum(weight * odds for weight, odds in zip(self.own, self.odds)) // ONE
        self.probability = PROBABILITY[max(-REACH, min(REACH, total)) + REACH]
        return self.probability

    def learn(self, bit: int) -> None:
        """What came of the last `foretell`."""
        error = ONE * bit - self.probability
        for i, odds in enumerate(self.odds):
            self.own[i] += error * odds >> RATE
        for counts in self.counts:
            counts[bit] += 1
            if sum(counts) > MOST:
                counts[:] = counts[0] // 2, counts[1] // 2


def walk(shape: tuple[int, int], levels: int) -> Generator[int, int, np.ndarray]:
    """Yields the probability of a 1 of each bit, in parts of ONE, and is sent the bit; returns the grid of levels [rows, columns]."""
    rows, columns = shape
    grid = [[0] * (columns + 2 * EDGE) for _ in range(rows + EDGE)]
    planes = [Plane() for _ in range(levels - 1)]
    for y in range(EDGE, rows + EDGE):
        for x in range(EDGE, columns + EDGE):
            near = [grid[y + down][x + right] for down, right in CELLS]
            for level, plane in enumerate(planes):
                bit = yield plane.foretell([int(value > level) for value in near])
                plane.learn(bit)
                if not bit:
                    break
                grid[y][x] = level + 1
    return np.array(grid)[EDGE:, EDGE:-EDGE]


def encode(encoder: Encoder, grid: np.ndarray, levels: int) -> None:
    """Append the levels [rows, columns], 0 to levels - 1, to a range coder."""
    steps, bits, ones = walk(grid.shape, levels), [], []
    probability = next(steps)
    for value in grid.ravel().tolist():
        for level in range(min(value + 1, levels - 1)):
            bits.append(int(value > level))
            ones.append(probability)
            try:
                probability = steps.send(bits[-1])
            except StopIteration:
                break
    encoder.encode_all(np.array(bits), np.stack([ONE - np.array(ones), ones], -1))


def decode(decoder: Decoder, shape: tuple[int, int], levels: int) -> np.ndarray:
    """The levels [rows, columns] that `encode` wrote."""
    steps = walk(shape, levels)
    probability = next(steps)
    while True:
        bit = int(decoder.decode_all(np.array([[ONE - probability, probability]]))[0])
        try:
            probability = steps.send(bit)
        except StopIteration as stop:
            return stop.value
