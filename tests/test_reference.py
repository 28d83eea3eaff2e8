import math

import pytest
import torch

from diffusers_compress.codecs.diffc import reference
from diffusers_compress.coding import dct

SIZES = [(1, 1), (1, 9), (4, 4), (5, 7), (8, 12), (13, 6), (33, 31)]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def table(channels=2, levels=3):
    """A calibration whose log2 variances are all different, falling from level to level."""
    values = torch.arange(channels * reference.BANDS).view(channels, reference.BANDS) / 20
    return {"ratio": [0.0, 1.0, 3.0], "log2_variance": [(values - 4 * level).tolist() for level in range(levels)]}


# --------------------------------------------------------------------------------------------------------------- the basis


@pytest.mark.parametrize("h, w", SIZES)
def test_transform_is_orthonormal(h, w):
    matrix = dct.transform(torch.eye(h * w).view(h * w, h, w)).flatten(1).double()
    assert torch.allclose(matrix @ matrix.T, torch.eye(h * w, dtype=torch.float64), atol=1e-5)


@pytest.mark.parametrize("h, w", SIZES)
def test_inverse_takes_the_transform_back_and_leaves_its_input(h, w):
    x = randn(2, 3, h, w)
    before, coefficients = x.clone(), dct.transform(x)
    kept = coefficients.clone()
    assert torch.allclose(dct.inverse(coefficients), x, atol=1e-5)
    assert torch.equal(x, before) and torch.equal(coefficients, kept)


def test_block_transform_keeps_to_its_block():
    x = torch.zeros(1, 10, 9)
    x[0, 5, 6] = 1
    changed = dct.block_transform(x).nonzero()
    assert changed[:, 1].min() == 4 and changed[:, 1].max() == 7 and changed[:, 2].min() == 4 and changed[:, 2].max() == 7


def test_a_flat_picture_is_one_coefficient_and_its_mean():
    for h, w in [(8, 12), (16, 16)]:
        coefficients = dct.transform(torch.full((h, w), 2.0))
        assert coefficients[0, 0].item() == pytest.approx(2 * math.sqrt(h * w), rel=1e-5)
        assert coefficients.flatten()[1:].abs().max() < 1e-4


def test_blocks_means_come_first():
    x = randn(8, 8)
    means = dct.block_transform(x)[::4, ::4] / 4
    assert torch.allclose(means, x.view(2, 4, 2, 4).mean((1, 3)), atol=1e-6)


@pytest.mark.parametrize("h, w", SIZES)
def test_bands_are_a_block_s_frequencies_and_half_octaves_of_the_means(h, w):
    bands, frequencies = reference.bands(h, w), reference.frequencies(h, w)
    for y in range(h):
        for x in range(w):
            inside = 4 * (y % 4) + x % 4
            if inside:
                assert bands[y, x] == inside - 1
                assert frequencies[y, x] == pytest.approx(math.hypot(y % 4, x % 4) / 8)
            else:
                # a DCT of r numbers, index i, has i / (2 r) cycles per number, and a number is a block of 4
                over_all = max(1 / 256, math.hypot(y // 4 / (8 * math.ceil(h / 4)), x // 4 / (8 * math.ceil(w / 4))))
                assert frequencies[y, x] == pytest.approx(over_all)
                assert bands[y, x] == 15 + min(11, round(2 * math.log2(256 * over_all)))
    assert bands[0, 0] == 15


def test_low_frequencies_of_a_smooth_picture():
    """A cosine over the whole picture lies in the coefficient whose frequency is its own."""
    h, w = 32, 64
    wave = torch.cos(2 * math.pi * 3 / (2 * w) * (torch.arange(w) + 0.5)).expand(h, w)
    coefficients = dct.transform(wave).abs()
    y, x = divmod(int(coefficients.argmax()), w)
    assert reference.frequencies(h, w)[y, x].item() == pytest.approx(3 / (2 * w))


# ------------------------------------------------------------------------------------------------------ the error's variance


@pytest.mark.parametrize("snr", [0.0, 0.5, 30.0])
def test_default_is_the_best_linear_denoisers_error(snr):
    e = reference.error_variance(None, snr, (3, 12, 20)).double()
    assert e.shape == (3, 12, 20) and (e[0] == e[2]).all() and (e > 0).all()
    power = reference.error_variance(None, 0.0, (3, 12, 20)).double()
    assert torch.allclose(e, power / (1 + snr * power), rtol=1e-5)
    # P = 1 / frequency^2, mean 1 over a 512x512 picture's latent
    ratio = power[0, 1, 0] / power[0, 0, 4]
    frequency = reference.frequencies(12, 20)
    assert ratio.item() == pytest.approx((frequency[0, 4] / frequency[1, 0]).item() ** 2, rel=1e-4)
    assert reference.error_variance(None, 0.0, (1, 64, 64)).mean().item() == pytest.approx(1, rel=1e-5)


def test_calibrated_variance_is_interpolated_between_levels():
    shape, calibration = (2, 9, 9), table()
    bands = reference.bands(9, 9)
    values = torch.tensor(calibration["log2_variance"])
    for snr, below, above, weight in [(0, 0, 1, 0), (0.25, 0, 1, 0.5), (1, 0, 1, 1), (4, 1, 2, 0.5), (9, 1, 2, 1)]:
        expected = (values[below] * (1 - weight) + values[above] * weight).exp2()[:, bands]
        assert torch.allclose(reference.error_variance(calibration, snr, shape), expected, rtol=1e-5)
    beyond = reference.error_variance(calibration, 1e6, shape)
    assert torch.equal(beyond, reference.error_variance(calibration, 9.0, shape)) and beyond.dtype == torch.float32


@pytest.mark.parametrize("calibration", [table(channels=3), {"ratio": [0, 1], "log2_variance": [[[0.0] * 5] * 2] * 2}])
def test_a_calibration_of_another_latent_is_refused(calibration):
    with pytest.raises(ValueError, match="channels and bands"):
        reference.error_variance(calibration, 1.0, (2, 8, 8))


def test_ranks_are_integers_in_the_variances_order():
    e = torch.tensor([[1e-9, 0.5, 1.0, 1.001, 2.0, 1e9]])
    rank = reference.rank(e)
    assert rank.dtype == torch.int64 and rank[0].tolist() == sorted(rank[0].tolist())
    assert rank[0, [1, 2, 3, 4]].tolist() == [-64, 0, 0, 64]


# ------------------------------------------------------------------------------------------------------------ what a step costs


@pytest.mark.parametrize("n, bits", [(1, 0.01), (1, 10.0), (20, 1e-3), (20, 200.0), (5000, 1.0), (5000, 100.0), (5000, 20000.0)])
@pytest.mark.parametrize("spread", [0, 1, 4])
def test_excess_solves_its_equation(bits, spread, n):
    e = torch.exp(spread * randn(2, n))
    v = reference.excess(e, torch.tensor([bits, 2 * bits])).double()
    assert torch.allclose((1 + v).log2().sum(1) / 2, torch.tensor([bits, 2 * bits]).double(), rtol=1e-4)
    factor = v / e.double()
    assert torch.allclose(factor, factor[:, :1].expand_as(factor), rtol=1e-4)


def test_excess_is_nothing_for_no_bits_and_ignores_the_variances_size():
    e = torch.exp(randn(1, 50))
    assert not reference.excess(e, 0.0).any()
    assert torch.allclose(reference.excess(e, 30.0), reference.excess(1e6 * e, 30.0), rtol=1e-4)
    assert torch.allclose(reference.excess(e, 30.0), reference.excess(1e-6 * e, 30.0), rtol=1e-4)


def test_absurdly_many_bits_stay_finite():
    for e in (torch.ones(1, 4), torch.exp(3 * randn(1, 4))):
        v = reference.excess(e, 1e5)
        assert v.isfinite().all() and math.isfinite(reference.snr_gain(e[0], v[0], 1e5))


def test_each_picture_has_its_own_excess():
    e = torch.exp(2 * randn(3, 50))
    assert torch.allclose(reference.excess(e, 30.0)[1:2], reference.excess(e[1:2], 30.0), rtol=1e-5)


@pytest.mark.parametrize("bits, scale", [(5.0, 1.0), (400.0, 1.0), (400.0, 9.0)])
def test_reach_costs_the_bits_by_the_closed_form_kl(bits, scale):
    """KL of Gaussians from torch.distributions, in the basis of coefficients."""
    e = torch.exp(1.5 * randn(1, 300))
    difference = scale * randn(300, seed=1) * e[0].sqrt()
    v = reference.excess(e, bits)[0]
    gained = reference.snr_gain(difference.square(), v, bits).item()
    q = torch.distributions.Normal((gained**0.5 * difference).double(), torch.ones(300, dtype=torch.float64))
    p = torch.distributions.Normal(0.0, (1 + v.double()).sqrt())
    kl = torch.distributions.kl_divergence(q, p).sum() / math.log(2)
    assert kl.item() == pytest.approx(bits, rel=1e-4)


def test_reach_is_what_was_expected_where_the_error_is():
    """An error of just the expected variance brings every step where its excess says: d e = v."""
    e = torch.exp(1.5 * randn(1, 300))
    v = reference.excess(e, 100.0)
    assert reference.snr_gain(e[0], v[0], 100.0).item() == pytest.approx((v / e)[0, 0].item(), rel=1e-4)


def test_without_excess_reach_is_the_published_kl():
    difference = randn(300)
    gained = reference.snr_gain(difference.square(), torch.zeros(300), 20.0).item()
    assert gained * difference.square().sum().item() / (2 * math.log(2)) == pytest.approx(20.0, rel=1e-5)


def test_expected_bits_of_a_gaussian_are_its_information():
    """With the exact denoiser steps of any size add up to I(x_0; x_snr) = sum log2(1 + snr P) / 2."""
    power = reference.error_variance(None, 0.0, (4, 32, 32)).double()
    for snr in (0.1, 1.0, 10.0):
        information = (1 + snr * power).log2().sum().item() / 2
        assert reference.expected_bits(None, (4, 32, 32), snr) == pytest.approx(information, rel=1e-5)
    assert reference.expected_bits(None, (4, 32, 32), 0.0) == 0
