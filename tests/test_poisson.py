import math
import random
import zlib

import numpy as np
import pytest
import torch

from diffusers_compress.coding import index_payload
from diffusers_compress.coding.channels import poisson


def random_shift(n, kl, seed=0):
    """Shift of `kl` bits in a random direction -> [1, n]."""
    m = torch.randn(1, n, generator=torch.Generator().manual_seed(seed))
    return m * math.sqrt(2 * math.log(2) * kl) / m.norm()


def unused(batch, n):
    """Excess and rank, which tell this channel nothing but its shape."""
    return torch.zeros(batch, n), torch.zeros(batch, n, dtype=torch.int64)


def encode(shift, budget, step):
    return poisson.encode(shift, *unused(*shift.shape), budget, step)


def decode(messages, n, budget, step):
    return poisson.decode(messages, *unused(len(messages), n), budget, step)


def random_messages(budgets, seed=0):
    rng = random.Random(seed)
    counts = [
        [2 ** index_payload.octave_count(bits) - 1 if budget else 1 for bits in index_payload.bits_of_chunks(budget)]
        for budget in budgets
    ]
    return [np.array([rng.randrange(count) for count in step]) for step in counts]


@pytest.mark.parametrize("n, budget", [(1, 0), (1, 6), (3, 30), (100, 0), (100, 1), (101, 7), (1000, 20)])
def test_decoder_gives_the_encoders_sample(n, budget):
    messages, y = encode(torch.cat([random_shift(n, budget, seed) for seed in (0, 1)]), budget, step=3)
    assert len(messages) == 2 and y.shape == (2, n) and y.dtype == torch.float32
    assert torch.equal(decode(messages, n, budget, step=3), y)


def test_pictures_together_are_pictures_one_at_a_time():
    shifts = torch.cat([random_shift(300, 20, seed) for seed in range(3)])
    messages, y = encode(shifts, 20, step=1)
    for i in range(3):
        message, sample = encode(shifts[i : i + 1], 20, step=1)
        assert np.array_equal(message[0], messages[i]) and torch.equal(sample[0], y[i])


def test_what_is_expected_of_the_error_changes_nothing():
    assert not poisson.wide
    messages, y = encode(random_shift(300, 20), 20, step=1)
    other = poisson.encode(random_shift(300, 20), torch.rand(1, 300), torch.arange(300)[None], 20, step=1)
    assert np.array_equal(other[0], messages) and torch.equal(other[1], y)


def test_compressing_twice_gives_the_same_message():
    shift = random_shift(300, 20)
    assert np.array_equal(encode(shift, 20, 1)[0], encode(shift, 20, 1)[0])


@pytest.mark.parametrize("budget, bits", [(0, [0]), (1, [1]), (14, [14]), (15, [7, 8]), (43, [10, 11, 11, 11])])
def test_chunks_share_the_budget_evenly(budget, bits):
    assert list(index_payload.bits_of_chunks(budget)) == bits


def test_sample_is_that_of_the_format():
    y = (decode(np.array([[5, 100, 3]]), 1000, 40, step=11) * 65536).numpy().astype("<i4")
    assert zlib.crc32(y.tobytes()) == 0x432B88C6


def test_shift_and_rate_are_the_published_ones():
    n, kl, trials = 64, 10, 150
    shifts = [random_shift(n, kl, seed) for seed in range(trials)]
    sent = [encode(shift, kl, step) for step, shift in enumerate(shifts)]
    arrived = torch.tensor([((y * shift).sum() / shift.square().sum()).item() for (_, y), shift in zip(sent, shifts)])
    assert 0.80 < arrived.mean() < 0.92  # too few candidates: not 1
    payload = index_payload.pack([messages[0] for messages, _ in sent], [kl] * trials)
    assert abs(8 * len(payload) / trials - index_payload.cost(kl)) < 0.1 * kl


def test_other_directions_are_standard_normal():
    shifts = [random_shift(500, 8, seed) for seed in range(40)]
    residuals = []
    for step, shift in enumerate(shifts):
        y = encode(shift, 8, step)[1]
        residuals.append((y - (y * shift).sum() * shift / shift.square().sum()).double())
    z = torch.stack(residuals)
    for moment, expected, spread in [(1, 0, 1), (2, 1, 2**0.5), (4, 3, 96**0.5)]:
        assert abs(z.pow(moment).mean().item() - expected) < 6 * spread / z.numel() ** 0.5


BUDGETS = [20, 0, 14, 100, 3]


def test_messages_come_back():
    messages = random_messages(BUDGETS)
    payload = index_payload.pack(messages, BUDGETS)
    assert index_payload.payload_bytes(BUDGETS, payload) == index_payload.payload_bytes(BUDGETS, payload[:3]) == len(payload)
    unpacked = index_payload.unpack(payload, BUDGETS)
    assert all(np.array_equal(a, b) for a, b in zip(unpacked, messages, strict=True))


def test_a_cut_payload_gives_true_whole_steps():
    for seed in range(20):
        messages = random_messages(BUDGETS, seed)
        payload = index_payload.pack(messages, BUDGETS)
        held = [index_payload.unpack(payload[:length], BUDGETS) for length in range(len(payload) + 1)]
        for steps in held:
            assert all(np.array_equal(a, b) for a, b in zip(steps, messages))
        assert [len(steps) for steps in held] == sorted(len(steps) for steps in held)
        assert len(held[0]) == 0 and 2 <= len(held[len(payload) // 2]) < 5 and len(held[-1]) == 5


def test_garbage_and_absurd_budgets_give_fewer_steps():
    rng = random.Random(0)
    for _ in range(100):
        budgets = [14, 1, 10**18, 30]
        held = index_payload.unpack(rng.randbytes(rng.randint(0, 40)), budgets)
        assert len(held) <= 2


@pytest.mark.parametrize("bits", range(1, 15))
def test_octave_frequencies_follow_the_zipf_law(bits):
    frequencies = index_payload.octave_frequencies(bits)
    assert len(frequencies) == bits + 2 and min(frequencies) >= 1
    expected = [65536 * 2 ** (-octave / (bits + 1.5)) for octave in range(bits + 2)]
    assert np.allclose(frequencies, expected, rtol=1e-3)


def test_a_message_of_another_length_is_refused():
    with pytest.raises(ValueError, match="message of 1 chunks: a budget of 20 has 2"):
        index_payload.pack([np.array([1])], [20])


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 2), (2,)])
def test_messages_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="messages of shape .*: 1 of 2 chunks are wanted"):
        poisson.decode(np.zeros(shape, dtype=np.int64), *unused(1, 100), 20, step=0)


@pytest.mark.parametrize("kl", [-1.0, math.nan, math.inf])
def test_impossible_kl_is_named(kl):
    with pytest.raises(ValueError, match="kl"):
        poisson.budget(kl)
