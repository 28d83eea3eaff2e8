"""A denoiser that starts as the best linear one: Wiener's filter, plus a UNet that learns what a Gaussian does not know."""

import math
from functools import lru_cache

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor

from diffusers_compress.coding.dct import dct, inverse_dct
from diffusers_compress.diffusion import schedule

KNOTS = 24  # of the spectrum
LOWEST, HIGHEST = 1 / 256, 0.5**0.5  # cycles per latent pixel, where the first and the last knot lie


class WienerUNet(UNet2DConditionModel):
    """`UNet2DConditionModel` behind the preconditioning of Karras et al. 2022 (EDM), eq. 7, with a filter in place of c_skip.

        x_0_hat = W(x_t) + c_out F(c_in x_t, W(x_t) / std)

    W is the Wiener filter of a stationary Gaussian with the latents' power spectrum (a DCT over the whole latent, so any size), c_out
    its standard error in each channel, F the UNet, whose last layer starts at zero. The output is v, as v-prediction asks for
    (Salimans & Ho 2022, section 4).

    With an estimate m of x_0 (`centre_on_estimate`) the filter works on what m leaves, whose spectrum is another:

        x_0_hat = m + W'(x_t - alpha m) + c_out F(c_in x_t, (m + W'(x_t - alpha m)) / std)

    If the deviation of what m leaves is known too (`scaled`), at every place, W' and c_out follow from it in place of the spectrum.

    Args:
        beta_start, beta_end: the noise levels are those of the "scaled_linear" schedule, rescaled to zero terminal SNR (Lin et al. 2024).
        in_channels: C of x_t, and further channels that F sees as they are.
        centred: whether the last C of the further channels are an estimate of x_0.
        scaled: whether the C channels before those are log2 of the estimate's standard deviation.
        options: all other arguments of `UNet2DConditionModel`.
    """

    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 4,
        beta_start=0.00085,
        beta_end=0.012,
        centred=False,
        scaled=False,
        **options,
    ):
        super().__init__(in_channels=in_channels + out_channels, out_channels=out_channels, **options)
        self.register_to_config(in_channels=in_channels, beta_start=beta_start, beta_end=beta_end, centred=False, scaled=False)
        self.register_buffer("log2_power", torch.zeros(out_channels, KNOTS))
        if centred:
            self.centre_on_estimate(scaled)
        torch.nn.init.zeros_(self.conv_out.weight)
        torch.nn.init.zeros_(self.conv_out.bias)

    @property
    def input_dtype(self) -> torch.dtype:
        """Of x_t: the filter works in float32, whatever the type of the weights."""
        return torch.float32

    @staticmethod
    def _get_init_keys(input_class):  # config.json holds the UNet's own arguments too
        return ConfigMixin._get_init_keys(UNet2DConditionModel) | {"beta_start", "beta_end", "centred", "scaled"}

    def forward(
        self, sample: Tensor, timestep: Tensor | float | int, encoder_hidden_states: Tensor, *args, return_dict=True, **options
    ):
        """As `UNet2DConditionModel`: sample [B, in_channels, h, w] -> v [B, out_channels, h, w]."""
        channels, dtype = self.config.out_channels, self.dtype
        x_t, extra = sample[:, :channels].float(), sample[:, channels:]
        alpha, sigma = self.levels(timestep, len(sample), sample.device)
        power = self.power(*sample.shape[-2:])
        variance, mean = power.mean((1, 2))[:, None, None], torch.zeros_like(x_t)
        if self.config.centred:
            mean = extra[:, -channels:].float()

        if self.config.scaled:
            power = extra[:, -2 * channels : -channels].float().exp2().square()  # of what the estimate leaves, at each place
            total = alpha**2 * power + sigma**2
            wiener = mean + alpha * power / total * (x_t - alpha * mean)
            c_out = (sigma**2 * power / total).sqrt()
        else:
            power = _power(self.log2_remainder, *sample.shape[-2:]) if self.config.centred else power
            total = alpha**2 * power + sigma**2
            wiener = mean + inverse_dct(alpha * power / total * dct(x_t - alpha * mean))
            c_out = (sigma**2 * power / total).mean((2, 3), keepdim=True).sqrt()
        c_in = (alpha**2 * variance + sigma**2) ** -0.5
        seen = torch.cat([c_in * x_t, wiener * variance**-0.5], 1).to(dtype)
        output = super().forward(
            torch.cat([seen, extra.to(dtype)], 1), timestep, encoder_hidden_states, *args, return_dict=False, **options
        )[0]
        x_0_hat = wiener + c_out * output.float()
        v = ((alpha * x_t - x_0_hat) / sigma).to(sample.dtype)
        return UNet2DConditionOutput(sample=v) if return_dict else (v,)

    def levels(self, timestep, batch, device):
        """alpha and sigma [B, 1, 1, 1] float32."""
        t = torch.as_tensor(timestep, device=device).reshape(-1).expand(batch).long()
        table = _levels(self.config.beta_start, self.config.beta_end, device)
        return table[:, t][..., None, None, None]

    def power(self, h: int, w: int) -> Tensor:
        """Expected square of the DCT coefficients of x_0 [C, h, w]."""
        return _power(self.log2_power, h, w)

    def centre_on_estimate(self, scaled: bool = False) -> None:
        """From now on the last C further channels are an estimate of x_0. scaled: log2 of its standard deviation is in the C before it; else
        `fit_remainder` measures what it leaves."""
        if not scaled:
            self.register_buffer("log2_remainder", self.log2_power.clone())
        self.register_to_config(centred=True, scaled=scaled)

    def fit(self, latents) -> None:
        """Measure the spectrum on latents [C, h, w] of any sizes."""
        self.log2_power.copy_(_log2_spectrum(latents))

    def fit_remainder(self, remainders) -> None:
        """Measure the spectrum of x_0 minus its estimate, [C, h, w] each, of any sizes."""
        self.log2_remainder.copy_(_log2_spectrum(remainders))


def _power(log2_power, h, w):
    """[C, KNOTS] -> [C, h, w]"""
    below, weight = _knots(h, w, log2_power.device)
    table = log2_power.float()
    return torch.lerp(table[:, below], table[:, below + 1], weight).exp2()


@torch.no_grad()
def _log2_spectrum(latents):
    """log2 of the mean square of the DCT coefficients around each knot, [C, KNOTS]."""
    sums = counts = torch.zeros(())
    for x_0 in latents:
        below, weight = _knots(*x_0.shape[-2:], x_0.device)
        nearest = (below + weight.round().long()).flatten()
        square = dct(x_0).square().flatten(1).double()
        sums = sums + square.new_zeros(len(x_0), KNOTS).index_add_(1, nearest, square)
        counts = counts + square.new_zeros(KNOTS).index_add_(0, nearest, torch.ones_like(square[0]))
    measured = counts.nonzero().squeeze(1)  # small pictures lack the lowest frequencies
    nearest = measured[(torch.arange(KNOTS, device=measured.device)[:, None] - measured).abs().argmin(1)]
    return (sums / counts.clamp(min=1))[:, nearest].clamp(min=2**-30).log2()


@lru_cache(8)
def _levels(beta_start, beta_end, device):
    """[2, T] float32: alpha and sigma."""
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=beta_start, beta_end=beta_end, rescale_betas_zero_snr=True
    )
    noise = schedule.from_scheduler(scheduler)
    return torch.stack([noise.alpha, noise.sigma]).float().to(device)


@lru_cache(64)
def _knots(h, w, device):
    """The knot below each DCT coefficient, and the weight of the next one: [h, w] each."""
    y, x = (torch.arange(side, dtype=torch.float32) / (2 * side) for side in (h, w))
    radius = torch.hypot(y[:, None], x[None])  # cycles per latent pixel
    position = (radius.clamp(min=LOWEST) / LOWEST).log2() / math.log2(HIGHEST / LOWEST) * (KNOTS - 1)
    below = position.long().clamp(max=KNOTS - 2)
    return below.to(device), (position - below).float().to(device)
