"""What a codec's `compress`, `decompress` and `__call__` return."""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image


@dataclass
class CompressOutput(BaseOutput):
    """`bitstreams[i]` is the whole file of picture i, `bpp[i]` is 8 * bytes / (width * height) of the original picture, and
    `notes[i]` says in words what of picture i the codec does not carry."""

    bitstreams: list[bytes]
    bpp: list[float]
    notes: list[list[str]]


@dataclass
class DecompressOutput(BaseOutput):
    """`images`: list of PIL pictures, or of numpy arrays [H, W, 3] in [0, 1], or of tensors [3, H, W] in [0, 1].

    `notes[i]` says in words what is to know of the decoding of file i: it was cut short, made with another model, or drifted.
    `drift[i]`: estimated rms difference between the last x_t of file i here and the sender's (`drift.drift`), None if the file does
    not tell; codecs without a latent that both ends compute leave it out.
    """

    images: list[Image.Image] | list[np.ndarray] | list[torch.Tensor]
    notes: list[list[str]]
    drift: list[float | None] | None = None


@dataclass
class RoundTripOutput(BaseOutput):
    """The decoded `images` of `DecompressOutput` beside the `bitstreams` and `bpp` of `CompressOutput`; `notes` are those of both."""

    images: list[Image.Image] | list[np.ndarray] | list[torch.Tensor]
    bitstreams: list[bytes]
    bpp: list[float]
    notes: list[list[str]]
