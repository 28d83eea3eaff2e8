"""The quantization of a Relic file's latent: which channels are coded, how finely, and what noise that makes.

Plain rounding takes the fewest bits: a weak coefficient becomes 0 and costs next to nothing. Universal quantization, rounding with a dither
that both sides know, makes noise of variance D^2 / 12, uniform and independent of the picture (Ziv 1985; Relic et al. 2025), but a weak
coefficient then costs bits, so that weak channels are left out.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_compress.codecs.relic.format import MAX_SIDE, SCALE_STEPS, SHIFT_PARTS, Parameters, step_width
from diffusers_compress.coding import context_model, randomness
from diffusers_compress.coding.logistic import UNIT
from diffusers_compress.errors import Corrupt

CELL = 2  # positions of a latent that a map of levels has one place for, both ways
BACKGROUND = 2  # level where nothing matters: steps 4 times as wide
BLOCK = 4  # side of a part of the latent in `worth_coding`


class Quantizer:
    """What a file's parameters say of a latent [C, h, w]: step widths, means, dither.

    y_hat = mean + D v / UNIT with integers v = UNIT k - dither, where the sender has k = round((y - mean) / D + dither / UNIT).
    """

    def __init__(self, parameters: Parameters, statistics: dict, shape: tuple[int, int, int]):
        self.shape, self.dithered = shape, parameters.dithered
        channels, std = shape[0], statistics["std"]
        scales, shifts = parameters.scales or [0] * channels, parameters.shifts or [0] * channels
        if len(parameters.coded) != channels:
            raise Corrupt(f"the file has parameters of {len(parameters.coded)} channels, the model's latents have {channels}")
        steps = [step_width(parameters.step + SCALE_STEPS * scale) for scale in scales]
        self.units = context_model.units_of(std, steps, parameters.coded)
        self.steps, self.std = (np.array(column)[:, None] for column in (steps, std))
        self.mean = np.array(statistics["mean"])[:, None] + self.steps * np.array(shifts)[:, None] / SHIFT_PARTS
        if parameters.levels:
            self.steps = self.steps * 2.0 ** levels_at(parameters.levels, *shape[1:])
        self.coded = np.array(self.units)[:, None] > 0
        self.dither = np.zeros((channels, shape[1] * shape[2]), dtype=np.int64)
        if parameters.dithered:
            words = randomness.words(self.dither.size, randomness.DITHER)
            self.dither += 2 * (words.numpy().reshape(self.dither.shape) % (UNIT // 2)) - UNIT // 2 + 1

    def values(self, x_0: Tensor) -> np.ndarray:
        """v [C, h w] of a latent."""
        y = (x_0.detach().cpu().double().numpy().reshape(self.dither.shape) - self.mean) / self.steps
        k = np.floor(y + self.dither / UNIT + 0.5).astype(np.int64)
        return np.where(self.coded, k * UNIT - self.dither, 0)

    def latent(self, v: np.ndarray) -> Tensor:
        """y_hat [C, h, w]: x_0 and, with dither, noise of variance D^2 / 12, also in channels that are not coded."""
        # What is missing at a channel's variance below D^2 / 12
        noise = np.sqrt(np.maximum(0, 1 - 12 * (self.std / self.steps) ** 2)) * -self.dither
        y = self.mean + self.steps * np.where(self.coded, v, noise) / UNIT
        return torch.from_numpy(y).reshape(self.shape)

    def level(self, v: np.ndarray | None = None, x_0: Tensor | None = None) -> float:
        """Standard deviation of the noise in `latent`: expected with dither, that of the sender's own v and x_0 without."""
        if self.dithered:
            return float(np.sqrt(np.mean(self.steps**2) / 12))
        return max(1e-9, float((self.latent(v) - x_0.detach().cpu()).square().mean()) ** 0.5)


def levels_of(importance: Tensor) -> list[list[int]]:
    """The map of a file, from 1 at the most important places to 0 in the background [h, w]: 0 there, BACKGROUND here."""
    size = [min(-(-side // CELL), MAX_SIDE) for side in importance.shape]
    coarse = F.adaptive_max_pool2d(importance[None, None], size)[0, 0]
    return (BACKGROUND * (1 - coarse)).round().long().tolist()


def levels_at(levels: list[list[int]], height: int, width: int) -> np.ndarray:
    """Of each position, [h w]: the map drawn out over the latent."""
    rows, columns = len(levels), len(levels[0])
    return np.array(levels)[np.arange(height)[:, None] * rows // height, np.arange(width) * columns // width].reshape(-1)


def powers(x_0: Tensor, statistics: dict) -> Tensor:
    """Mean square of each channel in parts of a latent [C, h, w], around the channel's mean: [C, parts]."""
    y = x_0 - torch.tensor(statistics["mean"], dtype=torch.float32)[:, None, None]
    return F.avg_pool2d(y.square()[:, None], BLOCK, ceil_mode=True, count_include_pad=False).flatten(1)


def worth_coding(power: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """Of each channel [C] under dither, whether its bits do as much good as those of finer steps would (at least one is worth it); bits per
    position [C, parts].

    With noise of variance N, a part of the picture with the variance P takes log2(1 + P / N) / 2 bits and brings the error from P to
    P N / (P + N); where P is large, a bit is worth 2 ln 2 N.
    """
    noise = step**2 / 12
    bits = (1 + power / noise).log2() / 2
    worth = (power.square() / (power + noise) - 2 * math.log(2) * noise * bits).sum(1)
    return worth >= min(0, float(worth.max())), bits
