import math
import random

import numpy as np
import pytest

from diffusers_compress.coding.range_coder import Decoder, Encoder
from diffusers_compress.errors import Corrupt


def random_source(seed, length):
    """Symbols with a frequency table each -> [(symbol, table)]."""
    rng = random.Random(seed)
    tables = [tuple(rng.randint(1, rng.choice([2, 100, 10_000])) for _ in range(rng.randint(2, 20))) for _ in range(length)]
    return [(rng.choices(range(len(table)), table)[0], table) for table in tables]


def encode(source):
    encoder = Encoder()
    for symbol, table in source:
        encoder.encode(symbol, table)
    return encoder.getvalue()


@pytest.mark.parametrize("length", [0, 1, 2, 10, 100, 1000])
@pytest.mark.parametrize("padding", [0x00, 0x55, 0xFF])
def test_symbols_come_back_whatever_follows_the_data(length, padding):
    source = random_source(length, length)
    decoder = Decoder(encode(source), padding)
    assert [decoder.decode(table) for _, table in source] == [symbol for symbol, _ in source]


@pytest.mark.parametrize("length", [1, 10, 100, 1000])
def test_size_is_the_information_and_at_most_two_bytes_more(length):
    source = random_source(length + 1, length)
    information = sum(math.log2(sum(table) / table[symbol]) for symbol, table in source)
    assert information - 0.01 * length <= 8 * len(encode(source)) <= information + 16 + 0.01 * length


def test_nothing_takes_no_bytes():
    assert Encoder().getvalue() == b""


@pytest.mark.parametrize("length", range(1, 40))
def test_carries_across_words_are_resolved(length):
    # Always the symbol in the middle: the interval keeps straddling 1/2, so that the first bit stays open.
    source = [(1, (2**20 - 1, 2, 2**20 - 1))] + [(1, (3, 2, 3))] * length
    for padding in (0x00, 0xFF):
        decoder = Decoder(encode(source), padding)
        assert [decoder.decode(table) for _, table in source] == [1] * (length + 1)


def test_raw_bits_cost_what_they_hold():
    rng = random.Random(0)
    values = [(rng.getrandbits(bits), bits) for bits in list(range(24)) * 20]
    encoder = Encoder()
    for value, bits in values:
        encoder.encode_bits(value, bits)
    data = encoder.getvalue()
    decoder = Decoder(data)
    assert [decoder.decode_bits(bits) for _, bits in values] == [value for value, _ in values]
    assert len(data) <= sum(bits for _, bits in values) / 8 + 2


def test_the_bytes_are_those_of_the_format():
    encoder = Encoder()
    for symbol in [0, 1, 2, 2, 1, 0, 2, 2]:
        encoder.encode(symbol, (1, 2, 5))
        encoder.encode_bits(symbol, 3)
    assert encoder.getvalue().hex() == "00b25bd392"


def test_an_end_that_only_zeros_follow_is_shorter_now_and_then():
    rng, saved = random.Random(0), 0
    for length in range(300):
        source = [(rng.randrange(3), (1, 2, 5)) for _ in range(length)]
        encoder = Encoder()
        for symbol, table in source:
            encoder.encode(symbol, table)
        data, any_end = encoder.getvalue(ended=True), encoder.getvalue()
        decoder = Decoder(data)
        assert [decoder.decode(table) for _, table in source] == [symbol for symbol, _ in source]
        assert len(any_end) - 1 <= len(data) <= len(any_end)
        saved += len(any_end) - len(data)
    assert saved > 30


def test_an_early_end_is_noticed():
    table, rng = (1, 2, 5), random.Random(0)
    encoder, symbols = Encoder(), [rng.randrange(3) for _ in range(4000)]
    for symbol in symbols:
        encoder.encode(symbol, table)
    for data in encoder.getvalue(), encoder.getvalue(ended=True):
        for padding in (0x00, 0xFF):
            decoder = Decoder(data, padding)
            for symbol in symbols:
                assert decoder.decode(table) == symbol
                decoder.check_end()
        decoder = Decoder(data[:200])
        with pytest.raises(Corrupt, match="ends early"):
            for _ in symbols:
                decoder.decode(table)
                decoder.check_end()


def test_garbage_gives_symbols_or_corrupt():
    rng = random.Random(0)
    corrupt = 0
    for _ in range(300):
        decoder = Decoder(rng.randbytes(rng.randint(0, 30)))
        for _, table in random_source(1, 100):
            try:
                assert 0 <= decoder.decode(table) < len(table)
            except Corrupt:
                corrupt += 1
                break
    with pytest.raises(Corrupt):
        Decoder(b"\xff" * 16).decode((1, 1, 1))
    assert corrupt < 300


@pytest.mark.parametrize("table", [(3,), (1, 0), (5, -1, 2)])
def test_impossible_tables_are_named(table):
    with pytest.raises(ValueError, match="frequencies"):
        Encoder().encode(0, table)


def test_many_at_once_are_one_after_the_other():
    rng = random.Random(3)
    tables = [tuple(rng.randint(1, 50) for _ in range(7)) for _ in range(200)]
    symbols = [rng.randrange(7) for _ in tables]
    bits = [rng.randint(1, 20) for _ in tables]
    values = [rng.getrandbits(each) for each in bits]
    single, many = Encoder(), Encoder()
    for symbol, table in zip(symbols, tables):
        single.encode(symbol, table)
    for value, each in zip(values, bits):
        single.encode_bits(value, each)
    many.encode_all(np.array(symbols), np.array(tables))
    many.encode_bits_all(np.array(values), np.array(bits))
    many.encode_all(np.zeros(0, dtype=int), np.zeros((0, 7), dtype=int))
    assert many.getvalue() == single.getvalue()
    decoder = Decoder(many.getvalue())
    assert decoder.decode_all(np.array(tables)).tolist() == symbols
    assert decoder.decode_bits_all(np.array(bits)).tolist() == values
    assert len(decoder.decode_all(np.zeros((0, 7), dtype=int))) == 0
