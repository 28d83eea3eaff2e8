"""Pixels without loss: each from its neighbours, from the channels before it, and from a picture like it where there is one.

FORMAT.md, section "Lossless files". All in integers, so that every machine finds the same distributions. As in lossless JPEG XL, many simple
guesses are blended, each by how little it missed around, and the misses around tell how wide the distribution of a pixel is. One of
the guesses is a linear one whose weights follow the picture by least squares.

Pixels whose neighbours are all known are coded together: those with the same 2 y + x, in strips of rows that bound the memory.
"""

from collections.abc import Callable, Iterator

import numpy as np

from diffusers_compress.coding import logistic
from diffusers_compress.coding.context_model import WEIGHT_BITS, solve
from diffusers_compress.coding.range_coder import Decoder, Encoder
from diffusers_compress.errors import Corrupt

CHANNELS = (1, 0, 2)  # in the order of coding: green, red, blue
PARTS = 16  # of a pixel's value, in which guesses are given
ROWS, AREA = 512, 1 << 21  # of a strip at most: rows, pixels
GREY = 128  # stands for what comes before the first pixel
NEIGHBOURS = [(0, -1), (-1, 0), (-1, -1), (-1, 1), (0, -2), (-2, 0), (-2, 1)]  # W N NW NE WW NN NNE: (rows, columns)

FORGETTING = 6  # of least squares: 1/64 at each diagonal
RIDGE = 1 << 12
SOLVE_EVERY = 4  # diagonals
LIMIT = 2047

SIZES = np.rint(2.0 ** (np.arange(24) / 2)).astype(np.int64)  # of misses: half octaves
KEPT = 512  # misses of one size after which they count half
# Mean misses in 256ths of a pixel's value, below which a scale fits: the logistic's is 2 ln 2 times its scale
SCALES = np.rint(256 * 2 * np.log(2) * 2.0 ** ((np.arange(56) + 0.5) / logistic.PER_OCTAVE - 5)).astype(np.int64)


def encode(encoder: Encoder, picture: np.ndarray, prediction: np.ndarray | None = None) -> None:
    """Append the pixels of a picture [3, H, W], 0 to 255, to a range coder; prediction: a picture of the same shape, or None."""
    flat = picture.reshape(3, -1).astype(np.int64)

    def send(c, positions, mean, scale):
        logistic.encode(encoder, flat[c, positions], mean, scale)
        return flat[c, positions]

    walk(picture.shape[1:], prediction, send)


def decode(decoder: Decoder, shape: tuple[int, int], prediction: np.ndarray | None = None) -> np.ndarray:
    """The picture [3, H, W] uint8 that `encode` wrote. Corrupt for pixels that are none, and soon after a stream that ends early."""
    picture = np.zeros((3, shape[0] * shape[1]), dtype=np.uint8)

    def receive(c, positions, mean, scale):
        values = logistic.decode(decoder, mean, scale)
        if values.min() < 0 or values.max() > 255:
            raise Corrupt("the payload holds pixels that are none; fetch or encode the file again")
        picture[c, positions] = values
        decoder.check_end()
        return values

    walk(shape, prediction, receive)
    return picture.reshape(3, *shape)


def walk(shape: tuple[int, int], prediction: np.ndarray | None, transmit: Callable) -> None:
    """transmit(channel, positions [N], mean [N] in parts of UNIT, scales [N]) gives the values at these positions, [N] int64."""
    h, w = shape
    rows = min(h, ROWS, max(1, AREA // w))
    planes = [Plane(rows, w, references=i + (prediction is not None)) for i in range(3)]
    for top in range(0, h, rows):
        for plane in planes if top else ():
            plane.next_strip(w)
        # The prediction is known beforehand, here with the two rows above the strip
        like = None if prediction is None else [strip_of(prediction[c], top, rows) for c in CHANNELS]
        for y, x in diagonals(min(rows, h - top), w):
            at, near = (y + 2) * w + x, neighbours(y, x, w, top)
            for i, (c, plane) in enumerate(zip(CHANNELS, planes)):
                earlier = planes[:i]
                references = [other.values for other in earlier] + ([] if like is None else [like[i]])
                guesses, features, centre = plane.guesses(references, at, near)
                mean, scale, size = plane.expected(guesses, earlier, at, near)
                values = transmit(c, (top + y) * w + x, mean, scale)
                plane.learn(values, at, guesses, features, centre, mean, size)


def diagonals(rows: int, w: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows and columns of the pixels with 2 y + x = 0, 1, ..."""
    for t in range(2 * (rows - 1) + w):
        y = np.arange(max(0, (t - w + 2) // 2), min(rows - 1, t // 2) + 1)
        if len(y):
            yield y, t - 2 * y


def neighbours(y: np.ndarray, x: np.ndarray, w: int, top: int) -> np.ndarray:
    """Places in a plane of the NEIGHBOURS of pixels in a strip whose first row is `top`: [7, N]. For one outside of the picture W, in the first
    column N, at the first pixel none."""
    instead = np.where(x > 0, (y + 2) * w + x - 1, np.where(top + y > 0, (y + 1) * w + x, -1))
    places = []
    for dy, dx in NEIGHBOURS:
        inside = (top + y + dy >= 0) & (x + dx >= 0) & (x + dx < w)
        places.append(np.where(inside, (y + dy + 2) * w + x + dx, instead))
    return np.stack(places)


def strip_of(plane: np.ndarray, top: int, rows: int) -> np.ndarray:
    """The rows top - 2 ... of a plane [H, W], as a `Plane` holds its values."""
    above = np.full((max(0, 2 - top), plane.shape[1]), GREY)
    return np.concatenate([above.ravel(), plane[max(0, top - 2) : top + rows].ravel(), [GREY]]).astype(np.int64)


class Plane:
    """What is known of a channel: of a strip and the two rows above it, row after row, then one place for what is nowhere."""

    def __init__(self, rows: int, w: int, references: int):
        size, guesses = (rows + 2) * w + 1, 7 + 4 * references
        self.values = np.full(size, GREY)
        self.misses = np.zeros((guesses, size), dtype=np.int16)  # of each guess, in PARTS
        self.miss = np.zeros(size, dtype=np.int64)  # of the blend
        self.fit = Fit(6 + 4 * references)
        self.totals, self.counts = (
            np.floor(2.0 ** (np.arange(len(SIZES) + 1) / 2)).astype(np.int64),
            np.ones(len(SIZES) + 1, np.int64),
        )

    def next_strip(self, w: int) -> None:
        for array in (self.values, self.misses, self.miss):
            array[..., : 2 * w] = array[..., -2 * w - 1 : -1].copy()

    def guesses(
        self, references: list[np.ndarray], at: np.ndarray, near: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Guesses [K, N] in PARTS, features [n, N] of least squares, and the middle of W and N [N] that those are relative to."""
        w, n, nw, ne, ww, nn, nne = PARTS * self.values[near]
        centre, gradient = w + n >> 1, w + n - nw
        guesses = [w, n, gradient, n + ne - nne, w + ne - n, w + ne >> 1]
        features = [x - centre for x in (w, nw, ne, ww, nn, nne)]
        for values in references:
            here, (r_w, r_n, r_nw, r_ne) = PARTS * values[at], PARTS * values[near[:4]]
            middle = r_w + r_n >> 1
            guesses += [here + w - r_w, here + n - r_n, here + gradient - (r_w + r_n - r_nw), here + centre - middle]
            features += [x - middle for x in (here, r_w, r_nw, r_ne)]
        limited = np.stack(features).clip(-LIMIT, LIMIT)
        return np.stack([*guesses, centre + self.fit.predict(limited)]).clip(0, 255 * PARTS), limited, centre

    def expected(
        self, guesses: np.ndarray, earlier: list["Plane"], at: np.ndarray, near: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean [N] in parts of UNIT, index of the scale [N], and the size of the misses around [N] that it belongs to."""
        w, n, nw, ne, ww, nn, _ = self.misses[:, near].astype(np.int64).swapaxes(0, 1)
        weight = (1 << 40) // np.square(w + n + nw + ne + (ww + nn >> 1) + 8)
        mean = logistic.UNIT // PARTS * (weight * guesses).sum(0) // weight.sum(0)

        w, n, nw, ne, ww, nn, _ = self.miss[near]
        spread = np.abs(guesses - (mean * PARTS // logistic.UNIT)).sum(0) // len(guesses)
        activity = 2 * (w + n) + nw + ne + (ww + nn >> 1) + 2 * spread + 2 * sum(other.miss[at] for other in earlier)
        size = np.searchsorted(SIZES, activity // (9 + 2 * len(earlier)) + 1, side="right")
        return mean, np.searchsorted(SCALES, (256 // PARTS * self.totals // self.counts)[size], side="right"), size

    def learn(
        self,
        values: np.ndarray,
        at: np.ndarray,
        guesses: np.ndarray,
        features: np.ndarray,
        centre: np.ndarray,
        mean: np.ndarray,
        size: np.ndarray,
    ) -> None:
        """Take in the values [N] of these places; the rest as `guesses` and `expected` gave it."""
        self.values[at] = values
        self.misses[:, at] = np.abs(guesses - PARTS * values)
        self.miss[at] = miss = np.abs(mean - logistic.UNIT * values) * PARTS // logistic.UNIT
        self.fit.add(features, PARTS * values - centre)
        np.add.at(self.totals, size, miss)
        np.add.at(self.counts, size, 1)
        full = self.counts > KEPT
        self.totals[full] >>= 1
        self.counts[full] >>= 1


class Fit:
    """target ~ weights . features by least squares, where what was seen long ago counts less."""

    def __init__(self, n: int):
        self.moments, self.products, self.weights = np.zeros((n, n), np.int64), np.zeros(n, np.int64), np.zeros(n, np.int64)
        self.seen = 0

    def predict(self, features: np.ndarray) -> np.ndarray:
        return self.weights @ features >> WEIGHT_BITS

    def add(self, features: np.ndarray, target: np.ndarray) -> None:
        self.moments += features @ features.T - (self.moments >> FORGETTING)
        self.products += features @ target - (self.products >> FORGETTING)
        self.seen += 1
        if self.seen % SOLVE_EVERY == 0:
            self.weights = solve(self.moments + RIDGE * np.eye(len(self.products), dtype=np.int64), self.products)
