"""What CDC sends of a picture, and how the denoiser gets to see it: a latent, side information, and a pyramid of features.

Yang & Mandt, Lossy Image Compression with Conditional Diffusion Models (NeurIPS 2023), with the mean-scale hyperprior of Minnen et al.
2018. Whatever decides a table of the range coder is computed in integers; a published model does not need more than that its
weights are put on a grid.
"""

import math
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from diffusers_compress._diffusers import ModelMixin
from diffusers_compress.coding.logistic import PER_OCTAVE, UNIT
from diffusers_compress.models.cdc_unet import ResidualBlock, embedding
from diffusers_compress.models.fixed_point import FixedPointConv, FixedPointNetwork, leaky
from diffusers_compress.models.hyperprior import LARGEST_INDEX, ONE, code_length, integers, rounded

HYPER_STRIDE = 4  # of the side information, in positions of the latent
SMALLEST_STD = UNIT // 10  # of the published model, in parts of UNIT
UNIT_INDEX = 20  # of a logistic distribution with the scale 1


class CDCContextModel(ModelMixin, ConfigMixin):
    """Component "context_model" of `CDCPipeline`.

    y, the latent, is analysed from the picture and rounded in steps of 1 off its mean; z, the side information, from y. Mean and scale
    of each y follow from z_hat. The decoder makes the context of y_hat: features at resolutions from that of the picture down.
    The defaults are the published network.

    Args:
        channels: of the picture.
        widths: channels after each halving, the last those of y.
        hyper_widths: channels of the hyper-encoder's layers, the last those of z.
        context_channels: of the finest features.
        kernel: of the first convolution.
        patch: side of the squares of pixels that the network sees as one.
        levels: rates that one model serves: 1, or more, where 0 is the lowest.
        log_scales: whether the hyper-decoder gives the logarithm of the scales, or the standard deviations themselves.
        preview: whether the first channels of the finest features are an estimate of the picture.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        channels: int = 3,
        widths: Sequence[int] = (64, 128, 192, 256),
        hyper_widths: Sequence[int] = (256, 256, 256),
        context_channels: int = 64,
        kernel: int = 7,
        patch: int = 1,
        levels: int = 1,
        log_scales: bool = False,
        preview: bool = False,
    ):
        super().__init__()
        seen, told = channels * patch**2, levels > 1
        known = widths[0] if told else 0
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        for i, (n_in, n_out) in enumerate(zip([seen, *widths], widths)):
            block = ResidualBlock(n_in, n_out, known, 3 if i else kernel)
            self.encoder.append(Stage(block, nn.Conv2d(n_out, n_out, 3, 2, 1)))
        for n_in, n_out in zip(widths[::-1], [*widths[-2::-1], widths[0]]):
            is_last = len(self.decoder) == len(widths) - 1
            scale = nn.ConvTranspose2d(n_out, context_channels if is_last else n_out, 4, 2, 1)
            self.decoder.append(Stage(ResidualBlock(n_in, n_out, known), scale))
        first, second, last = hyper_widths
        self.hyper_encoder = nn.ModuleList(
            [nn.Conv2d(widths[-1], first, 3, 1, 1), nn.Conv2d(first, second, 5, 2, 2), nn.Conv2d(second, last, 5, 2, 2)]
        )
        self.hyper_decoder = FixedPointNetwork(
            [
                FixedPointConv(last + told, second, 5, doubles=True),
                FixedPointConv(second, first, 5, doubles=True),
                FixedPointConv(first, 2 * widths[-1], 3),
            ]
        )
        self.z_mean = nn.Parameter(torch.zeros(last))
        self.z_index = nn.Parameter(torch.full((last,), UNIT_INDEX / ONE))
        if told:
            self.rate_mlp = embedding(1, known)
            self.log2_gain = nn.Parameter(torch.zeros(2, widths[-1]))  # at the lowest and the highest rate

    # ------------------------------------------------------------------------------------------------------------ shapes

    @property
    def multiple(self) -> int:
        """What sides of pictures have to be multiples of: those of a position of y, in pixels."""
        return self.config.patch * 2 ** len(self.config.widths)

    def y_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Of the latent of a picture of height x width pixels, multiples of `multiple`."""
        return self.config.widths[-1], height // self.multiple, width // self.multiple

    def z_shape(self, height: int, width: int) -> tuple[int, int, int]:
        _, h, w = self.y_shape(height, width)
        return self.config.hyper_widths[-1], -(-h // HYPER_STRIDE), -(-w // HYPER_STRIDE)

    def rate_of(self, level: int) -> float | None:
        """A level as what the networks are told, in [0, 1]; None if there is only one."""
        return level / (self.config.levels - 1) if self.config.levels > 1 else None

    # ---------------------------------------------------------------------------------------------------------- networks

    def analyse(self, x: Tensor, rate: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Pictures [B, C, H, W] in [-1, 1], sides multiples of `multiple`; rate [B] in [0, 1] if there are several ->
        y [B, M, h, w] and z [B, Z, a, b], not yet rounded. The sender's alone: no reader depends on its floats."""
        h, known = F.pixel_unshuffle(x, self.config.patch), self.known(rate)
        for stage in self.encoder:
            h = stage(h, known)
        y = h if rate is None else h * self.gain(rate)
        h = F.pad(y, (0, -y.shape[3] % HYPER_STRIDE, 0, -y.shape[2] % HYPER_STRIDE))
        for layer in self.hyper_encoder[:-1]:
            h = leaky(layer(h))
        return y, self.hyper_encoder[-1](h)

    def synthesise(self, y_hat: Tensor, rate: Tensor | None = None) -> list[Tensor]:
        """y_hat [B, M, h, w] -> the context, [B, c, H, W] each, finest first."""
        h, known = y_hat if rate is None else y_hat / self.gain(rate), self.known(rate)
        context = []
        for stage in self.decoder:
            h = stage(h, known)
            context.insert(0, h)
        return context

    def preview(self, context: list[Tensor]) -> Tensor:
        """The estimate of the picture [B, C, H, W] that the context holds."""
        patch = self.config.patch
        return F.pixel_shuffle(context[0][:, : self.config.channels * patch**2], patch)

    def known(self, rate: Tensor | None) -> Tensor | None:
        return None if rate is None else self.rate_mlp(rate[:, None])

    def gain(self, rate: Tensor) -> Tensor:
        """Of y, [B, M, 1, 1]: what it is multiplied by before it is rounded. After Cui et al. 2021 (gained variational autoencoder)."""
        low, high = self.log2_gain
        return torch.lerp(low, high, rate[:, None]).exp2()[..., None, None]

    # ---------------------------------------------------------------------------------------------------------- training

    def forward(self, x: Tensor, rate: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """Pictures [B, C, H, W] -> (context, bits [B]) by the model's probabilities, those of the tables. In training the bits
        are those of uniform noise, and gradients go straight through the rounding, from which the context follows."""
        y, z = (a.float() for a in self.analyse(x, rate))
        z_mean, in_tables = self.z_mean[:, None, None], not self.training
        bits = code_length(self.disturbed(z - z_mean), self.z_indices(rounded)[:, None, None], in_tables).flatten(1).sum(1)
        mean, index = self.distributions(rounded(z - z_mean) + z_mean, rate)
        mean, index = (a.float()[..., : y.shape[2], : y.shape[3]] for a in (mean, index))
        bits = bits + code_length(self.disturbed(y - mean), index, in_tables).flatten(1).sum(1)
        return self.synthesise(rounded(y - mean) + mean, rate), bits

    def disturbed(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x) - 0.5 if self.training else x.round()

    def distributions(self, z_hat: Tensor, rate: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and index of the table of `logistic` [B, M, h, w], not yet rounded."""
        if rate is not None:
            z_hat = torch.cat([z_hat, rate[:, None, None, None].expand(-1, 1, *z_hat.shape[2:])], 1)
        mean, scale = self.hyper_decoder(z_hat).chunk(2, 1)
        if not self.config.log_scales:
            # A standard deviation, from below with the gradient of what it would be
            std = scale + (scale.clamp(min=SMALLEST_STD / UNIT) - scale).detach()
            scale = (std * math.sqrt(3) / math.pi).log2()
        return mean, (UNIT_INDEX + PER_OCTAVE * scale).clamp(0, LARGEST_INDEX)

    # ------------------------------------------------------------------------------------------------------ integers

    @torch.no_grad()
    def settle(self) -> None:
        """After training, once: put what tables follow from on its grid, so that no cast to another type moves it."""
        self.hyper_decoder.settle()
        self.z_mean.copy_(self.z_mean.bfloat16())
        self.z_index.copy_(integers(self.z_index) / ONE)

    def z_indices(self, rounding: Callable = torch.round) -> Tensor:
        """Tables of the channels of z, [Z]."""
        return rounding(ONE * self.z_index).clamp(0, LARGEST_INDEX)

    def z_tables(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the channels of z the means, in parts of UNIT, and tables of `logistic`: [Z] int64 each."""
        mean = (UNIT * self.z_mean.detach().double()).round()
        return mean.cpu().numpy().astype(np.int64), self.z_indices().detach().double().cpu().numpy().astype(np.int64)

    @torch.no_grad()
    def tables(self, z_hat: np.ndarray, level: int, h: int, w: int) -> tuple[np.ndarray, np.ndarray]:
        """z_hat [Z, a, b] in parts of UNIT -> the means of y, in parts of UNIT, and tables of `logistic`: [M, h, w] int64 each."""
        x = torch.from_numpy(z_hat).double()[None]
        rate = self.rate_of(level)
        if rate is not None:
            x = torch.cat([x, torch.full_like(x[:, :1], round(UNIT * rate))], 1)
        mean, scale = self.hyper_decoder.exact(x)[0, :, :h, :w].long().numpy().reshape(2, -1, h, w)
        if self.config.log_scales:
            index = UNIT_INDEX + (PER_OCTAVE * scale + UNIT // 2) // UNIT
        else:
            index = np.searchsorted(std_thresholds(), np.maximum(scale, SMALLEST_STD), side="right")
        return mean, index.clip(0, LARGEST_INDEX)

    def identity(self) -> int:
        """CRC-32 of all that tables follow from: the integers of the hyper-decoder and of z's tables."""
        arrays = [*self.z_tables(), *self.hyper_decoder.numbers()]
        return zlib.crc32(b"".join(array.astype("<i4").tobytes() for array in arrays))


class Stage(nn.Module):
    """A residual block, and the way to the next resolution."""

    def __init__(self, block: ResidualBlock, scale: nn.Module):
        super().__init__()
        self.block, self.scale = block, scale

    def forward(self, h: Tensor, known: Tensor | None) -> Tensor:
        return self.scale(self.block(h, known))


def std_thresholds() -> np.ndarray:
    """Standard deviations, in parts of UNIT, from which on the next table is nearer."""
    log2_scale = (np.arange(LARGEST_INDEX) + 0.5 - UNIT_INDEX) / PER_OCTAVE
    return np.ceil(UNIT * math.pi / math.sqrt(3) * 2.0**log2_scale).astype(np.int64)
