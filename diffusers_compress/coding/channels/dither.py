"""Universal quantization as a channel: the receiver gets x plus uniform noise, exactly, for about the bits that it tells.

Ziv 1985; Agustsson & Theis 2020, "Universally quantized neural compression". With u shared and uniform in (-1/2, 1/2) the sender
rounds x + u to an integer k, and both ends hold k - u. The receiver expects x + noise to be logistic around a mean, convolved
with that noise, so k has the probability that this logistic puts between k - 1/2 and k + 1/2, moved by u. Everything is in units
of a step, FORMAT.md, section "UQDM".

What a network says of mean and scale is put on a grid, and a table of integers stands for each point of the grid. Both ends
compute the network, in float64; the sender moves the grid a little where a value lies so near a rounding edge that another
machine could round otherwise.
"""

import functools
import math
import zlib
from collections.abc import Sequence

import numpy as np

from diffusers_compress.coding import randomness
from diffusers_compress.coding.logistic import frequencies
from diffusers_compress.coding.range_coder import Decoder, Encoder
from diffusers_compress.errors import Corrupt

UNIT = 512  # parts of a step in which the dither is given
REACH = 24  # a table has the symbols -R .. R with R at most REACH; the outermost ones open an escape
FRACTIONS = 64  # places of the mean within a step
PER_OCTAVE, LOWEST, TABLES = 8, -7, 73  # scales 2^-7 ... 2^2
TOTAL = 1 << 20  # sum of a table's frequencies: each symbol has 1 at least, which should cost little
NUDGES = 256
MARGIN = 2.0**-26  # of a point of the grid: values nearer to an edge may be rounded otherwise elsewhere
ESCAPE_BITS, LARGEST_ESCAPE = 5, 20


def dither(n: int, step: int) -> np.ndarray:
    """Shared u of n positions in parts of the step: odd numbers within +-255, [n] int64."""
    return (2 * (randomness.words(n, randomness.DITHER, step) % 256) - 255).numpy()


# ---------------------------------------------------------------------------------------------------------------------- grid


def places(mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Mean and scale of k, in steps, as places on the grid: [2, N] float64, not yet rounded down."""
    index = (np.log2(scale) - LOWEST) * PER_OCTAVE + 0.5
    return np.stack([(mean + 0.5) * FRACTIONS, index.clip(0.5, TABLES - 0.5)])


def nudge_of(places: list[np.ndarray]) -> int:
    """The first nudge with which no place is near an edge, so that all machines round alike; that of the widest margin if none
    is."""
    best = -1.0, 0
    for nudge in range(NUDGES):
        moved = [place + nudge / NUDGES for place in places]
        margin = min((float(np.abs(place - np.rint(place)).min()) for place in moved), default=1.0)
        best = max(best, (margin, -nudge))
        if margin > MARGIN:
            break
    return -best[1]


def rounded(places: np.ndarray, nudge: int) -> tuple[np.ndarray, np.ndarray]:
    """(whole part of the mean, row of `tables`): [N] int64 each."""
    place, index = np.floor(places + nudge / NUDGES).astype(np.int64)
    return place // FRACTIONS, index.clip(0, TABLES - 1) * FRACTIONS + place % FRACTIONS


def check_of(whole: np.ndarray, row: np.ndarray) -> int:
    """16 bits by which a receiver sees that its network and its tables say the same."""
    return zlib.crc32(np.stack([whole, row]).astype("<i4").tobytes(), checksum()) & 0xFFFF


@functools.cache
def checksum() -> int:
    """CRC-32 of the tables."""
    return zlib.crc32(np.concatenate(tables()).astype("<i4").tobytes())


@functools.cache
def tables() -> list[np.ndarray]:
    """TABLES * FRACTIONS rows of frequencies [2 R + 1], int64. A narrow law has few symbols, since the least frequency of each costs bits."""
    scales = 2.0 ** (np.arange(TABLES) / PER_OCTAVE + LOWEST)
    reaches = [min(REACH, math.ceil(12 * scale) + 1) for scale in scales]
    return [row for scale, reach in zip(scales, reaches) for row in frequencies(scale[None], FRACTIONS, reach, TOTAL)[0]]


# ------------------------------------------------------------------------------------------------------------------- symbols


def stream(offset: np.ndarray, row: np.ndarray, tables: Sequence[np.ndarray]) -> bytes:
    """Offsets [N], each under its row of the tables, [2 R + 1] each, as bytes: table after table, then what lies outside of -R ..
    R."""
    reach, encoder = reaches(tables)[row], Encoder()
    symbols = offset.clip(-reach, reach) + reach
    for table, positions in _by_row(row):
        encoder.encode_run(symbols[positions], tuple(tables[table].tolist()))
    for excess in (np.abs(offset) - reach)[np.abs(offset) >= reach].tolist():
        length = (excess + 1).bit_length() - 1
        encoder.encode_bits(length, ESCAPE_BITS)
        encoder.encode_bits(excess + 1 - (1 << length), length)
    return encoder.getvalue(ended=True)


def symbols(data: bytes, row: np.ndarray, tables: Sequence[np.ndarray]) -> np.ndarray:
    """The offsets that `stream` wrote, [N] int64. Corrupt for what no encoder writes."""
    reach, decoder = reaches(tables)[row], Decoder(data)
    offset = np.zeros(len(row), dtype=np.int64)
    for table, positions in _by_row(row):
        offset[positions] = decoder.decode_run(len(positions), tuple(tables[table].tolist())) - reach[positions]
    for i in np.flatnonzero(np.abs(offset) == reach):
        length = decoder.decode_bits(ESCAPE_BITS)
        if length > LARGEST_ESCAPE:
            raise Corrupt("the payload holds a value that is too large; fetch or encode the file again")
        offset[i] += np.sign(offset[i]) * ((1 << length) - 1 + decoder.decode_bits(length))
    return offset


def reaches(tables: Sequence[np.ndarray]) -> np.ndarray:
    """R of each row: [M] int64."""
    return np.array([len(table) // 2 for table in tables])


def _by_row(row):
    """(row, positions that have it) in ascending order of both."""
    order = np.argsort(row, kind="stable")
    starts = np.flatnonzero(np.diff(row[order], prepend=-1))
    return zip(row[order][starts].tolist(), np.split(order, starts[1:]))
