import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_compress import DiffCPipeline, calibration
from diffusers_compress.codecs.diffc import reference
from diffusers_compress.coding import dct
from diffusers_compress.diffusion.schedule import from_pure_noise


@pytest.fixture(scope="module")
def pipe(tiny_sd_folders):
    pipe = DiffCPipeline.from_pretrained(tiny_sd_folders["v_prediction"])
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)) for _ in range(3)]


def with_known_error(pipe, monkeypatch, error):
    """Latents of zero, and a denoiser whose x_0_hat is minus `error(shape, t)` [C, h, w] of coefficients."""
    noise = from_pure_noise(pipe.noise_schedule())

    def predict(self, x_t, timesteps, embeds):
        x_0_hat = torch.stack([-dct.inverse(error(x_t.shape[1:], t)) for t in timesteps])
        alpha, sigma = (level[timesteps].float().view(-1, 1, 1, 1) for level in (noise.alpha, noise.sigma))
        # v = alpha eps - sigma x_0_hat, where x_t = alpha x_0_hat + sigma eps
        return (alpha * x_t - x_0_hat) / sigma

    monkeypatch.setattr(DiffCPipeline, "predict", predict)
    monkeypatch.setattr(DiffCPipeline, "encode_picture", lambda self, x: torch.zeros(1, 4, x.shape[-2] // 8, x.shape[-1] // 8))


def test_levels_and_bands(pipe, pictures):
    measured = calibration.calibrate_error(pipe, pictures)
    assert set(measured) == {"ratio", "log2_variance"}
    ratio = measured["ratio"]
    assert ratio == sorted(set(ratio)) and len(ratio) == len(calibration.RATIOS)
    assert ratio == pytest.approx(calibration.RATIOS, rel=0.1)
    table = torch.tensor(measured["log2_variance"])
    assert table.shape == (len(ratio), 4, reference.BANDS) and table.isfinite().all()


def test_at_pure_noise_the_error_is_the_latent_itself(pipe, monkeypatch):
    """Nothing is known there, whatever a network that was never trained there says."""
    x_0 = dct.inverse(2.0 ** (reference.bands(64, 64) / 4).float()).expand(1, 4, -1, -1)
    monkeypatch.setattr(DiffCPipeline, "encode_picture", lambda self, x: x_0)
    measured = calibration.calibrate_error(pipe, [Image.new("RGB", (512, 512))])
    present = reference.bands(64, 64).unique()
    assert measured["ratio"][0] == 0
    assert torch.tensor(measured["log2_variance"])[0][:, present] == pytest.approx((present / 2).expand(4, -1).numpy(), abs=0.011)


def test_it_is_plain_data_and_the_same_each_time(pipe, pictures):
    measured = calibration.calibrate_error(pipe, pictures)
    assert json.loads(json.dumps(measured)) == measured == calibration.calibrate_error(pipe, pictures)


def test_a_known_error_is_found(pipe, monkeypatch):
    """Band b of channel c at timestep t errs by +- 2^((b - c) / 4) (1 + t / 1000): every mean square is known."""

    def error(shape, t):
        c, bands = torch.arange(shape[0])[:, None, None], reference.bands(*shape[1:])
        signs = torch.where(torch.rand(shape, generator=torch.Generator().manual_seed(t)) < 0.5, -1.0, 1.0)
        return signs * 2 ** ((bands - c) / 4) * (1 + t / 1000)

    with_known_error(pipe, monkeypatch, error)
    measured = calibration.calibrate_error(pipe, [Image.new("RGB", (512, 512)), Image.new("RGB", (700, 600))])
    noise = from_pure_noise(pipe.noise_schedule())
    for ratio, table in list(zip(measured["ratio"], torch.tensor(measured["log2_variance"])))[1:]:  # but where nothing is known
        t = int((noise.ratio - ratio).abs().argmin())
        bands, c = torch.arange(reference.BANDS), torch.arange(4)[:, None]
        expected = (bands - c) / 2 + 2 * np.log2(1 + t / 1000)
        present = reference.bands(64, 64).unique()  # 512 pixels of a side at most
        assert (table - expected)[:, present].abs().max() < 0.011


def test_a_band_that_small_pictures_lack_takes_its_neighbour_s(pipe, monkeypatch):
    with_known_error(pipe, monkeypatch, lambda shape, t: (2.0 ** (reference.bands(*shape[1:]) / 4)).expand(shape))
    table = torch.tensor(calibration.calibrate_error(pipe, [Image.new("RGB", (64, 64))])["log2_variance"])[1, 0]
    present = reference.bands(8, 8).unique()
    assert len(present) < reference.BANDS
    for band, value in enumerate(2 * table):
        assert value in present and abs(value - band) == (present - band).abs().min()


def test_no_picture_is_told(pipe):
    with pytest.raises(ValueError, match="no picture"):
        calibration.calibrate_error(pipe, [])


@pytest.mark.parametrize("knows", [1.0, 0.6])
def test_how_far_the_second_guess_is_followed(pipe, monkeypatch, knows):
    """Not at all for an exact denoiser of white latents; some of the way for one whose guesses are too small."""
    x_0 = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(1))
    noise = pipe.noise_schedule()

    def predict(self, x_t, timesteps, embeds):
        alpha, sigma = (level[timesteps].float().view(-1, 1, 1, 1) for level in (noise.alpha, noise.sigma))
        x_0_hat = knows * alpha / (alpha**2 + sigma**2) * x_t
        return (alpha * x_t - x_0_hat) / sigma

    monkeypatch.setattr(DiffCPipeline, "predict", predict)
    monkeypatch.setattr(DiffCPipeline, "encode_picture", lambda self, x: x_0)
    measured = calibration.calibrate_second_guess(pipe, [Image.new("RGB", (512, 512))])
    ratio, share = (np.array(measured[name]) for name in ("ratio", "share"))
    assert len(ratio) == len(share) == len(set(ratio)) and (np.diff(ratio) > 0).all()
    some = share[(ratio > 0.2) & (ratio < 0.6)]
    assert len(some) == 4 and (some < 0.1).all() if knows == 1 else (some > 0.3).all()
    with pytest.raises(ValueError, match="no picture given"):
        calibration.calibrate_second_guess(pipe, [])
