import math
import zlib

import numpy as np
import pytest

from diffusers_compress.coding import logistic
from diffusers_compress.coding.logistic import REACH, TOTAL, UNIT
from diffusers_compress.coding.range_coder import Decoder, Encoder
from diffusers_compress.errors import Corrupt


def source(seed, n=4000):
    """Values with laws of all scales, drawn from these laws; a few far off."""
    rng = np.random.default_rng(seed)
    index = rng.integers(0, 61, n)
    mean = rng.integers(-40 * UNIT, 40 * UNIT, n)
    k = np.rint(mean / UNIT + 2.0 ** (index / 4 - 5) * rng.logistic(size=n)).astype(np.int64)
    k[::97] += rng.integers(-3000, 3000, len(k[::97]))
    return k, mean, index


def test_values_come_back_and_take_the_bits_they_should():
    k, mean, index = source(0)
    encoder = Encoder()
    logistic.encode(encoder, k, mean, index)
    logistic.encode(encoder, k[:0], mean[:0], index[:0])
    logistic.encode(encoder, k[:10], mean[:10], index[:10])
    data = encoder.getvalue()
    decoder = Decoder(data)
    assert np.array_equal(logistic.decode(decoder, mean, index), k)
    assert len(logistic.decode(decoder, mean[:0], index[:0])) == 0
    assert np.array_equal(logistic.decode(decoder, mean[:10], index[:10]), k[:10])
    ideal = logistic.code_length(k, mean, index).sum() + logistic.code_length(k[:10], mean[:10], index[:10]).sum()
    assert 0.999 * ideal < 8 * len(data) < 1.001 * ideal + 16


@pytest.mark.parametrize("index", [0, 9, 20, 24, 25, 33, 60])
def test_a_law_costs_its_entropy(index):
    """Bits per value against the differential entropy of a logistic law, ln(scale) + 2 nats, where steps are fine."""
    rng = np.random.default_rng(index)
    scale = 2.0 ** (index / 4 - 5)
    mean = rng.integers(-UNIT, UNIT, 20_000)
    k = np.rint(mean / UNIT + scale * rng.logistic(size=len(mean))).astype(np.int64)
    bits = logistic.code_length(k, mean, index).mean()
    assert bits == pytest.approx(float(logistic.entropy(index)), abs=0.06)
    if index >= 24:
        assert bits == pytest.approx((math.log(scale) + 2) / math.log(2), abs=0.03)


def test_tables_are_those_of_the_format():
    tables = logistic.tables()
    assert tables.min() == 1 and (tables.sum(-1) == TOTAL).all() and tables.shape == (25, 16, 2 * REACH + 1)
    assert zlib.crc32(tables.astype("<i4").tobytes()) == 0x7F72DD2A
    assert np.abs(tables - tables[:, ::-1, ::-1]).max() <= 2  # a mean a little below is one a little above, mirrored


def test_expectation_is_the_mean_within_the_cell():
    rng = np.random.default_rng(0)
    for index, mean in ((12, 100), (20, -300), (28, 1300)):
        x = mean / UNIT + 2.0 ** (index / 4 - 5) * rng.logistic(size=400_000)
        k = np.rint(x).astype(np.int64)
        for value in (0, 1, round(mean / UNIT)):
            inside = x[k == value]
            expected = logistic.expectation(np.array([value]), np.array([mean]), np.array([index]))[0] / UNIT
            assert abs(expected - value) <= 0.5
            if len(inside) > 500:
                assert expected == pytest.approx(inside.mean(), abs=4 * inside.std() / len(inside) ** 0.5 + 0.002)


def test_expectation_far_from_the_mean_stays_in_the_cell():
    expected = logistic.expectation(np.array([0, 500]), np.array([500 * UNIT, 0]), np.array([0, 0])) / UNIT
    assert 0.4 < expected[0] < 0.5 and 499.5 < expected[1] < 499.6


def test_garbage_gives_values_or_corrupt():
    rng = np.random.default_rng(0)
    mean, index = np.zeros(300, dtype=np.int64), rng.integers(0, 61, 300)
    for _ in range(100):
        try:
            assert len(logistic.decode(Decoder(rng.bytes(40)), mean, index)) == 300
        except Corrupt:
            pass
    encoder = Encoder()
    encoder.encode_all(np.array([2 * REACH]), logistic.tables()[0, :1])
    encoder.encode_bits(21, logistic.ESCAPE_BITS)
    with pytest.raises(Corrupt, match="too large"):
        logistic.decode(Decoder(encoder.getvalue()), mean[:1], mean[:1])
