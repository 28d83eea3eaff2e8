"""The denoiser of CDC, a UNet that sees the decoded context at each of its resolutions, and the layers that both its networks have.

Yang & Mandt, Lossy Image Compression with Conditional Diffusion Models (NeurIPS 2023); layers after the published code, whose
weights `examples/convert_cdc.py` brings here.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from diffusers_compress._diffusers import ModelMixin


class CDCUNet(ModelMixin, ConfigMixin):
    """Component "unet" of `CDCPipeline`: what the scheduler's prediction type says, from x_t, t and the context.

    The defaults are the published network.

    Args:
        channels: of the picture.
        widths: channels at each resolution, each half the one before.
        context_widths: of the context at the first resolutions.
        blocks: residual blocks at each resolution, down and up.
        kernel: of the first and the last convolution.
        attention: whether each resolution has linear attention (Shen et al. 2021), over the whole picture.
        patch: side of the squares of pixels that the network sees as one.
        rate_input: whether it is told the rate.
        centred: whether the first channels of the finest context are an estimate of the picture, which the output is added to.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        channels: int = 3,
        widths: Sequence[int] = (64, 128, 192, 256, 320, 384),
        context_widths: Sequence[int] = (64, 64, 128, 192),
        blocks: int = 2,
        kernel: int = 7,
        attention: bool = True,
        patch: int = 1,
        rate_input: bool = False,
        centred: bool = False,
    ):
        super().__init__()
        seen, known = channels * patch**2, widths[0]
        self.time_mlp = embedding(1 + rate_input, known)
        n_in, attend = seen, Attention if attention else nn.Identity
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for i, n_out in enumerate(widths):
            first = n_in + (context_widths[i] if i < len(context_widths) else 0)
            halve = nn.Conv2d(n_out, n_out, 3, 2, 1) if i < len(widths) - 1 else nn.Identity()
            own = residual_blocks(first, n_out, blocks, known, kernel if i == 0 else 3)
            self.downs.append(Resolution(own, attend(n_out), halve))
            n_in = n_out
        self.middle = residual_blocks(n_in, n_in, 2, known)
        self.middle_attention = attend(n_in)
        for n_in, n_out in zip(widths[:0:-1], widths[-2::-1]):
            double = nn.ConvTranspose2d(n_out, n_out, 4, 2, 1)
            self.ups.append(Resolution(residual_blocks(2 * n_in, n_out, blocks, known), attend(n_out), double))
        self.norm_out = ChannelNorm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], seen, kernel, padding=kernel // 2)

    @property
    def multiple(self) -> int:
        """What sides of pictures have to be multiples of."""
        return self.config.patch * 2 ** (len(self.config.widths) - 1)

    def forward(self, x_t: Tensor, time: Tensor, context: Sequence[Tensor], rate: Tensor | None = None) -> Tensor:
        """x_t [B, C, H, W]; time [B]: t / T; context: [B, c, h, w] at the first resolutions; rate [B] in [0, 1], if it takes one ->
        [B, C, H, W]."""
        known = time if rate is None else torch.stack([time, rate], 1)
        known = self.time_mlp(known.view(len(x_t), -1).to(x_t))
        h, skips = F.pixel_unshuffle(x_t, self.config.patch), []
        for i, down in enumerate(self.downs):
            h = torch.cat([h, context[i]], 1) if i < len(context) else h
            features, h = down(h, known)
            skips.append(features)
        h = self.middle[0](h, known)
        h = self.middle[1](self.middle_attention(h), known)
        for up in self.ups:
            _, h = up(torch.cat([h, skips.pop()], 1), known)
        output = self.conv_out(self.norm_out(h))
        if self.config.centred:
            output = output + context[0][:, : output.shape[1]]
        return F.pixel_shuffle(output, self.config.patch)


# ------------------------------------------------------------------------------------------------------------------ layers


def embedding(n_in: int, width: int) -> nn.Sequential:
    """Of a few numbers in [0, 1]."""
    return nn.Sequential(nn.Linear(n_in, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def residual_blocks(n_in: int, n_out: int, count: int, known: int, kernel: int = 3) -> nn.ModuleList:
    return nn.ModuleList(ResidualBlock(n_out if i else n_in, n_out, known, 3 if i else kernel) for i in range(count))


class Resolution(nn.Module):
    """Residual blocks, attention, and the way to the next resolution: features [B, n_in, h, w] -> (features [B, n_out, h, w], and these
    scaled)."""

    def __init__(self, blocks: nn.ModuleList, attention: nn.Module, scale: nn.Module):
        super().__init__()
        self.blocks, self.attention, self.scale = blocks, attention, scale

    def forward(self, h: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            h = block(h, known)
        h = self.attention(h)
        return h, self.scale(h)


class ChannelNorm(nn.LayerNorm):
    """Layer normalization over the channels of each position of [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ResidualBlock(nn.Module):
    """Two convolutions, each normalized and rectified, beside a shortcut; told of `known` numbers between them, if any."""

    def __init__(self, n_in: int, n_out: int, known: int = 0, kernel: int = 3):
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, kernel, padding=kernel // 2)
        self.norm1 = ChannelNorm(n_out)
        self.embed = nn.Sequential(nn.LeakyReLU(0.2), nn.Linear(known, n_out)) if known else None
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1)
        self.norm2 = ChannelNorm(n_out)
        self.shortcut = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, x: Tensor, known: Tensor | None = None) -> Tensor:
        h = self.norm1(self.conv1(x)).relu()
        if self.embed is not None:
            h = h + self.embed(known)[..., None, None]
        return self.shortcut(x) + self.norm2(self.conv2(h)).relu()


class Attention(nn.Module):
    """Linear attention with one head, of the normalized input, added to the input. Shen et al. 2021 (Efficient attention)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.to_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(self.norm(x)).flatten(2).chunk(3, 1)
        found = (v @ k.softmax(-1).mT) @ q / x.shape[1] ** 0.5
        return x + self.to_out(found.unflatten(-1, x.shape[2:]))
