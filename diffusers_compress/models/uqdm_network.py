"""The denoiser of UQDM: a UNet that sees fine phases of its input and also says how wrong it is."""

import math

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.configuration_utils import ConfigMixin
from torch import Tensor, nn

from diffusers_compress import _diffusers  # noqa: F401 - makes the package a library that components load from

FREQUENCIES = (2**5, 2**6)  # of the phases, in periods per unit of z
UNIT_FACTOR = math.log(math.e - 1)  # softplus of it is 1


class UQDMNetwork(UNet2DModel):
    """`UNet2DModel` for pixels, as in Yang, Will & Mandt 2025 (after Kingma et al. 2021, Variational Diffusion Models).

    The UNet sees z and the sines and cosines of its fine phases. It gives what is added to z for the noise epsilon_hat, and, for
    each element, a factor of the scale of the reference p(z_s | z_t).

    Args:
        in_channels: C of z.
        patch: side of the squares of pixels that the UNet sees as one.
        preconditioned: the UNet sees z and its details in units of the noise instead, and gives v (Salimans & Ho 2022). So a
            network starts much nearer to what it is to learn.
        options: other arguments of `UNet2DModel`; its out_channels follow from in_channels.
    """

    def __init__(self, in_channels: int = 3, patch: int = 1, preconditioned: bool = False, **options):
        seen = in_channels * (2 if preconditioned else 1 + 2 * len(FREQUENCIES))
        options = {"freq_shift": 1, "flip_sin_to_cos": False, **options, "out_channels": 2 * in_channels * patch**2}
        super().__init__(in_channels=seen * patch**2, **options)
        self.register_to_config(in_channels=in_channels, patch=patch, preconditioned=preconditioned)
        self.time_proj = _Timesteps(self.time_proj.num_channels)

    @staticmethod
    def _get_init_keys(input_class):  # config.json holds the UNet's own arguments too
        return ConfigMixin._get_init_keys(UNet2DModel) | {"patch", "preconditioned"}

    def forward(self, z: Tensor, time: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """z: [B, C, h, w]; time: [B] in [0, 1]; sigma: [B], deviation of the noise in z -> (epsilon_hat, factor), [B, C, h, w]
        each."""
        sigma = sigma[:, None, None, None].to(z)
        if self.config.preconditioned:
            details = z - F.avg_pool2d(F.pad(z, (1, 1, 1, 1), mode="replicate"), 3, 1)
            features = [z, (details / sigma).tanh()]
        else:
            phases = torch.cat([2 * math.pi * frequency * z for frequency in FREQUENCIES], 1)
            features = [z, phases.sin(), phases.cos()]
        seen = F.pixel_unshuffle(torch.cat(features, 1), self.config.patch)
        output = super().forward(seen, 1000 * time, return_dict=False)[0]
        noise, factor = F.pixel_shuffle(output, self.config.patch).chunk(2, 1)
        noise = sigma * z + (1 - sigma**2).sqrt() * noise if self.config.preconditioned else z + noise
        return noise, F.softplus(factor + UNIT_FACTOR)


class _Timesteps(nn.Module):
    """Vaswani et al. 2017, section 3.5, in float64, so that all machines agree: [B] -> [B, channels]."""

    def __init__(self, channels):
        super().__init__()
        self.num_channels = channels

    def forward(self, timesteps):
        half = self.num_channels // 2
        rates = 10000 ** (-torch.arange(half, dtype=torch.float64, device=timesteps.device) / (half - 1))
        angles = timesteps[:, None].double() * rates
        return torch.cat([angles.sin(), angles.cos()], 1)
