"""A coarse checksum of a latent that both ends compute, so that a receiver whose arithmetic differs can tell how far it drifted.

What a file's symbols are depends on integers alone, but x_t at the end of a DiffC stream is a network's output: other devices, types
and library versions compute it a little otherwise, and another model entirely so. The sender projects its x_t onto a few random
directions that both ends share and sends in which cell, modulo CELLS, each projection lies. A drift of rms d moves each projection
by about d (Johnson & Lindenstrauss 1984).
"""

import functools
import math
import warnings

import torch
from torch import Tensor

from diffusers_compress.coding import randomness

PROJECTIONS, CELLS, CELL = 7, 4, 1 / 8
BOUND = 1 / 16  # where `notes` speaks; ROBUSTNESS.md has how often it errs


def projections(x_t: Tensor) -> Tensor:
    """x_t of n elements -> [PROJECTIONS] float64: its inner products with random signs, over sqrt(n)."""
    x = x_t.detach().cpu().double().flatten()
    return torch.stack([(signs * x).sum() for signs in directions(len(x))]) / math.sqrt(len(x))


@functools.lru_cache(1)
def directions(n: int) -> Tensor:
    """Random signs [PROJECTIONS, n] int8."""
    return torch.stack([randomness.signs(n, k, stream=randomness.CHECK).char() for k in range(PROJECTIONS)])


def check_of(x_t: Tensor) -> int:
    """The checksum, two bits for each projection, the first in the highest ones."""
    cells = (projections(x_t) / CELL).floor().long() % CELLS
    return int(sum(int(cell) << 2 * (PROJECTIONS - 1 - k) for k, cell in enumerate(cells)))


def drift(x_t: Tensor, check: int) -> float:
    """Estimated rms difference from the x_t that gave this checksum; 0.14 or so stands for all larger ones too."""
    cells = torch.tensor([check >> 2 * (PROJECTIONS - 1 - k) & CELLS - 1 for k in range(PROJECTIONS)])
    # Distance from the middle of the nearest such cell, whose own variance is CELL^2 / 12
    distance = ((projections(x_t) / CELL - cells - 0.5 + CELLS / 2) % CELLS - CELLS / 2) * CELL
    return max(0.0, float(distance.square().mean()) - CELL**2 / 12) ** 0.5


def notes(found: float | None) -> list[str]:
    """What to tell of a file's drift: nothing up to BOUND. A larger one is a RuntimeWarning too."""
    if found is None or found <= BOUND:
        return []
    note = (
        f"the latent drifted from the sender's by an rms of about {found:.2f} (above {BOUND}): the picture is not quite the one that was "
        "sent. Decode with dtype float32, on another device, or with the model that the file was made with"
    )
    warnings.warn(note, RuntimeWarning, stacklevel=4)  # the caller of `decompress`
    return [note]
