"""What a base's latent says of the picture's: a small convolutional network, for refined files."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class BaseEstimator(ModelMixin, ConfigMixin):
    """The latent x_0 of a picture, given that of its base, y = E(base), as an independent Gaussian at every place: mean and deviation.

    Trained by its likelihood; untrained it says N(y, errors^2). A JPEG's mean has fewer block edges, and the deviation is large where there
    is texture.

    Args:
        latent_channels: C.
        width: channels within.
        blocks: of two convolutions each.
    """

    @register_to_config
    def __init__(self, latent_channels: int, width: int = 64, blocks: int = 3):
        super().__init__()
        self.first = nn.Conv2d(2 * latent_channels, width, 3, padding=1)
        self.body = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(blocks)
        )
        self.last = nn.Conv2d(width, 2 * latent_channels, 3, padding=1)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, y: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
        """Latents y [B, C, h, w] and the rms error [B, C] of each channel -> mean and log2 of the deviation, [B, C, h, w] in float32."""
        scale = errors.float()[..., None, None]
        features = self.first(torch.cat([y.float(), scale.log2().expand_as(y)], 1).to(self.dtype))
        for block in self.body:
            features = features + block(features)
        shift, log2_ratio = self.last(nn.functional.silu(features)).float().chunk(2, 1)
        return y + scale * shift, scale.log2() + log2_ratio.clamp(-6, 3)
