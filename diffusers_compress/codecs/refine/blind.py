"""How much a picture file lost, without the original."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_compress.codecs.refine import jpeg
from diffusers_compress.coding import randomness

SIDE = 1024  # of the part that is looked at
SMALLEST_DETAIL = 0.1  # 8-bit levels
SEEN = 8  # coefficients other than zero that tell a frequency's spread
# fitted on photos coded at qualities 1 to 70: rms within the cell of zero = first * (share of others)^second steps
ZERO_CELL = 0.26, 0.2
DECAY = 1.25  # of the spread of DCT coefficients with frequency, where a picture has too few of them
COLOUR = 1 / 4  # spread of Cb and Cr over that of Y, likewise
# log2 of the rms, in 8-bit levels, of white noise that the latent sees like the file's error = first + second * log2(bits per pixel)
# + third * log2(rms difference of neighbouring samples), fitted on 42 photos at five or six rates; single pictures are off by
# a factor of 1.6
TYPICAL = {
    "webp": (-0.69, -0.61, 1.00),
    "avif": (-1.65, -0.70, 1.21),
    "jxl": (-0.56, -0.73, 0.98),
    "jpeg2000": (-1.12, -0.87, 1.36),
}


def errors(x: Tensor, kind: str, cells: jpeg.Cells | None, size: int, encode: Callable[[Tensor], Tensor]) -> Tensor:
    """The rms error [C] of each channel of the latent `encode(x)` of a base x [3, H, W] whose file has `size` bytes.

    An error like that of the file is drawn, added to the picture, and seen through the autoencoder.
    """
    height, width = x.shape[-2:]
    x = x[:, :SIDE, :SIDE]
    if cells is None:
        offset, of_rate, of_detail = TYPICAL.get(kind, TYPICAL["webp"])
        padded = F.pad(x, (0, 1, 0, 1), mode="replicate")
        detail = 127.5 * float((padded.diff(dim=1).square().mean() + padded.diff(dim=2).square().mean()).div(2).sqrt())
        octaves = of_rate * math.log2(8 * size / (height * width)) + of_detail * math.log2(max(detail, SMALLEST_DETAIL))
        scale = 2 ** (offset + octaves) / 127.5
        error = scale * randomness.normals(x.numel(), randomness.CANDIDATES).view(x.shape)
    else:
        error = quantization_error(cells.window(0, 0, *x.shape[-2:]))
    y, y_hat = encode(torch.stack([x, x + error])).cpu()
    return (y_hat - y).square().mean((1, 2)).sqrt()


def quantization_error(cells: jpeg.Cells) -> Tensor:
    """A draw of what quantization took from a JPEG, [3, H, W], twice the 8-bit levels / 255.

    Uniform within a coefficient's cell, but for the cell of zero: there its spread follows from how many of the frequency's coefficients are
    zero, as it does for a Laplacian (Lam, Goodman 2000), but with heavier tails.
    """
    planes, level = [], None
    for number, plane in enumerate(cells.planes):
        spread, level = spread_in_zero_cell(plane, None if level is None else level * COLOUR)
        width = torch.where(plane.stored == 0, 12**0.5 * spread / plane.table, 1.0)
        width[..., 0, 0] = 1
        u = randomness.words(plane.stored.numel(), randomness.CANDIDATES, number).view(plane.stored.shape).float() / 2**32
        samples = plane.samples(width * (u - 0.5))
        samples = samples.repeat_interleave(plane.cell[0], 0).repeat_interleave(plane.cell[1], 1)
        planes.append(samples[: cells.height, : cells.width])
    planes += [torch.zeros_like(planes[0])] * (3 - len(planes))
    return torch.einsum("dc,chw->dhw", jpeg.TO_RGB, torch.stack(planes)) / 127.5


def spread_in_zero_cell(plane: jpeg.Plane, level: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The rms [8, 8] of the coefficients that became zero, and the level that those of the plane share: spread = level / radius^DECAY.

    level: for a plane all of whose coefficients are zero.
    """
    count, frequency = math.prod(plane.stored.shape[:2]), torch.arange(8, dtype=torch.float32)
    radius = torch.hypot(*torch.meshgrid(frequency, frequency, indexing="ij")).clamp(min=1)
    share = (plane.stored != 0).float().mean((0, 1)).clamp(min=1 / (2 * count))
    spread = ZERO_CELL[0] * share ** ZERO_CELL[1] * plane.table
    seen = share * count >= SEEN
    seen[0, 0] = False
    if seen.any():
        level = (spread * radius**DECAY)[seen].log().mean().exp()
    if level is not None:
        spread = torch.where(seen, spread, torch.minimum(spread, level / radius**DECAY))
    return spread, level
