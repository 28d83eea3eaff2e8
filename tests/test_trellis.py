import math
import zlib
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
import torch

from diffusers_compress.codecs.diffc import reference
from diffusers_compress.coding import randomness
from diffusers_compress.coding.channels import search, search_numpy, trellis

TRELLIS, TRELLIS32 = trellis.TRELLIS, trellis.TRELLIS32
BOTH = pytest.mark.parametrize("channel", [TRELLIS, TRELLIS32], ids=["trellis", "trellis32"])


def flat(batch, n):
    """Nothing is known of the error: excess and rank [B, n] of the published coder."""
    return torch.zeros(batch, n), torch.zeros(batch, n, dtype=torch.int64)


def uneven(batch, n, spread, bits, seed=0):
    """Excess and rank of an error variance exp(N(0, spread^2)), for a step of so many bits."""
    error = torch.exp(spread * torch.randn(batch, n, generator=torch.Generator().manual_seed(seed)))
    return reference.excess(error, bits), reference.rank(error)


def shifts(excess, bits, seed=0):
    """What a source as expected wants of a step of so many bits, all directions alike where there is no excess -> [B, n]."""
    m = torch.randn(excess.shape, generator=torch.Generator().manual_seed(1000 + seed))
    m = m * (excess.sqrt() if excess.any() else 1)
    snr = reference.snr_gain(m.square(), excess, bits).tolist()
    return m * torch.tensor(snr).sqrt()[:, None]


def delivered(y, m, v):
    """log2 q(y) / p(y) of each picture."""
    y, m, v = y.double(), m.double(), v.double()
    return (v.log1p() - (y - m).square() + y.square() / (1 + v)).sum(1) / (2 * math.log(2))


def all_messages(bits):
    return np.array([[i >> k & 1 for k in reversed(range(bits))] for i in range(2**bits)], dtype=np.uint8)


# ------------------------------------------------------------------------------------------------------ messages and samples


@BOTH
@pytest.mark.parametrize("n, budget", [(1, 0), (1, 100), (4, 3), (4, 200), (2, 14), (100, 1), (9, 15), (999, 16), (5000, 41)])
def test_decoder_gives_the_encoders_sample(channel, n, budget):
    excess, rank = uneven(2, n, 1.5, 5.0)
    messages, y = channel.encode(shifts(excess, 5.0), excess, rank, budget, 3)
    assert messages.shape == (2, budget) and messages.dtype == np.uint8 and set(messages.flatten().tolist()) <= {0, 1}
    assert y.shape == (2, n) and y.dtype == torch.float32
    assert torch.equal(channel.decode(messages, excess, rank, budget, 3), y)


@BOTH
@pytest.mark.parametrize("n", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("budget", [0, 1, 13, 14, 15, 16, 17, 99, 5000])
def test_any_message_decodes(channel, n, budget):
    excess, rank = uneven(1, n, 2, 10.0)
    messages = np.random.default_rng(budget).integers(0, 2, (1, budget), dtype=np.uint8)
    y = channel.decode(messages, excess, rank, budget, step=0)
    assert y.shape == (1, n) and y.isfinite().all()
    assert y.norm() < 5 * (1 + excess).sum().sqrt()


@BOTH
def test_pictures_together_are_pictures_one_at_a_time(channel):
    excess, rank = uneven(3, 500, 1.5, 80.0)
    m, budget = shifts(excess, 80.0), 90
    messages, y = channel.encode(m, excess, rank, budget, step=4)
    for i in range(3):
        one = [x[i : i + 1] for x in (m, excess, rank)]
        message, sample = channel.encode(*one, budget, step=4)
        assert np.array_equal(message, messages[i : i + 1])
        assert torch.allclose(sample, y[i : i + 1], atol=1e-5)
    assert len({message.tobytes() for message in messages}) == 3


@pytest.mark.parametrize("shape", [(1, 5), (1, 7), (2, 6), (6,)])
def test_messages_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"messages of shape .*: 1 of 6 bits are wanted"):
        TRELLIS.decode(np.zeros(shape, np.uint8), *flat(1, 10), 6, step=0)


@pytest.mark.parametrize("budget", [1, 2, 3, 14, 15, 16, 17, 18, 100, 1001])
@pytest.mark.parametrize("n", [1, 10, 1000])
def test_segments_are_consecutive_and_read_the_whole_message(n, budget):
    ends, bounds = trellis._segments(n, budget)
    assert ends[0] == min(budget, 14) and ends[-1] == budget
    assert all(1 <= high - low <= 4 for low, high in zip(ends, ends[1:]))
    assert len(bounds) == len(ends) + 1 and bounds[0] == 0 and bounds[-1] == n and bounds == sorted(bounds)


@pytest.mark.parametrize("channel", [TRELLIS, replace(TRELLIS32, survivors=2**14)], ids=["trellis", "trellis32"])
@pytest.mark.parametrize("budget", [7, 16])
def test_encoder_finds_the_best_message(channel, budget):
    excess, rank = torch.full((1, 100), 0.3), flat(1, 100)[1]
    m = shifts(excess, 8.0)
    message, y = channel.encode(m, excess, rank, budget, step=1)
    every = all_messages(budget)
    samples = channel.decode(every, excess.expand(2**budget, -1), rank.expand(2**budget, -1), budget, step=1)
    assert np.array_equal(message[0], every[int(delivered(samples, m, excess).argmax())])


def test_more_survivors_find_better_messages():
    excess, rank = uneven(8, 4000, 1.5, 150.0)
    m = shifts(excess, 150.0)
    found = []
    for followed in (2**4, 2**8, 2**12):
        y = replace(TRELLIS32, survivors=followed).encode(m, excess, rank, 160, step=1)[1]
        found.append(delivered(y, m, excess).mean().item())
    assert found == sorted(found) and found[2] > 1.02 * found[0]


def m_algorithm(bits, scores, followed):
    """Again and plainly, of one picture: totals of the messages that are left, best last, and the bits of the best."""
    total, message = np.zeros(1, np.float32), np.zeros(1, np.int64)
    for width, score in zip(bits, scores):
        message = (message[:, None] << width | np.arange(2**width)).ravel()
        total = total.repeat(2**width) + score[search.place(message & randomness.WORD)]
        best = total.argsort()[-followed:]
        total, message = total[best], message[best]
    return total, message[-1] >> np.arange(sum(bits))[::-1] & 1


@pytest.mark.parametrize("rough", [None, math.inf, -math.inf])
def test_the_m_algorithm_follows_the_best(rough, monkeypatch):
    """However wrong its guess of what total the best have."""
    if rough is not None:
        monkeypatch.setattr(search_numpy, "_rough", lambda *known: rough)
    bits = [14, 4, 4, 4, 2]
    scores = torch.randn(2, len(bits), 2**14, generator=torch.Generator().manual_seed(0))
    runs, expected = scores.split([1, 3, 1], 1), [m_algorithm(bits, own, 3000) for own in scores.numpy()]
    totals = search_numpy.survivors(bits, runs, 3000)[0].sort().values
    assert np.array_equal(totals, [total for total, _ in expected])
    assert np.array_equal(search.m_algorithm(bits, runs, 3000, search_numpy.survivors), [message for _, message in expected])


def test_a_gpu_goes_without_kernels_that_fail_and_says_why_once():
    with pytest.warns(RuntimeWarning, match="cuda:63 searches without its kernels, so that encoding takes longer: .") as warned:
        found = [search.on(torch.device("cuda", 63)) for _ in range(2)]  # such a device is nowhere
    assert found == [(search.follow, search_numpy.survivors)] * 2 and len(warned) == 1


def test_kernels_that_find_other_messages_are_noticed():
    def follow(total, run, widths):
        return search.follow(total, run.flip(1), widths)

    def survivors(bits, scores, followed):
        return search_numpy.survivors(bits, [run.flip(1) for run in scores], followed)

    right, device = (search.follow, search_numpy.survivors), "cpu"
    search.compare(right, right, device)
    with pytest.raises(RuntimeError, match="Viterbi's algorithm finds other messages"):
        search.compare(right, (follow, right[1]), device)
    with pytest.raises(RuntimeError, match="the M-algorithm finds other messages"):
        search.compare(right, (right[0], survivors), device)


@pytest.mark.parametrize("bounds", [[0, 40, 50], [0, 1000, 1300, 1301], [0, 300, 40_000], [0, 40_000, 40_000]])
def test_scores_are_those_of_the_codewords(bounds):
    """Of segments short and long, of none, and longer than the codebook, which is a ring."""
    terms, codebook = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((2, 2, 40_000), (2**14,)))
    scores = torch.cat(list(trellis._segment_scores(terms, bounds, codebook)), 1)
    for state in (0, 5000, 2**14 - 1):
        c = codebook[(state + torch.arange(40_000)) % 2**14].double()
        for j, (low, high) in enumerate(zip(bounds, bounds[1:])):
            expected = (terms[:, :, low:high] * torch.stack([c, c**2])[:, : high - low]).sum((1, 2))
            assert torch.allclose(scores[:, j, state].double(), expected, atol=1e-5 * max(1, high - low) ** 0.5)


@pytest.mark.parametrize("channel, remembered", [(TRELLIS, 14), (TRELLIS32, 32)], ids=["trellis", "trellis32"])
def test_a_codeword_depends_on_the_last_bits_and_no_others(channel, remembered):
    """The sample of the last segment changes with each bit that its state holds."""
    budget, (excess, rank) = 14 + 4 * 12, flat(1, 500)
    messages = np.concatenate([np.zeros((1, budget), np.uint8), np.eye(budget, dtype=np.uint8)])
    y = channel.decode(messages, excess.expand(budget + 1, -1), rank.expand(budget + 1, -1), budget, step=1)
    order, line = trellis._order(rank, 1), trellis._line(500, rank.device)
    _, signs, _ = trellis._shared(500, 1, rank.device)
    y = trellis._mix(y[:, order[0]] * signs, budget)[:, line][:, trellis._segments(500, budget)[1][-2] :]
    changed = [not torch.equal(y[0], y[1 + i]) for i in range(budget)]
    assert changed == [i >= budget - remembered for i in range(budget)]


@BOTH
def test_encoder_finds_the_best_of_the_last_bits(channel):
    budget = 14 + 6  # the last segment reads two bits
    excess, rank = torch.full((1, 400), 0.3), flat(1, 400)[1]
    m = shifts(excess, 15.0)
    message, y = channel.encode(m, excess, rank, budget, step=1)
    others = np.repeat(message, 64, 0)
    others[:, -6:] = all_messages(6)
    samples = channel.decode(others, excess.expand(64, -1), rank.expand(64, -1), budget, step=1)
    assert delivered(samples, m, excess).max() <= delivered(y, m, excess).item() + 1e-3


def test_dimensions_of_high_rank_are_spread_over_the_segments():
    """Fibonacci hashing: of the k highest ranks every window of the line has about its share."""
    n = 1000
    rank = torch.randperm(n, generator=torch.Generator().manual_seed(0))[None]
    order, line = trellis._order(rank, step=5), trellis._line(n, rank.device)
    assert sorted(order[0].tolist()) == sorted(line.tolist()) == list(range(n))
    for k in (20, 100, 500):
        counts = np.histogram(np.flatnonzero(line.numpy() < k), bins=10, range=(0, n))[0]
        assert counts.min() >= k // 10 - 2 and counts.max() <= k // 10 + 2


# ----------------------------------------------------------------------------------------------------------------- the format


def philox_word(position, stream, step):
    """The generator again, from the text of the format, in plain integers."""
    a, b, c, d = position // 4, step, stream, 0
    k, m = 0x44696666, 0x436F6D70
    for _ in range(10):
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = q >> 32 ^ b ^ k, q % 2**32, p >> 32 ^ d ^ m, p % 2**32
        k, m = (k + 0x9E3779B9) % 2**32, (m + 0xBB67AE85) % 2**32
    return (a, b, c, d)[position % 4]


def decode_from_the_format(bits, excess, rank, step, state_bits):
    """The decoder again, in plain Python numbers."""
    n, budget = len(excess), len(bits)
    quantile = [NormalDist().inv_cdf((i + 0.5) / 65536) for i in range(65536)]
    ends = [*range(14, budget, 4), budget]
    weights = [12 + max(0, end - 14) for end in ends]
    bounds = [n * weight // weights[-1] for weight in weights]
    order = sorted(range(n), key=lambda i: (-rank[i], philox_word(i, 1, step)))
    line = sorted(range(n), key=lambda i: i * 0x9E3779B1 % 2**32)
    groups = min(n // 16, -(-budget // 16))
    y, v = [0.0] * n, [excess[i] for i in order]
    for g in range(groups):
        v[16 * g : 16 * g + 16] = [sum(v[16 * g : 16 * g + 16]) / 16] * 16
    for i in range(n):
        j = sum(bound <= i for bound in bounds)
        state = int("".join(map(str, [0] * state_bits + bits[: ends[j]]))[-state_bits:], 2)
        place = state % 2**14 ^ (state // 2**14) * 0x9E3779B1 % 2**32 // 2**18
        position = (place + i - [0, *bounds][j]) % 2**14
        half = philox_word(position // 2, 3, step) >> 16 * (position % 2) & 0xFFFF
        y[line[i]] = math.sqrt(1 + v[line[i]]) * round(quantile[half] * 65536) / 65536
    for g in range(groups):
        group = y[16 * g : 16 * g + 16]
        y[16 * g : 16 * g + 16] = [sum((-1) ** (a & b).bit_count() * x for b, x in enumerate(group)) / 4 for a in range(16)]
    result = [0.0] * n
    for i in range(n):
        sign = -1 if philox_word(i // 32, 2, step) >> i % 32 & 1 else 1
        result[order[i]] = sign * y[i]
    return result


@BOTH
@pytest.mark.parametrize("n, budget", [(1, 20), (5, 3), (100, 0), (300, 14), (100, 200), (300, 75)])
def test_a_decoder_written_from_the_format_agrees(channel, n, budget):
    excess, rank = uneven(1, n, 1.5, 30.0)
    rank = rank // 40  # so that some are equal
    bits = [i * i % 5 % 2 for i in range(budget)]
    message, constants = np.array([bits], dtype=np.uint8), (6, channel.state_bits)
    expected = decode_from_the_format(bits, excess[0].tolist(), rank[0].tolist(), *constants)
    assert channel.decode(message, excess, rank, budget, 6)[0].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    # exact where the excess is
    expected = decode_from_the_format(bits, [0.0] * n, rank[0].tolist(), *constants)
    assert channel.decode(message, torch.zeros_like(excess), rank, budget, 6)[0].tolist() == expected


@pytest.mark.parametrize("channel, checksum", [(TRELLIS, 0x027C79C5), (TRELLIS32, 0x36768347)], ids=["trellis", "trellis32"])
def test_message_and_sample_are_those_of_the_format(channel, checksum):
    message = (np.arange(75) % 7 % 2).astype(np.uint8)[None]
    excess, rank = flat(1, 1000)
    y = channel.decode(message, excess, rank + torch.arange(1000) % 10, 75, step=11)
    assert zlib.crc32((y * 2**18).numpy().astype("<i4").tobytes()) == checksum


# --------------------------------------------------------------------------------------------------- the law of what arrives


@pytest.mark.parametrize(
    "channel, budget, spread, batches",
    [(TRELLIS, 6, None, 8), (TRELLIS, 40, None, 6), (TRELLIS, 200, None, 2), (TRELLIS, 200, 0, 2), (TRELLIS, 200, 2, 4)]
    + [(TRELLIS, 600, 2, 2), (TRELLIS32, 100, 2, 1)],
)
def test_a_message_delivers_the_useful_bits(channel, budget, spread, batches):
    """The likelihood ratio's mean is the KL of the q wanted; the expected variance is none (None), flat (0) or strongly uneven."""
    n, bits, ratios = 1000, channel.kl(budget), []
    for step in range(batches):
        excess, rank = flat(8, n) if spread is None else uneven(8, n, spread, bits, step)
        m = shifts(excess, bits, step)
        ratios.append(delivered(channel.encode(m, excess, rank, budget, step)[1], m, excess) / bits)
    ratios = torch.cat(ratios)
    assert abs(ratios.mean().item() - 1) < 0.05 + 2 * ratios.std().item() / len(ratios) ** 0.5


def test_a_smooth_shift_arrives_as_well():
    """Flat expectations, and a shift that is not: 8 pictures' mean lies along the shift, at its size."""
    n, budget = 3000, 108
    smooth = torch.exp(2 * torch.sin(torch.arange(n) / n * 6))
    smooth *= math.sqrt(2 * math.log(2) * TRELLIS.kl(budget)) / smooth.norm()
    samples = [TRELLIS.encode(smooth[None], *flat(1, n), budget, step)[1][0] for step in range(8)]
    assert abs(np.mean([(y @ smooth / smooth.square().sum()).item() for y in samples]) - 1) < 0.05


def assert_standard_normal(z, margin=5):
    """Mean, variance, skewness and kurtosis of independent z, within `margin` standard deviations."""
    for moment, expected, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs(z.pow(moment).mean().item() - expected) < margin * (variance / z.numel()) ** 0.5, f"moment {moment}"


def assert_uncorrelated(a, b, margin=5):
    """Of two of mean zero, of which one is independent noise."""
    product = a * b
    assert abs(product.mean().item()) < margin * product.std().item() / product.numel() ** 0.5


@pytest.mark.parametrize(
    "channel, budget, spread", [(TRELLIS, 200, None), (TRELLIS, 200, 2), (TRELLIS, 600, 2), (TRELLIS32, 50, 2)]
)
def test_the_noise_is_standard_normal(channel, budget, spread):
    """y - shift has the law of a step's noise: no trace of the shift, of what was expected, of neighbours, pictures or steps."""
    n, noise, wanted, expected = 1000, [], [], []
    for step in range(3):
        bits = channel.kl(budget)
        excess, rank = uneven(6, n, spread, bits, step) if spread else flat(6, n)
        m = shifts(excess, bits, step)
        noise.append((channel.encode(m, excess, rank, budget, step)[1] - m).double())
        wanted.append(m.double())
        expected.append(excess.double())
    z, m, v = torch.stack(noise), torch.stack(wanted), torch.stack(expected)
    assert_standard_normal(z)
    along = (z * m).sum(-1) / m.norm(dim=-1)
    assert abs(along.mean().item()) < 5 / along.numel() ** 0.5
    assert_uncorrelated(z.square() - 1, m.square() - m.square().mean())
    for dimensions in v.flatten().argsort().chunk(8) if spread else []:  # from the least to the best known
        assert_standard_normal(z.flatten()[dimensions])
    assert_uncorrelated(z[..., 1:], z[..., :-1])
    assert_uncorrelated(z[:, 1:], z[:, :-1])
    assert_uncorrelated(z[1:], z[:-1])


def test_the_noise_of_chained_steps_is_standard_normal():
    """A Gaussian source of natural pictures' spectrum with its exact denoiser, from pure noise on.

    With T_t = snr_t x_0 + sqrt(snr_t) eps the posterior is x_0_hat = e T, e = P / (1 + snr P), and a step brings
    T_s = T_t + d x_0_hat + sqrt(d) y,  d = snr_s - snr_t,  y ~ N(sqrt(d) (x_0 - x_0_hat), I).
    """
    channel, batch, side, budget = TRELLIS, 8, 32, 150
    power = reference.error_variance(None, 0, (1, side, side)).flatten().double()
    x_0 = torch.randn(batch, side**2, generator=torch.Generator().manual_seed(0)) * power.sqrt()
    statistic, snr, noise = torch.zeros_like(x_0), torch.zeros(batch, 1, dtype=torch.float64), []
    for step in range(5):
        error = power / (1 + snr * power)
        difference = x_0 - error * statistic
        v = reference.excess(error, channel.kl(budget))
        d = reference.snr_gain(difference.square(), v, channel.kl(budget))[:, None]
        m = d.sqrt() * difference
        y = channel.encode(m.float(), v, reference.rank(error), budget, step)[1]
        statistic, snr = statistic + d * (x_0 - difference) + d.sqrt() * y, snr + d
        noise.append(y - m)

    assert snr.min() > 4  # most of the picture's energy is there
    eps = (statistic - snr * x_0) / snr.sqrt()
    assert_standard_normal(eps)
    white = x_0 / power.sqrt()
    assert_uncorrelated(eps, white)
    assert_uncorrelated(eps, white.sign())
    bands = reference.bands(side, side).flatten()
    for band in bands.unique():
        assert_uncorrelated(eps[:, bands == band], white[:, bands == band])
        assert_standard_normal(eps[:, bands == band], margin=6)
    for before, after in zip(noise, noise[1:]):
        assert_uncorrelated(before, after)


# ------------------------------------------------------------------------------------------------------------- useful bits


@BOTH
@pytest.mark.parametrize("kl", [0, 0.3, 1, 5, 11, 11.5, 12, 13, 14, 100, 3000])
def test_budget_is_the_inverse_of_kl(channel, kl):
    budget = channel.budget(kl)
    assert isinstance(budget, int)
    assert all(abs(channel.kl(budget) - kl) <= abs(channel.kl(other) - kl) + 0.15 for other in (max(budget - 1, 0), budget + 1))


@BOTH
def test_kl_rises_and_stays_below_the_budget(channel):
    values = [channel.kl(budget) for budget in range(200)]
    assert values[0] == 0 and all(a < b for a, b in zip(values, values[1:])) and all(v <= r for r, v in enumerate(values))


def test_more_states_deliver_more():
    assert all(TRELLIS.kl(budget) < TRELLIS32.kl(budget) for budget in (40, 100, 1000))


@pytest.mark.parametrize("kl", [-1.0, math.nan, math.inf])
def test_impossible_kl_is_named(kl):
    with pytest.raises(ValueError, match="kl"):
        TRELLIS.budget(kl)


# ----------------------------------------------------------------------------------------------------------------- payload


def test_payload_holds_the_bits_and_a_cut_one_the_whole_steps():
    rng = np.random.default_rng(0)
    budgets = [5, 0, 17, 100, 3]
    messages = [rng.integers(0, 2, budget, dtype=np.uint8) for budget in budgets]
    payload = TRELLIS.pack(messages, budgets)
    assert len(payload) == TRELLIS.payload_bytes(budgets) == 16
    for length in range(17):
        held = TRELLIS.unpack(payload[:length], budgets)
        assert len(held) == sum(sum(budgets[: i + 1]) <= 8 * length for i in range(5))
        assert all(np.array_equal(a, b) for a, b in zip(held, messages))


def test_absurd_budgets_cost_nothing():
    assert TRELLIS.unpack(b"\0" * 10, [3, 2**60, 5])[1:] == []


def test_no_steps():
    assert TRELLIS.pack([], []) == b"" and TRELLIS.unpack(b"", []) == []


def test_messages_of_wrong_length_are_refused():
    with pytest.raises(ValueError, match="budgets"):
        TRELLIS.pack([np.zeros(3, np.uint8)], [4])


@pytest.mark.gpu
def test_a_gpu_decodes_the_same_sample():
    excess, rank = uneven(2, 5000, 1.5, 50.0)
    inputs = [x.cuda() for x in (shifts(excess, 50.0), excess, rank)]
    messages, y = TRELLIS.encode(*inputs, 60, step=2)
    assert torch.allclose(y.cpu(), TRELLIS.decode(messages, excess, rank, 60, step=2), atol=1e-5)
    flat_y = TRELLIS.decode(messages, torch.zeros_like(inputs[1]), inputs[2], 60, step=2)
    assert torch.equal(flat_y.cpu(), TRELLIS.decode(messages, torch.zeros_like(excess), rank, 60, step=2))


@pytest.mark.gpu
@BOTH
def test_a_gpus_kernels_find_the_messages_of_pytorch(channel, monkeypatch):
    excess, rank = uneven(2, 5000, 1.5, 300.0)
    inputs = [x.cuda() for x in (shifts(excess, 300.0), excess, rank)]
    assert search.on(inputs[0].device) != (search.follow, search.survivors)
    messages, _ = channel.encode(*inputs, 310, step=2)
    monkeypatch.setattr(search, "on", lambda device: (search.follow, search.survivors))
    assert np.array_equal(channel.encode(*inputs, 310, step=2)[0], messages)
