"""What a sender tells, and what it spends its bits on. `tune="ms-ssim"`: fewer bits for fine detail and where the picture is busy, of latents
that decode nearer to the picture in MS-SSIM (`fitting`). No receiver has to know.

Left alone, a sender tells all of x_0 - x_0_hat, for the least squared error. MS-SSIM gives the finest of its five scales a weight of .0448,
and divides an error by the picture's own variance around it (Wang, Simoncelli, Bovik 2003, "Multiscale structural similarity for image quality
assessment"). So a tuned sender tells a share of x_0 - x_0_hat, other for each channel and place. What it keeps back is left for later
steps, while there are any.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import Tensor

from diffusers_compress.codecs.diffc import fitting

TUNES = "psnr", "ms-ssim"
FINE = 2.0  # fineness of which half is told; that of lines is 2 at a period of 4 pixels, 4 at one of 2
SIDE = 8  # of the latents that fineness is measured with
BUSY = 0.01  # variance of pictures in [0, 1], from which on less is told
MASKING = 0.15  # power of the variance


class Tuned(NamedTuple):
    """What a tuned sender knows of its picture beside the latent."""

    shares: Tensor  # [C, h, w] in (0, 1], of what is told of x_0 - x_0_hat
    distance: Callable[[Tensor], tuple[float, Tensor]]  # `fitting.distance` of a latent [1, C, h, w] from the picture


def tuned(pipe: DiffusionPipeline, tune: str, pictures: Sequence[Tensor], x_0: Tensor) -> list[Tuned | None]:
    """Of each picture; None where everything is told.

    pictures: padded, [3, H, W] in [-1, 1]. x_0: their latents [B, C, h, w].
    """
    if tune == "psnr":
        return [None] * len(pictures)
    return [
        Tuned(own, partial(fitting.distance, pipe, picture.to(x_0.device)))
        for picture, own in zip(pictures, shares(pipe, pictures, x_0))
    ]


def shares(pipe: DiffusionPipeline, pictures: Sequence[Tensor], x_0: Tensor) -> list[Tensor]:
    """What is told of each picture's x_0 - x_0_hat: [C, h, w] in (0, 1]."""
    low_pass = 1 / (1 + (fineness(pipe, x_0) / FINE) ** 4)  # Butterworth's
    of_channel = (low_pass / low_pass.max())[:, None, None]
    h, w = x_0.shape[-2:]
    return [of_channel * visibility(picture, (h, w)).to(x_0.device) for picture in pictures]


def fineness(pipe: DiffusionPipeline, x_0: Tensor) -> Tensor:
    """Of each channel of latents like x_0, the power of the differences between neighbouring pixels over the pixels' own: [C], 0 to 8.

    Taken of the pattern that one coefficient draws on a plain picture. It is the mean of 4 - 2 cos(w_x) - 2 cos(w_y) over the pattern's
    frequencies w, in radians per pixel.
    """
    channels = x_0.shape[1]
    latents = x_0.new_zeros(channels + 1, channels, SIDE, SIDE)
    latents[range(channels), range(channels), SIDE // 2, SIDE // 2] = 1
    decoded = pipe.decode_latent(latents)
    patterns = decoded[:-1] - decoded[-1]
    across, down, own = (x.square().sum((1, 2, 3)) for x in (patterns.diff(dim=-1), patterns.diff(dim=-2), patterns))
    return (across + down) / own.clamp(min=1e-12)


def visibility(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """How well an error is seen at each position of a latent [h, w], to the power of MASKING: 1, or less where the variance is above BUSY."""
    y = picture.cpu().mean(0) / 2 + 0.5
    cells = F.adaptive_avg_pool2d(torch.stack([y, y.square()]), size)
    mean, square = F.avg_pool2d(cells, 3, 1, padding=1, count_include_pad=False)
    return ((square - mean.square()) / BUSY).clamp(min=1) ** -MASKING
