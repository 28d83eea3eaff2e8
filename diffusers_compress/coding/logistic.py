"""Integers coded under logistic distributions, in integer tables: FORMAT.md, section "Relic", "Symbols".

A quantized value k is distributed as round(x) for x logistic around `mean / UNIT` with scale `2 ** (index / 4 - 5)`, both integers, so
that all machines use the same table. `index` above the tables' last means that low bits of k are sent as they are.
"""

import functools

import numpy as np

from diffusers_compress.coding.range_coder import Decoder, Encoder
from diffusers_compress.errors import Corrupt

UNIT = 512  # parts of a step in which means are given
REACH = 16  # a table has the symbols -REACH .. REACH; the outermost ones open an escape
FRACTIONS = 16  # places of the mean within a step
PER_OCTAVE = 4  # scales
TABLES = 25  # scales 2^-5 ... 2^1
TOTAL = 1 << 16  # sum of a table's frequencies
ESCAPE_BITS = 5
MAX_VALUE = 1 << 20  # |k| stays below


@functools.cache
def tables() -> np.ndarray:
    """Frequencies [TABLES, FRACTIONS, 2 REACH + 1], int64, each at least 1."""
    return frequencies(2.0 ** (np.arange(TABLES) / PER_OCTAVE - 5), FRACTIONS, REACH)


def frequencies(scale: np.ndarray, fractions: int, reach: int, total: int = TOTAL) -> np.ndarray:
    """Of round(x), x logistic with these scales [T] around the middles of the `fractions` parts of a step: the symbols -reach .. reach,
    of which the outermost stand for all beyond. [T, fractions, 2 reach + 1] int64, each at least 1, with this sum."""
    mean = ((np.arange(fractions) + 0.5) / fractions - 0.5)[:, None]
    edges = np.arange(-reach, reach) + 0.5
    cumulative = 1 / (1 + np.exp(-np.clip((edges - mean) / scale[:, None, None], -60, 60)))
    size = 2 * reach + 1
    inner = np.rint(cumulative * (total - size)).astype(np.int64)
    return np.diff(inner, prepend=0, append=total - size) + 1


@functools.cache
def costs() -> np.ndarray:
    """Code lengths of the tables' symbols in bits, shaped like `tables()`."""
    return np.log2(TOTAL) - np.log2(tables())


@functools.cache
def entropies() -> np.ndarray:
    """Bits that a value takes on average, of each table."""
    return (tables() / TOTAL * costs()).sum(-1).mean(-1)


def entropy(index: np.ndarray) -> np.ndarray:
    """Bits that a value takes on average under distributions of these scales, which need not be integers. Float array."""
    beyond = np.maximum(0, index - (TABLES - 1)) / PER_OCTAVE
    return np.interp(index, np.arange(TABLES), entropies(), left=0.0) + beyond


def split(mean, index):
    """(low bits, mean in units of what is left, its whole part, its fraction, table): integer arrays, or Python integers."""
    bits = np.maximum(0, -((TABLES - 1 - index) // PER_OCTAVE))
    left = (mean - (UNIT // 2) * ((1 << bits) - 1)) >> bits  # the low bits' own mean is (2^bits - 1) / 2
    base = (left + UNIT // 2) // UNIT
    fraction = (left + UNIT // 2) % UNIT * FRACTIONS // UNIT
    return bits, base, fraction, index - PER_OCTAVE * bits


def code_length(k: np.ndarray, mean: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Bits that each k takes, as `encode` writes it. Arrays that broadcast -> float array."""
    bits, base, fraction, table = split(mean, index)
    offset = (k >> bits) - base
    excess = np.maximum(0, np.abs(offset) - REACH)
    escape = np.where(np.abs(offset) >= REACH, ESCAPE_BITS + np.floor(np.log2(excess + 1)), 0)
    return costs()[table, fraction, np.clip(offset, -REACH, REACH) + REACH] + bits + escape


def expectation(k, mean, index, points=64):
    """What x, in parts of the step, is on average where it is rounded to k: float array [N]. No file depends on it."""
    scale = 2.0 ** (index / PER_OCTAVE - 5)[:, None]
    x = k[:, None] + (np.arange(points) + 0.5) / points - 0.5
    # The density is e^-far / (1 + e^-far)^2, here over e^-nearest, so that tails keep their shape
    far = np.abs(x - mean[:, None] / UNIT) / scale
    nearest = far.min(1, keepdims=True)
    weight = np.exp(nearest - far)
    weight /= (1 + weight * np.exp(-nearest)) ** 2
    return UNIT * (weight * x).sum(1) / weight.sum(1)


def encode(encoder: Encoder, k: np.ndarray, mean: np.ndarray, index: np.ndarray) -> None:
    """Append the values k [N], int64: first a symbol for each, then low bits, then escapes."""
    bits, base, fraction, table = split(mean, index)
    offset = (k >> bits) - base
    encoder.encode_all(np.clip(offset, -REACH, REACH) + REACH, tables()[table, fraction])
    wide = bits > 0
    encoder.encode_bits_all((k & ((1 << bits) - 1))[wide], bits[wide])
    for excess in (np.abs(offset) - REACH)[np.abs(offset) >= REACH].tolist():
        length = (excess + 1).bit_length() - 1
        encoder.encode_bits(length, ESCAPE_BITS)
        encoder.encode_bits(excess + 1 - (1 << length), length)


def decode(decoder: Decoder, mean: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The values that `encode` wrote, [N] int64. Corrupt for a value that no encoder writes."""
    bits, base, fraction, table = split(mean, index)
    offset = decoder.decode_all(tables()[table, fraction]) - REACH
    low = np.zeros_like(offset)
    wide = bits > 0
    low[wide] = decoder.decode_bits_all(bits[wide])
    for i in np.flatnonzero(np.abs(offset) == REACH):
        length = decoder.decode_bits(ESCAPE_BITS)
        if length > 20:
            raise Corrupt("the payload holds a value that is too large; fetch or encode the file again")
        offset[i] += np.sign(offset[i]) * ((1 << length) - 1 + decoder.decode_bits(length))
    k = ((base + offset) << bits) + low
    if k.size and np.abs(k).max() >= MAX_VALUE:
        raise Corrupt("the payload holds a value that is too large; fetch or encode the file again")
    return k
