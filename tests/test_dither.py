"""Universal quantization as a channel: exact noise, about the bits that theory says, and a grid that machines agree on."""

import math

import numpy as np
import pytest

from diffusers_compress.coding.channels import dither
from diffusers_compress.errors import Corrupt


def sent(mean, scale, x, step=1):
    """(bytes, symbols, places, u)"""
    u = dither.dither(len(x), step)
    k = np.floor(x + u / dither.UNIT + 0.5).astype(np.int64)
    places = dither.places(mean + u / dither.UNIT, scale)
    whole, row = dither.rounded(places, dither.nudge_of([places]))
    return dither.stream(k - whole, row, dither.tables()), k, (whole, row), u


def logistic_bits(k, mean, scale):
    def cumulative(x):
        return 1 / (1 + np.exp(-np.clip(x, -500, 500)))

    mass = cumulative((k + 0.5 - mean) / scale) - cumulative((k - 0.5 - mean) / scale)
    return -np.log2(np.maximum(mass, 1e-300)).sum()


@pytest.mark.parametrize(("scale", "overhead"), [(0.03, 0.02), (0.2, 0.003), (1.0, 0.002), (3.0, 0.002)])
def test_symbols_come_back_for_about_their_information(scale, overhead):
    rng = np.random.default_rng(0)
    mean, scales = 20 * rng.normal(size=12288), np.full(12288, scale)
    x = mean + scale * rng.logistic(size=12288)
    data, k, (whole, row), u = sent(mean, scales, x)
    assert np.array_equal(whole + dither.symbols(data, row, dither.tables()), k)
    ideal = logistic_bits(k, mean + u / dither.UNIT, scales)
    assert ideal <= 8 * len(data) * 1.001 and 8 * len(data) <= (1 + overhead) * ideal + 16


def test_the_noise_is_uniform_and_tells_nothing_of_the_value():
    x = 3 * np.random.default_rng(0).normal(size=20000)
    _, k, _, u = sent(np.zeros(20000), np.ones(20000), x)
    noise = k - u / dither.UNIT - x
    assert np.abs(noise).max() <= 0.5
    assert abs(noise.var() * 12 - 1) < 0.03 and abs(np.corrcoef(noise, x - np.floor(x))[0, 1]) < 0.03
    assert np.histogram(noise, 10, (-0.5, 0.5))[0].min() > 1800


def test_values_far_from_the_mean_are_escaped():
    mean, x = np.zeros(6), np.array([0.0, 30, -24, 5000, -(2.0**19), 23])
    data, k, (whole, row), _ = sent(mean, np.full(6, 0.1), x)
    assert np.array_equal(whole + dither.symbols(data, row, dither.tables()), k)


def test_random_bytes_are_symbols_or_corrupt():
    rng = np.random.default_rng(1)
    row = rng.integers(0, len(dither.tables()), 200)
    kinds = set()
    for _ in range(200):
        try:
            found = dither.symbols(rng.bytes(60), row, dither.tables())
            kinds.add(found.dtype)
        except Corrupt:
            kinds.add(Corrupt)
    assert np.dtype("int64") in kinds and kinds <= {np.dtype("int64"), Corrupt}


def test_rounding_is_alike_for_all_whose_numbers_differ_by_less_than_the_margin():
    """Half of the places lie on an edge, where half of the machines would round the other way."""
    rng = np.random.default_rng(0)
    mean, scale = rng.normal(size=5000), 2 ** rng.uniform(-9, 4, 5000)
    mean[::2] = np.round(64 * mean[::2]) / 64
    places = dither.places(mean, scale)
    nudge = dither.nudge_of([places])
    assert nudge > 0 and dither.nudge_of([]) == 0 and dither.nudge_of([dither.places(np.array([0.013]), np.array([0.9]))]) == 0
    expected = dither.rounded(places, nudge)
    for sign in (-1, 1):
        moved = places + sign * dither.MARGIN / 2
        assert all(np.array_equal(a, b) for a, b in zip(dither.rounded(moved, nudge), expected))
        assert not np.array_equal(dither.rounded(moved, 0)[0], dither.rounded(places, 0)[0]) or sign == 1
    assert dither.check_of(*expected) != dither.check_of(expected[0] + 1, expected[1])
    assert expected[1].min() >= 0 and expected[1].max() < len(dither.tables())


def test_the_tables_are_those_of_the_format():
    tables = dither.tables()
    assert dither.checksum() == 0x44EEA2A6
    assert min(row.min() for row in tables) >= 1 and {row.sum() for row in tables} == {1 << 20}
    # From the formula of FORMAT.md alone
    for i, f, r in (40, 5, 4), (72, 63, 24):
        z = [(j - r - 0.5 - ((f + 0.5) / 64 - 0.5)) / 2 ** (i / 8 - 7) for j in range(1, 2 * r + 1)]
        c = [0, *(round((1048575 - 2 * r) / (1 + math.exp(-x))) for x in z), 1048575 - 2 * r]
        assert tables[64 * i + f].tolist() == [1 + b - a for a, b in zip(c, c[1:])]
