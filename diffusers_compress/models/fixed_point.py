"""Convolutions whose output is the same on all machines: their weights and activations are integers in fixed point.

Weights are integers in [-127, 127] times a power of two for each output channel, which float16 and bfloat16 hold exactly; activations
are in parts of `UNIT`. Sums of their products stay below 2^53, so float64 holds them exactly in any order of summation.
"""

from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusers_compress.coding.logistic import UNIT

LARGEST = 127  # of weights
SMALLEST = 2.0**-16  # of a channel's largest weight, so that float16 holds the others
LIMIT = UNIT << 11  # of activations, in parts
LEAKY = 13107, 1 << 15  # an integer x below 0 becomes (13107 x + 2^15) >> 16
SLOPE = LEAKY[0] / 65536


class FixedPointConv(nn.Module):
    """`nn.Conv2d`, or `nn.ConvTranspose2d` that doubles the sides. [B, n_in, h, w] -> [B, n_out, h, w] or [B, n_out, 2h, 2w].

    Calling it gives floats, with a gradient, for training; `exact` takes and gives integers.
    """

    def __init__(self, n_in: int, n_out: int, kernel: int, doubles: bool = False):
        super().__init__()
        self.doubles = doubles
        kind = nn.ConvTranspose2d if doubles else nn.Conv2d
        layer = kind(n_in, n_out, kernel, padding=kernel // 2)
        self.weight, self.bias = layer.weight, cast(nn.Parameter, layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        integers, step = self.integers()
        weight = self.weight + ((integers * step).to(self.weight) - self.weight).detach()
        return self.convolve(x, weight) + self.bias[:, None, None]

    def exact(self, x: Tensor) -> Tensor:
        """x: float64 integers in parts of UNIT, and so the output: floor(weight * x + bias + 1/2), within LIMIT."""
        integers, step = (part.cpu() for part in self.integers())
        # The sum is an integer: rounding it takes away what another way of summing might have added
        total = self.convolve(x, integers).round() * step.view(-1, 1, 1)
        bias = (UNIT * self.bias.detach().cpu().double()).round()[:, None, None]
        return (total + bias + 0.5).floor().clamp(-LIMIT, LIMIT)

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        padding = weight.shape[-1] // 2
        if self.doubles:
            return F.conv_transpose2d(x, weight, stride=2, padding=padding, output_padding=1)
        return F.conv2d(x, weight, padding=padding)

    def integers(self) -> tuple[Tensor, Tensor]:
        """The weight as integers in [-127, 127] times a power of two for each output channel: (integers, powers), float64."""
        weight = self.weight.detach().double()
        largest = weight.abs().amax((0, 2, 3) if self.doubles else (1, 2, 3), keepdim=True).clamp(min=SMALLEST)
        step = largest / largest.frexp().mantissa / (LARGEST + 1)
        return (weight / step).round().clamp(-LARGEST, LARGEST), step

    def numbers(self) -> list[np.ndarray]:
        """All that `exact` follows from: the weight's integers, binary logarithms of their powers, and the bias in parts of UNIT."""
        integers, step = self.integers()
        bias = (UNIT * self.bias.detach().double()).round()
        return [tensor.cpu().numpy() for tensor in (integers, step.frexp().exponent - 1, bias)]

    @torch.no_grad()
    def settle(self) -> None:
        """Put weight and bias on their grids, so that no cast to another type moves them."""
        integers, step = self.integers()
        self.weight.copy_(integers * step)
        self.bias.copy_(self.bias.bfloat16())


class FixedPointNetwork(nn.ModuleList):
    """Layers with leaky ReLUs between."""

    @property
    def layers(self) -> list[FixedPointConv]:
        return cast(list[FixedPointConv], list(self))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = leaky(layer(x))
        return self.layers[-1](x)

    def exact(self, x: Tensor) -> Tensor:
        """Integers in parts of UNIT, as float64, to the same. What a ReLU makes of them is rounded: down, scales would be too small."""
        for layer in self.layers[:-1]:
            x = (leaky(layer.exact(x)) + 0.5).floor()
        return self.layers[-1].exact(x)

    def settle(self) -> None:
        """See `FixedPointConv.settle`."""
        for layer in self.layers:
            layer.settle()

    def numbers(self) -> list[np.ndarray]:
        """See `FixedPointConv.numbers`; before them those of the ReLU."""
        return [np.array(LEAKY), *(array for layer in self.layers for array in layer.numbers())]


def leaky(x: Tensor) -> Tensor:
    """Leaky ReLU."""
    return torch.where(x < 0, SLOPE * x, x)
