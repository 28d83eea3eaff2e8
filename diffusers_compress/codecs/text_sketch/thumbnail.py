"""The colours of a picture on a grid of a few cells, in tens of bytes. FORMAT.md, section "Text+Sketch", "Thumbnail".

The coefficients of a DCT over rows, columns and the three channels are rounded and coded under logistic distributions whose scales
depend on the frequency alone.
"""

import math

import numpy as np
import torch
from torch import Tensor

from diffusers_compress.coding import logistic
from diffusers_compress.coding.dct import _dct, dct, inverse_dct
from diffusers_compress.coding.range_coder import Decoder, Encoder

SIDE = 8  # cells along the longer side, by default
STEP = 4.0  # of a coefficient, for a cell: in 8-bit levels
# Scales of the logistic distributions, by frequency, in quarter octaves; measured on photographs. The last one goes on.
SCALES = (33, 28, 25, 24, 22, 20, 19, 18, 17, 16, 15, 14, 14, 13)
CHANNELS = (0, 7, 12)  # by how much those of the second and third are lower


def indices(shape: tuple[int, int]) -> np.ndarray:
    """Of the scale of each coefficient, [3, rows, columns]. Frequencies are counted along the longer side."""
    rows, columns = (np.arange(count) * max(shape) // count for count in shape)
    frequency = np.minimum(rows[:, None] + columns, len(SCALES) - 1)
    return np.maximum(0, np.array(SCALES)[frequency] - np.array(CHANNELS)[:, None, None])


def quantize(thumbnail: Tensor) -> np.ndarray:
    """Colours [3, rows, columns] in [-1, 1] -> integers of this shape."""
    levels = 127.5 * thumbnail.cpu()
    step = STEP * math.sqrt(levels[0].numel())
    return torch.round(_dct(3, 3) @ dct(levels).flatten(1) / step).long().view_as(levels).numpy()


def dequantize(k: np.ndarray) -> Tensor:
    """The colours [3, rows, columns], about [-1, 1], that integers stand for."""
    coefficients = torch.from_numpy(k).float() * (STEP * math.sqrt(k[0].size))
    return inverse_dct((_dct(3, 3).T @ coefficients.flatten(1)).view_as(coefficients)) / 127.5


def encode(encoder: Encoder, k: np.ndarray) -> None:
    """Append the integers [3, rows, columns] to a range coder."""
    logistic.encode(encoder, k.ravel(), np.zeros(k.size, dtype=np.int64), indices(k.shape[1:]).ravel())


def decode(decoder: Decoder, shape: tuple[int, int]) -> np.ndarray:
    """The integers that `encode` wrote. Corrupt for values that no encoder writes."""
    index = indices(shape)
    return logistic.decode(decoder, np.zeros(index.size, dtype=np.int64), index.ravel()).reshape(index.shape)
