"""The embedded model's denoiser: at its start the best linear one, afterwards a UNet that sees what the filter says."""

import pytest
import torch

from diffusers_compress import WienerUNet
from diffusers_compress.coding.dct import dct, inverse_dct


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(**options):
    torch.manual_seed(0)
    return WienerUNet(
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 16),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **options,
    ).eval()


def latents(count, h, w, seed=0):
    """Gaussian, stationary, of unequal channels whose power falls with frequency."""
    frequency = torch.hypot(torch.arange(h)[:, None] / (2 * h), torch.arange(w)[None] / (2 * w)).clamp(min=1 / 64)
    std = torch.tensor([4.0, 1.0, 0.2])[:, None, None] * (frequency / 0.2) ** -0.7
    return inverse_dct(std * randn(count, 3, h, w, seed=seed))


@pytest.fixture(scope="module")
def unet():
    unet = make()
    unet.fit(latents(40, 32, 32))
    return unet.requires_grad_(False)


def denoise(unet, x_0, t, seed=1):
    """x_0_hat from x_t at timestep t; and sigma / alpha."""
    alpha, sigma = unet.levels(t, len(x_0), x_0.device)
    x_t = alpha * x_0 + sigma * randn(*x_0.shape, seed=seed)
    v = unet(x_t, t, randn(len(x_0), 5, 8), return_dict=False)[0]
    return alpha * x_t - sigma * v, sigma / alpha


@pytest.mark.parametrize("h, w", [(32, 32), (16, 40)])
@pytest.mark.parametrize("t", [950, 600, 200])
def test_a_new_one_is_wieners_filter(unet, h, w, t):
    """Its error is what theory says of the best linear filter: P sigma^2 / (P alpha^2 + sigma^2) for each coefficient."""
    x_0 = latents(16, h, w, seed=2)
    x_0_hat, _ = denoise(unet, x_0, t)
    alpha, sigma = unet.levels(t, 1, "cpu")
    power = unet.power(h, w)
    expected = (sigma**2 * power / (alpha**2 * power + sigma**2)).mean((-2, -1)).squeeze(0)
    measured = (x_0_hat - x_0).square().mean((0, 2, 3))
    assert torch.allclose(measured, expected, rtol=0.2)


def test_pure_noise_says_nothing(unet):
    x_0_hat, _ = denoise(unet, latents(2, 16, 16), 999)
    assert x_0_hat.abs().max() < 0.05


def test_the_spectrum_is_that_of_the_latents(unet):
    measured = dct(latents(200, 24, 24, seed=3)).square().mean(0)
    middle = slice(4, 20)
    ratio = (unet.power(24, 24) / measured)[:, middle, middle]
    assert 0.8 < ratio.mean() < 1.25 and 0.3 < ratio.min() and ratio.max() < 3


def test_saved_and_loaded_it_is_the_same(unet, tmp_path):
    unet.save_pretrained(tmp_path)
    loaded = WienerUNet.from_pretrained(tmp_path)
    assert loaded.config.in_channels == loaded.config.out_channels == 3 and loaded.conv_in.in_channels == 6
    assert list(loaded.config.block_out_channels) == [16, 16] and loaded.config.beta_end == 0.012
    x_0 = latents(1, 16, 16)
    assert torch.equal(denoise(loaded, x_0, 300)[0], denoise(unet, x_0, 300)[0])


def test_further_channels_reach_the_network():
    """As `adapter.widen` adds them for PerCo."""
    unet = make()
    torch.nn.init.normal_(unet.conv_out.weight)
    from diffusers_compress.models import adapter

    x_t, text = randn(1, 3, 16, 16), randn(1, 5, 8)
    before = unet(x_t, 500, text, return_dict=False)[0]
    adapter.widen(unet, 2)
    assert unet.config.in_channels == 5
    extra = randn(1, 2, 16, 16, seed=4)
    assert torch.allclose(unet(torch.cat([x_t, extra], 1), 500, text, return_dict=False)[0], before, atol=1e-5)
    torch.nn.init.normal_(unet.conv_in.weight)
    one, two = (unet(torch.cat([x_t, sign * extra], 1), 500, text, return_dict=False)[0] for sign in (1, -1))
    assert not torch.allclose(one, two, atol=1e-3)


def centred(estimate_error):
    """A UNet around an estimate of x_0 whose error has this share of the power; and a function of (x_0, t) to x_0_hat."""
    from diffusers_compress.models import adapter

    unet = make()
    x = latents(40, 32, 32)
    unet.fit(x)
    adapter.widen(unet, 2 + 3)
    unet.centre_on_estimate()
    unet.fit_remainder(estimate_error**0.5 * x)

    def denoise(x_0, t):
        alpha, sigma = unet.levels(t, len(x_0), x_0.device)
        x_t = alpha * x_0 + sigma * randn(*x_0.shape, seed=1)
        estimate = x_0 - estimate_error**0.5 * latents(*x_0.shape[::2], x_0.shape[3], seed=5)
        seen = torch.cat([x_t, randn(len(x_0), 2, *x_0.shape[2:], seed=4), estimate], 1)
        return alpha * x_t - sigma * unet(seen, t, randn(len(x_0), 5, 8), return_dict=False)[0]

    return unet.requires_grad_(False), denoise


@pytest.mark.parametrize("t", [999, 900, 600])
def test_around_an_estimate_it_is_the_filter_of_what_that_leaves(t):
    unet, denoise = centred(0.1)
    x_0 = latents(16, 32, 32, seed=2)
    alpha, sigma = unet.levels(t, 1, "cpu")
    power = 0.1 * unet.power(32, 32)
    expected = (sigma**2 * power / (alpha**2 * power + sigma**2)).mean((-2, -1)).squeeze(0)
    assert torch.allclose((denoise(x_0, t) - x_0).square().mean((0, 2, 3)), expected, rtol=0.2)


def test_around_an_estimate_saved_and_as_an_adapter(tmp_path):
    from diffusers_compress.models import adapter

    unet, denoise = centred(0.1)
    unet.save_pretrained(tmp_path / "whole")
    loaded = WienerUNet.from_pretrained(tmp_path / "whole")
    assert loaded.config.centred and torch.equal(loaded.log2_remainder, unet.log2_remainder)
    unet.conv_in.requires_grad_(True)
    adapter.save(adapter.changes(unet), tmp_path, "base", torch.float32)
    base = make()
    base.fit(latents(40, 32, 32))
    adapter.apply(base, tmp_path)
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in unet.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_says_nearly_the_same(unet, dtype):
    """The filter works in float32: weights of half precision cost little, although the latents are as large as 20."""
    x_0, wanted = latents(1, 32, 32), denoise(unet, latents(1, 32, 32), 30)[0]
    half = make().to(dtype)
    half.load_state_dict({name: tensor.to(dtype) for name, tensor in unet.state_dict().items()})
    alpha, sigma = half.levels(30, 1, "cpu")
    x_t = alpha * x_0 + sigma * randn(*x_0.shape, seed=1)
    v = half(x_t, 30, randn(1, 5, 8).to(dtype), return_dict=False)[0]
    assert v.dtype == torch.float32
    error = (wanted - x_0).square().mean()
    assert ((alpha * x_t - sigma * v) - wanted).square().mean() < 0.02 * error
