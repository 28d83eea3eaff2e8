"""How alike two pictures are, for the choice among candidates: without weights, or as CLIP sees them."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffusers_compress.codecs.text_sketch.format import grid_shape

SIDES = (8, 16, 32)  # cells along the longer side of grids that are compared


def structure(original: Image.Image, candidate: Image.Image) -> float:
    """In [-1, 1], without weights: the correlation of colours, and of the strength of gradients, over the cells of three grids."""
    ours, theirs = (_samples(picture) for picture in (original, candidate))
    found = []
    for side in SIDES:
        shape = grid_shape(original.height, original.width, side)
        for feature in (torch.positive, _gradients):
            a, b = (F.adaptive_avg_pool2d(feature(x), shape).flatten() for x in (ours, theirs))
            found.append(float(F.cosine_similarity(a - a.mean(), b - b.mean(), dim=0)))
    return sum(found) / len(found)


def _samples(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255


def _gradients(x: Tensor) -> Tensor:
    grey = F.pad(x.mean(0)[None, None], (0, 1, 0, 1), mode="replicate")[0]
    return torch.hypot(grey[:, 1:, :-1] - grey[:, :-1, :-1], grey[:, :-1, 1:] - grey[:, :-1, :-1])
