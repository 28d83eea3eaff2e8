import math
import zlib
from statistics import NormalDist

import numpy as np
import pytest
import torch

from diffusers_compress.channels import trellis


def random_shift(n, kl, seed=0):
    """Shift of `kl` bits in a random direction -> [n]."""
    m = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    return m * math.sqrt(2 * math.log(2) * kl) / m.norm()


def achieved(y, shift):
    """Shift that arrived, along the wanted one and relative to it."""
    return (y @ shift / shift.square().sum()).item()


@pytest.mark.parametrize("n, budget", [(1, 0), (1, 100), (4, 3), (4, 200), (2, 14), (100, 1), (9, 15), (999, 16), (50_000, 41)])
def test_decoder_gives_the_encoders_sample(n, budget):
    message, y = trellis.encode(random_shift(n, 5.0), budget, step=3)
    assert message.shape == (budget,) and set(message.tolist()) <= {0, 1}
    assert y.shape == (n,) and y.dtype == torch.float32
    assert torch.equal(trellis.decode(message, n, budget, step=3), y)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("budget", [0, 1, 13, 14, 15, 16, 17, 99, 5000])
def test_any_message_decodes(n, budget):
    message = np.random.default_rng(budget).integers(0, 2, budget, dtype=np.uint8)
    y = trellis.decode(message, n, budget, step=0)
    assert y.shape == (n,) and y.isfinite().all() and y.abs().max() < 5


def test_a_message_of_another_length_is_refused():
    with pytest.raises(ValueError, match="message of 5 bits: its budget is 6"):
        trellis.decode(np.zeros(5, np.uint8), 10, 6, step=0)


@pytest.mark.parametrize("budget", [1, 2, 3, 14, 15, 16, 17, 100, 1001])
@pytest.mark.parametrize("n", [1, 10, 1000])
def test_segments_are_consecutive_and_read_the_whole_message(n, budget):
    ends, segment = trellis._segments(n, budget)
    assert ends[0] == min(budget, 14) and ends[-1] == budget and ((ends.diff() >= 1) & (ends.diff() <= 2)).all()
    assert (segment.diff() >= 0).all() and segment[-1] < len(ends)


def test_encoder_finds_the_best_message():
    shift = random_shift(200, 8.0)
    message, y = trellis.encode(shift, 7, step=1)
    every = [np.array([i >> k & 1 for k in range(6, -1, -1)], dtype=np.uint8) for i in range(128)]
    products = [(trellis.decode(other, 200, 7, step=1) @ shift).item() for other in every]
    assert np.array_equal(message, every[int(np.argmax(products))])


def test_encoder_finds_the_best_of_the_last_bits():
    shift = random_shift(400, 15.0)
    message, y = trellis.encode(shift, 21, step=1)  # the last segment reads a single bit
    for i in range(32):
        other = message.copy()
        other[-5:] = [i >> k & 1 for k in range(5)]
        assert (trellis.decode(other, 400, 21, step=1) @ shift).item() <= (y @ shift).item() + 1e-3


def philox_word(position, stream, step):
    """The generator again, from the text of the format, in plain integers."""
    a, b, c, d = position // 4, step, stream, 0
    k, m = 0x44696666, 0x436F6D70
    for _ in range(10):
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = q >> 32 ^ b ^ k, q % 2**32, p >> 32 ^ d ^ m, p % 2**32
        k, m = (k + 0x9E3779B9) % 2**32, (m + 0xBB67AE85) % 2**32
    return (a, b, c, d)[position % 4]


@pytest.mark.parametrize("n, budget", [(1, 20), (5, 3), (100, 0), (300, 14), (300, 75), (400, 16)])
def test_a_decoder_written_from_the_format_agrees(n, budget):
    step = 6
    bits = [i * i % 5 % 2 for i in range(budget)]
    quantile = [NormalDist().inv_cdf((i + 0.5) / 65536) for i in range(65536)]
    ends = [*range(14, budget, 2), budget]
    weights = [12 + max(0, end - 14) for end in ends]
    bounds = [n * weight // weights[-1] for weight in weights]
    order = sorted(range(n), key=lambda i: philox_word(i, 1, step))
    y = [0.0] * n
    for i in range(n):
        j = sum(bound <= i for bound in bounds)
        state = int("".join(map(str, [0] * 14 + bits[: ends[j]]))[-14:], 2)
        position = (state + i) % 2**14
        half = philox_word(position // 2, 3, step) >> 16 * (position % 2) & 0xFFFF
        sign = -1 if philox_word(i // 32, 2, step) >> i % 32 & 1 else 1
        y[order[i]] = sign * round(quantile[half] * 65536) / 65536
    assert trellis.decode(np.array(bits, dtype=np.uint8), n, budget, step).tolist() == y


def test_message_and_sample_are_those_of_the_format():
    message = (np.arange(75) % 7 % 2).astype(np.uint8)
    y = (trellis.decode(message, 1000, 75, step=11) * 65536).numpy().astype("<i4")
    assert zlib.crc32(y.tobytes()) == 0xB559AFED


@pytest.mark.parametrize("kl, trials", [(5, 60), (20, 40), (100, 12), (400, 4)])
def test_the_wanted_shift_arrives(kl, trials):
    budget = trellis.budget(kl)
    shifts = [random_shift(3000, trellis.kl(budget), seed) for seed in range(trials)]
    mean = np.mean([achieved(trellis.encode(shift, budget, step)[1], shift) for step, shift in enumerate(shifts)])
    assert abs(mean - 1) < 0.05


def test_a_smooth_shift_arrives_as_well():
    n, budget = 3000, trellis.budget(100)
    smooth = torch.exp(2 * torch.sin(torch.arange(n) / n * 6))
    smooth *= math.sqrt(2 * math.log(2) * trellis.kl(budget)) / smooth.norm()
    assert abs(np.mean([achieved(trellis.encode(smooth, budget, step)[1], smooth) for step in range(8)]) - 1) < 0.05


def test_overhead_at_100_bits_is_at_most_an_eighth():
    assert 100 < trellis.budget(100) <= 112


def test_other_directions_are_standard_normal():
    n, trials = 2000, 30
    shifts = [random_shift(n, 100.0, seed) for seed in range(trials)]
    residuals = []
    for step, shift in enumerate(shifts):
        y = trellis.encode(shift, trellis.budget(100), step)[1]
        direction = shift / shift.norm()
        residuals.append((y - (y @ direction) * direction).double())
    z = torch.stack(residuals)
    samples = z.numel()
    for moment, expected, spread in [(1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)]:
        assert abs(z.pow(moment).mean().item() - expected) < 6 * spread / samples**0.5
    # no trace of the shift's size or of neighbours
    m = torch.stack(shifts).double()
    assert abs((z.square() * (m.square() - m.square().mean())).mean().item()) < 6 * 2**0.5 * m.square().std() / samples**0.5
    assert abs((z[:, 1:] * z[:, :-1]).mean().item()) < 6 / samples**0.5
    # steps are independent of one another
    assert abs((z[1:] * z[:-1]).mean().item()) < 6 / samples**0.5


@pytest.mark.parametrize("kl", [0, 0.3, 1, 5, 11, 11.5, 12, 100, 3000])
def test_budget_is_the_inverse_of_kl(kl):
    budget = trellis.budget(kl)
    assert isinstance(budget, int)
    assert all(abs(trellis.kl(budget) - kl) <= abs(trellis.kl(other) - kl) + 0.1 for other in (max(budget - 1, 0), budget + 1))


def test_kl_rises_and_stays_below_the_budget():
    values = [trellis.kl(budget) for budget in range(200)]
    assert values[0] == 0 and all(a < b for a, b in zip(values, values[1:])) and all(v <= r for r, v in enumerate(values))


@pytest.mark.parametrize("kl", [-1.0, math.nan, math.inf])
def test_impossible_kl_is_named(kl):
    with pytest.raises(ValueError, match="kl"):
        trellis.budget(kl)


def test_payload_holds_the_bits_and_a_cut_one_the_whole_steps():
    rng = np.random.default_rng(0)
    budgets = [5, 0, 17, 100, 3]
    messages = [rng.integers(0, 2, budget, dtype=np.uint8) for budget in budgets]
    payload = trellis.pack(messages, budgets)
    assert len(payload) == trellis.payload_bytes(budgets) == 16
    for length in range(17):
        held = trellis.unpack(payload[:length], budgets)
        assert len(held) == sum(sum(budgets[: i + 1]) <= 8 * length for i in range(5))
        assert all(np.array_equal(a, b) for a, b in zip(held, messages))


def test_absurd_budgets_cost_nothing():
    assert trellis.unpack(b"\0" * 10, [3, 2**60, 5])[1:] == []


def test_no_steps():
    assert trellis.pack([], []) == b"" and trellis.unpack(b"", []) == []


def test_messages_of_wrong_length_are_refused():
    with pytest.raises(ValueError, match="budgets"):
        trellis.pack([np.zeros(3, np.uint8)], [4])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_decodes_the_same_sample():
    message, y = trellis.encode(random_shift(5000, 50.0).cuda(), 60, step=2)
    assert torch.equal(y.cpu(), trellis.decode(message, 5000, 60, step=2))
