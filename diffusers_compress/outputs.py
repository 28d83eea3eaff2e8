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


Images = list[Image.Image] | np.ndarray | torch.Tensor | list[np.ndarray] | list[torch.Tensor]


@dataclass
class DecompressOutput(BaseOutput):
    """`images`: a list of PIL pictures; as "np" an array [B, H, W, 3] in [0, 1], as "pt" a tensor [B, 3, H, W] in [0, 1]. Pictures of
    different sizes are a list of arrays [H, W, 3] or tensors [3, H, W].

    `notes[i]` says in words what is to know of the decoding of file i: it was cut short, made with another model, or drifted.
    `drift[i]`: estimated rms difference between the last x_t of file i here and the sender's (`drift.drift`), None if the file does
    not tell; codecs without a latent that both ends compute leave it out.
    """

    images: Images
    notes: list[list[str]]
    drift: list[float | None] | None = None

    def __post_init__(self):
        if (
            isinstance(self.images, list)
            and len({(getattr(x, "shape", None), getattr(x, "device", None)) for x in self.images}) == 1
        ):
            if isinstance(self.images[0], np.ndarray):  # one array, as diffusers' own pipelines return it
                self.images = np.stack(self.images)
            elif isinstance(self.images[0], torch.Tensor):
                self.images = torch.stack(self.images)
        super().__post_init__()


@dataclass
class RoundTripOutput(BaseOutput):
    """The decoded `images` of `DecompressOutput` beside the `bitstreams` and `bpp` of `CompressOutput`; `notes` are those of both."""

    images: Images
    bitstreams: list[bytes]
    bpp: list[float]
    notes: list[list[str]]
