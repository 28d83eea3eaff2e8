"""A network for small pictures on large ones: tiles that overlap, blended where they do."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

OVERLAP = 8  # pixels that neighbours share at least


def blended(network: Callable[[Tensor], Tensor], z: Tensor, size: int, multiple: int, batch_size: int) -> Tensor:
    """network(z) of a field z [C, H, W], by tiles of size x size, so many at a time; network: [B, C, h, w] -> [B, D, h, w].

    A side that is shorter than a tile is filled up to a multiple of `multiple` by repeating the last row or column.
    """
    height, width = z.shape[1:]
    down, right = (max(0, min(size, side + -side % multiple) - side) for side in (height, width))
    padded = F.pad(z[None], (0, right, 0, down), mode="replicate")[0]
    rows, columns = (starts(side, size) for side in padded.shape[1:])
    corners = [(y, x) for y in rows for x in columns]
    weight = window(padded.shape[1], size)[:, None] * window(padded.shape[2], size)
    weight = weight.to(z)
    total = 0
    for k in range(0, len(corners), batch_size):
        some = corners[k : k + batch_size]
        outputs = network(torch.stack([padded[:, y : y + size, x : x + size] for y, x in some]))
        if k == 0:
            total, weights = outputs.new_zeros(outputs.shape[1], *padded.shape[1:]), torch.zeros_like(padded[0])
        for (y, x), output in zip(some, outputs):
            total[:, y : y + size, x : x + size] += weight * output
            weights[y : y + size, x : x + size] += weight
    return (total / weights)[:, :height, :width]


def starts(side: int, size: int) -> list[int]:
    """Where the tiles along a side begin, evenly from end to end."""
    count = max(1, -(-(side - OVERLAP) // (size - OVERLAP)))
    return [i * (side - size) // max(1, count - 1) for i in range(count)] if side > size else [0]


def window(side: int, size: int) -> Tensor:
    """A tile's weight along a side: less towards both ends, [min(side, size)] float64."""
    i = torch.arange(min(side, size), dtype=torch.float64)
    return torch.minimum(i + 0.5, i.flip(0) + 0.5).clamp(max=OVERLAP)
