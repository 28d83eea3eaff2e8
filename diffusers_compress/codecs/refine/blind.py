"""How much a picture file lost, without the original."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffusers_compress.codecs.refine import jpeg
from diffusers_compress.coding import randomness

SIDE = 1024  # of the part that is looked at
SEEN = 8  # coefficients other than zero that tell a frequency's spread
DECAY = 1.5  # of the spread of DCT coefficients with frequency, where a picture has too few of them
# log2 of the rms error in 8-bit levels = first + second * log2(bits per pixel), fitted on ten pictures of BSDS500 at five
# qualities; single pictures are off by a factor of 1.5
TYPICAL = {"webp": (2.62, -0.45), "avif": (2.28, -0.56), "jxl": (2.39, -0.73), "jpeg2000": (2.67, -0.46)}


def errors(x: Tensor, kind: str, cells: jpeg.Cells | None, size: int, encode: Callable[[Tensor], Tensor]) -> Tensor:
    """The rms error [C] of each channel of the latent `encode(x)` of a base x [3, H, W] whose file has `size` bytes.

    An error like that of the file is drawn, added to the picture, and seen through the autoencoder.
    """
    height, width = x.shape[-2:]
    x = x[:, :SIDE, :SIDE]
    if cells is None:
        offset, slope = TYPICAL.get(kind, TYPICAL["webp"])
        scale = 2 ** (offset + slope * math.log2(8 * size / (height * width))) / 127.5
        error = scale * randomness.normals(x.numel(), randomness.CANDIDATES).view(x.shape)
    else:
        error = quantization_error(cells.window(0, 0, *x.shape[-2:]))
    y, y_hat = encode(torch.stack([x, x + error])).cpu()
    return (y_hat - y).square().mean((1, 2)).sqrt()


def quantization_error(cells: jpeg.Cells) -> Tensor:
    """A draw of what quantization took from a JPEG, [3, H, W], twice the 8-bit levels / 255.

    Within its cell a coefficient is uniform, but for the cell of zero: there it has a Laplacian, whose spread follows from how many of a
    frequency's coefficients are zero (Lam, Goodman 2000).
    """
    planes, frequency = [], torch.arange(8, dtype=torch.float32)
    for number, plane in enumerate(cells.planes):
        count = math.prod(plane.stored.shape[:2])
        u = randomness.words(64 * count, randomness.CANDIDATES, number).view(plane.stored.shape).float() / 2**32
        error = u - 0.5
        zeros = (plane.stored == 0).float().mean((0, 1))
        rate = -2 * torch.log1p(-zeros.clamp(0.01, 1 - SEEN / (2 * count + SEEN)))  # of the Laplacian, per step
        spread, radius = plane.table / rate, torch.hypot(*torch.meshgrid(frequency, frequency, indexing="ij"))
        seen = ((1 - zeros) * count >= SEEN) & (radius > 0)
        if seen.any():
            level = (spread[seen] * radius[seen] ** DECAY).log().mean().exp()
            spread = torch.where(seen, spread, torch.minimum(spread, level * radius.clamp(min=1) ** -DECAY))
        rate = plane.table / spread
        v = 2 * u - 1  # sign, and place in the distribution of magnitudes
        laplacian = -v.sign() * torch.log1p(-v.abs() * -torch.expm1(-rate / 2)) / rate
        in_zero = plane.stored == 0
        in_zero[..., 0, 0] = False
        samples = plane.samples(torch.where(in_zero, laplacian, error))
        samples = samples.repeat_interleave(plane.cell[0], 0).repeat_interleave(plane.cell[1], 1)
        planes.append(samples[: cells.height, : cells.width])
    planes += [torch.zeros_like(planes[0])] * (3 - len(planes))
    return torch.einsum("dc,chw->dhw", jpeg.TO_RGB, torch.stack(planes)) / 127.5
