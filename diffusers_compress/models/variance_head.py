"""A small network that says where in the picture the denoiser errs, on top of what calibration says of each frequency."""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor, nn

from diffusers_compress._diffusers import ModelMixin
from diffusers_compress.coding import dct


class VarianceHead(ModelMixin, ConfigMixin):
    """Log of the factor by which the error variance of each block's coefficient differs from the calibrated one.

    Sees the block transforms of x_0_hat and of the noise that the denoiser found, (x_t - alpha_t x_0_hat) / sigma_t, and the noise
    level. Trained by the Gaussian likelihood of the coefficients of x_0 - x_0_hat with the denoiser frozen
    (`examples/train_variance_head.py`).

    Args:
        latent_channels: C.
        width: channels of the hidden layers.
    """

    @register_to_config
    def __init__(self, latent_channels: int = 4, width: int = 64):
        super().__init__()
        coefficients = latent_channels * dct.BLOCK**2
        self.level = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.first = nn.Conv2d(2 * coefficients, width, 1)
        self.middle = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1, padding_mode="replicate") for _ in range(2)])
        self.last = nn.Conv2d(width, coefficients, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x_0_hat: Tensor, epsilon_hat: Tensor, level: Tensor) -> Tensor:
        """x_0_hat, epsilon_hat: [B, C, h, w]; level: log(1 + snr) [B] -> [B, C, h, w] float32, zero for the blocks' means."""
        h, w = x_0_hat.shape[-2:]
        x = dct.block_transform(torch.cat([x_0_hat, epsilon_hat], 1).float())
        x = F.pad(x, (0, -w % dct.BLOCK, 0, -h % dct.BLOCK))
        x = F.pixel_unshuffle(x, dct.BLOCK).square().add(1e-3).log()
        x = self.first(x.to(self.dtype)) + self.level(level.to(self.dtype)[:, None])[..., None, None]
        for layer in self.middle:
            x = x + layer(F.silu(x))
        x = F.pixel_shuffle(self.last(F.silu(x)).float(), dct.BLOCK)[..., :h, :w]
        x[..., :: dct.BLOCK, :: dct.BLOCK] = 0
        return x
