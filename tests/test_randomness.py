import zlib

import numpy as np
import pytest
import torch

from diffusers_compress.coding import randomness
from diffusers_compress.coding.randomness import normal_table, normals, permutation, philox, signs, words

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    "counter, key, expected",
    [  # Random123's known answers for philox4x32, 10 rounds
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_vectors(counter, key, expected):
    assert tuple(philox(torch.tensor(counter), key).tolist()) == expected


def test_words_are_the_words_of_successive_counters():
    counter = torch.tensor([[index, 7, 3, 0] for index in range(3)])
    expected = philox(counter, randomness.KEY).flatten()
    assert torch.equal(words(12, stream=3, step=7), expected)


@pytest.mark.parametrize("draw", [words, normals])
@pytest.mark.parametrize("offset", [0, 1, 2, 3, 5, 8, 1001])
def test_an_offset_continues_the_stream(draw, offset):
    whole = draw(offset + 17, 2, step=5)
    assert torch.equal(draw(17, 2, step=5, offset=offset), whole[offset:])


def test_a_long_stream_does_not_repeat_itself():
    assert not torch.equal(words(8, 0, offset=0), words(8, 0, offset=4 * 2**32))


def test_normal_table_is_the_one_of_the_format():
    integers = (normal_table(torch.device("cpu")) * 65536).numpy()
    assert np.array_equal(integers, integers.astype("<i4"))
    assert zlib.crc32(integers.astype("<i4").tobytes()) == 0x0316F94A


def test_normal_table_is_odd_rising_and_of_unit_variance():
    table = normal_table(torch.device("cpu")).double()
    assert torch.equal(table, -table.flip(0))
    assert (table.diff() >= 0).all()
    assert abs(table.square().mean().item() - 1) < 1e-4


def test_normals_use_the_low_half_word_first():
    table = normal_table(torch.device("cpu"))
    word = words(1, 1, step=2)
    assert torch.equal(normals(2, 1, step=2), torch.stack([table[word & 0xFFFF], table[word >> 16]]).flatten())


def test_normals_are_normal():
    z = normals(200_000, randomness.START).double()
    for moment, expected, spread in [(1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)]:
        assert abs(z.pow(moment).mean().item() - expected) < 5 * spread / 200_000**0.5


@pytest.mark.parametrize("n", [1, 2, 5, 1000])
def test_permutation_holds_every_position_once(n):
    assert torch.equal(permutation(n, 0).sort().values, torch.arange(n))


def test_permutation_sorts_the_words():
    key = words(1000, randomness.PERMUTATION, 4)
    assert (key[permutation(1000, 4)].diff() >= 0).all()


def test_signs_are_the_bits_of_the_words():
    word = words(2, randomness.SIGNS, 9).tolist()
    expected = [1.0 - 2.0 * (word[i // 32] >> i % 32 & 1) for i in range(40)]
    assert signs(40, 9).tolist() == expected


def test_steps_and_streams_differ():
    drawn = [words(4, stream, step).tolist() for stream in range(6) for step in range(3)]
    assert len({tuple(d) for d in drawn}) == 18


@pytest.mark.gpu
def test_a_gpu_gives_the_same_numbers():
    assert torch.equal(normals(10_001, 3, 2, "cuda").cpu(), normals(10_001, 3, 2))
    assert torch.equal(permutation(100_000, 2, "cuda").cpu(), permutation(100_000, 2))
    assert torch.equal(signs(1001, 2, "cuda").cpu(), signs(1001, 2))
