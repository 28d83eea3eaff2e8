"""What a JPEG file says of its picture: each DCT coefficient lies in a cell, half a quantization step to either side of what is stored.

ITU-T T.81, Annex A. The cells are those of the file's own planes, at their true subsampling. A picture is brought into them by
alternating projections between convex sets (von Neumann 1950): the cells, the colours that RGB can show, and the planes whose padding
repeats their last row and column, as encoders pad them.
"""

import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_compress.coding.dct import dct, inverse_dct

BLOCK = 8
# JFIF 1.02: Y, Cb, Cr of R, G, B, all within [-128, 128] or so: T.81 takes 128 from each plane
TO_YCC = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], dtype=torch.float32)
TO_RGB = torch.linalg.inv(TO_YCC.double()).float()
ROUNDING = 1.0  # margin within the cells, in the DCT's units, so that rounding to 8 bits seldom leaves them


class Plane(NamedTuple):
    """One component: `stored` [h/8, w/8, 8, 8] coefficients, in steps of `table` [8, 8]; each sample is the mean of `cell` pixels."""

    stored: Tensor
    table: Tensor
    cell: tuple[int, int]

    def coefficients(self, samples: Tensor) -> Tensor:
        """The orthonormal DCT of each block of the plane [8 a, 8 b] -> [a, b, 8, 8], in quantization steps."""
        blocks = samples.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).transpose(1, 2)
        return dct(blocks) / self.table

    def samples(self, coefficients: Tensor) -> Tensor:
        """Inverse of `coefficients`."""
        return inverse_dct(coefficients * self.table).transpose(1, 2).flatten(2, 3).flatten(0, 1)


class Cells(NamedTuple):
    """The planes of a JPEG of `height` x `width` pixels: one, or Y, Cb and Cr."""

    planes: list[Plane]
    height: int
    width: int

    def to(self, device) -> "Cells":
        planes = [plane._replace(stored=plane.stored.to(device), table=plane.table.to(device)) for plane in self.planes]
        return self._replace(planes=planes)

    @property
    def unit(self) -> tuple[int, int]:
        """Rows and columns of pixels in a minimum coded unit, the smallest part that holds whole blocks of each plane."""
        return tuple(BLOCK * max(plane.cell[axis] for plane in self.planes) for axis in (0, 1))

    def window(self, top: int, left: int, height: int, width: int) -> "Cells":
        """The cells of a part of the picture, which must start and, unless at the picture's end, stop with a coded unit."""
        planes = []
        for plane in self.planes:
            rows, columns = (BLOCK * side for side in plane.cell)
            part = plane.stored[top // rows : -(-(top + height) // rows), left // columns : -(-(left + width) // columns)]
            planes.append(plane._replace(stored=part))
        return Cells(planes, height, width)


def read_cells(data: bytes) -> Cells | None:
    """The cells of a JPEG file; None of one with other colours than grey and YCbCr, or odd subsampling. ImportError without jpeglib."""
    try:
        import jpeglib  # the coefficients themselves: decoded samples were clipped and rounded
    except ImportError as error:
        raise ImportError("a JPEG is refined with jpeglib: pip install 'diffusers_compress[refine]'") from error

    with tempfile.TemporaryDirectory() as folder:  # the library reads files
        path = Path(folder, "base.jpg")
        path.write_bytes(data)
        found = jpeglib.read_dct(str(path))
    if found.jpeg_color_space.name not in ("JCS_GRAYSCALE", "JCS_YCbCr"):
        return None
    factors = np.asarray(found.samp_factor).reshape(-1, 2)
    planes = []
    if (factors.max(0) % factors).any():
        return None  # a sample that is no mean of whole pixels
    for stored, factor, number in zip((found.Y, found.Cb, found.Cr), factors, found.quant_tbl_no):
        cell = tuple(int(side) for side in factors.max(0) // factor)
        planes.append(
            Plane(torch.from_numpy(stored.astype(np.float32)), torch.from_numpy(found.qt[number].astype(np.float32)), cell)
        )
    return Cells(planes, found.height, found.width)


def luma(x: Tensor) -> Tensor:
    """Y of x [B, 3, H, W], [B, 1, H, W]."""
    return torch.einsum("c,bchw->bhw", TO_YCC[0].to(x), x)[:, None]


def project(x: Tensor, cells: Cells, rounds: int = 1) -> Tensor:
    """The picture x [3, H, W] in [-1, 1], brought into the cells, and into [-1, 1], by so many rounds of alternating projections.

    A margin inside the cells is left for rounding to 8 bits; one round alone may end slightly outside of some.
    """
    x = x * 127.5 - 0.5
    for _ in range(rounds):
        planes = torch.einsum("dc,chw->dhw", TO_YCC.to(x), x)
        moved = [into_cells(plane, samples) for plane, samples in zip(cells.planes, planes)]
        moved += [torch.zeros_like(moved[0])] * (3 - len(moved))  # grey
        before, x = x, torch.einsum("dc,chw->dhw", TO_RGB.to(x), torch.stack(moved)).clamp(-128, 127)
        if (x - before).abs().max() < 1 / 16:
            break
    return (x + 0.5) / 127.5


def into_cells(plane: Plane, samples: Tensor) -> Tensor:
    """One component at the picture's resolution [H, W], moved no more than its coefficients need to lie within their cells."""
    padded, coefficients = seen(plane, samples)
    half = 0.5 - (ROUNDING / plane.table).clamp(max=0.25)
    excess = plane.samples(coefficients - coefficients.clamp(plane.stored - half, plane.stored + half))
    # a mean of pixels moves least when all of them move alike
    padded = padded - excess.repeat_interleave(plane.cell[0], 0).repeat_interleave(plane.cell[1], 1)
    return fold(fold(padded, samples.shape[0]).T, samples.shape[1]).T


def seen(plane: Plane, samples: Tensor) -> tuple[Tensor, Tensor]:
    """A component [H, W] as an encoder pads it to whole blocks, and the coefficients that it finds, in steps."""
    rows, columns = (BLOCK * count * side for count, side in zip(plane.stored.shape, plane.cell))
    padding = (0, columns - samples.shape[1], 0, rows - samples.shape[0])
    padded = F.pad(samples[None], padding, mode="replicate")[0]
    return padded, plane.coefficients(F.avg_pool2d(padded[None], plane.cell)[0])


def fold(padded: Tensor, length: int) -> Tensor:
    """The first rows, the last of them the mean of all from there on: the nearest picture whose padding repeats its last row."""
    return torch.cat([padded[: length - 1], padded[length - 1 :].mean(0, keepdim=True)])


def excess(x: Tensor, cells: Cells) -> Tensor:
    """By how much each coefficient of x [3, H, W] in [-1, 1] is outside its cell, in 8-bit levels of an orthonormal DCT; flat."""
    planes = torch.einsum("dc,chw->dhw", TO_YCC.to(x), x * 127.5 - 0.5)
    found = []
    for plane, samples in zip(cells.planes, planes):
        distance = (seen(plane, samples)[1] - plane.stored).abs() - 0.5
        found.append((distance.clamp(min=0) * plane.table).flatten())
    return torch.cat(found)
