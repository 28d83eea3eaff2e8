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

    Args:
        beta_start, beta_end: the noise levels are those of the "scaled_linear" schedule, rescaled to zero terminal SNR (Lin et al. 2024).
        in_channels: C of x_t, and further channels that F sees as they are.
        options: all other arguments of `UNet2DConditionModel`.
    """

    def __init__(self, in_channels: int = 4, out_channels: int = 4, beta_start=0.00085, beta_end=0.012, **options):
        super().__init__(in_channels=in_channels + out_channels, out_channels=out_channels, **options)
        self.register_to_config(in_channels=in_channels, beta_start=beta_start, beta_end=beta_end)
        self.register_buffer("log2_power", torch.zeros(out_channels, KNOTS))
        torch.nn.init.zeros_(self.conv_out.weight)
        torch.nn.init.zeros_(self.conv_out.bias)

    @property
    def input_dtype(self) -> torch.dtype:
        """Of x_t: the filter works in float32, whatever the type of the weights."""
        return torch.float32

    @staticmethod
    def _get_init_keys(input_class):  # config.json holds the UNet's own arguments too
        return ConfigMixin._get_init_keys(UNet2DConditionModel) | {"beta_start", "beta_end"}

    def forward(
        self, sample: Tensor, timestep: Tensor | float | int, encoder_hidden_states: Tensor, *args, return_dict=True, **options
    ):
        """As `UNet2DConditionModel`: sample [B, in_channels, h, w] -> v [B, out_channels, h, w]."""
        channels = self.config.out_channels
        x_t, extra = sample[:, :channels].float(), sample[:, channels:]
        alpha, sigma = self.levels(timestep, len(sample), sample.device)
        power = self.power(*sample.shape[-2:])

        total = alpha**2 * power + sigma**2
        wiener = inverse_dct(alpha * power / total * dct(x_t))
        c_out = (sigma**2 * power / total).mean((2, 3), keepdim=True).sqrt()
        variance = power.mean((1, 2))[:, None, None]
        c_in = (alpha**2 * variance + sigma**2) ** -0.5
        seen = torch.cat([c_in * x_t, wiener * variance**-0.5], 1).to(self.dtype)
        output = super().forward(
            torch.cat([seen, extra.to(self.dtype)], 1), timestep, encoder_hidden_states, *args, return_dict=False, **options
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
        below, weight = _knots(h, w, self.log2_power.device)
        table = self.log2_power.float()
        return torch.lerp(table[:, below], table[:, below + 1], weight).exp2()

    @torch.no_grad()
    def fit(self, latents) -> None:
        """Measure the spectrum on latents [C, h, w] of any sizes."""
        sums = self.log2_power.new_zeros(self.log2_power.shape, dtype=torch.float64)
        counts = sums.new_zeros(KNOTS)
        for x_0 in latents:
            below, weight = _knots(*x_0.shape[-2:], x_0.device)
            nearest = (below + weight.round().long()).flatten()
            sums.index_add_(1, nearest, dct(x_0).square().flatten(1).double())
            counts.index_add_(0, nearest, counts.new_ones(len(nearest)))
        measured = counts.nonzero().squeeze(1)  # small pictures lack the lowest frequencies
        nearest = measured[(torch.arange(KNOTS)[:, None] - measured).abs().argmin(1)]
        self.log2_power.copy_((sums / counts.clamp(min=1))[:, nearest].clamp(min=2**-30).log2())


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
