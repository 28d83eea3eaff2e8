"""What becomes a sketch: edges of a reduced picture, with their strengths. Only the encoder calls this: no bit of a file depends on its floats.

A detector is a function of a picture [H, W, 3] in [0, 1], already reduced, that gives strengths [H, W] in [0, 1].
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_compress.codecs.text_sketch.format import grid_shape

SIGMA = 0.7  # of the smoothing before gradients, in cells
STEEPEST = 0.5  # gradient, per cell, of strength 1


def reduced(x: Tensor, shape: tuple[int, int]) -> Tensor:
    """A picture [3, H, W] as means over the cells of a grid, [3, rows, columns]."""
    return F.interpolate(x[None].float(), shape, mode="area")[0] if shape != x.shape[1:] else x.float()


def canny(picture: np.ndarray) -> np.ndarray:
    """Gradients [H, W] in [0, 1] where they are greatest across an edge, 0 elsewhere. Canny 1986, without its thresholds."""
    try:
        from skimage import feature, filters
    except ImportError as error:
        raise ImportError("edges are found by scikit-image; install diffusers_compress[sketch], or give a detector") from error
    grey = picture.mean(-1)
    crest = feature.canny(grey, SIGMA, 0.0, 0.0, mode="nearest")
    gradient = filters.sobel(filters.gaussian(grey, SIGMA, mode="nearest"), mode="nearest")
    return np.where(crest, (gradient / STEEPEST).clip(0, 1) ** 0.5, 0.0)


def quantized(strength: np.ndarray, threshold: float, levels: int) -> np.ndarray:
    """Levels 0 ... levels - 1 [H, W]: 0 for what is no edge, the others by strength.

    A weaker edge counts above half the threshold where a stronger one goes on into it. Canny 1986.
    """
    from skimage import filters

    edges = filters.apply_hysteresis_threshold(strength, threshold / 2, threshold)
    rank = 1 + (strength - threshold) / max(1e-6, 1 - threshold) * (levels - 1)
    return np.where(edges, rank.astype(np.int64).clip(1, levels - 1), 0)


def strengths(x: Tensor, side: int, detector=canny) -> np.ndarray:
    """Of the edges of a picture [3, H, W] in [-1, 1], on a grid of this longer side."""
    small = reduced(x / 2 + 0.5, grid_shape(x.shape[1], x.shape[2], side)).clamp(0, 1)
    return np.asarray(detector(small.permute(1, 2, 0).numpy()), dtype=np.float64)


def spread(grid: np.ndarray, levels: int, height: int, width: int) -> Tensor:
    """A sketch as a picture [1, height, width] in [0, 1], as a ControlNet sees it."""
    x = torch.from_numpy(grid).float()[None, None] / (levels - 1)
    return F.interpolate(x, (height, width), mode="bilinear")[0]
