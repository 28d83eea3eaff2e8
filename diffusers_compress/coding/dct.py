"""An orthonormal basis for latents: a discrete cosine transform (DCT) of each 4x4 block, and one of the blocks' means."""

import functools
import math

import torch
from torch import Tensor

BLOCK = 4


@functools.lru_cache(32)
def _dct(n: int, block: int, device=None) -> Tensor:
    """Orthonormal DCT-II of each `block` of n numbers (the last may be shorter) -> [n, n] float32."""
    matrix = torch.zeros(n, n, dtype=torch.float64)
    for start in range(0, n, block):
        size = min(block, n - start)
        k = torch.arange(size, dtype=torch.float64)
        rows = torch.cos(math.pi / size * k[:, None] * (k + 0.5)) * math.sqrt(2 / size)
        rows[0] /= math.sqrt(2)
        matrix[start : start + size, start : start + size] = rows
    return matrix.to(device, torch.float32)


def dct(x: Tensor) -> Tensor:
    """Orthonormal two-dimensional DCT-II of x [..., h, w]."""
    return _dct(x.shape[-2], x.shape[-2], x.device) @ x @ _dct(x.shape[-1], x.shape[-1], x.device).T


def inverse_dct(x: Tensor) -> Tensor:
    """Undoes `dct`."""
    return _dct(x.shape[-2], x.shape[-2], x.device).T @ x @ _dct(x.shape[-1], x.shape[-1], x.device)


def block_transform(x: Tensor) -> Tensor:
    """DCT of each block of x [..., h, w], where the block was; its mean value (times 4) comes first."""
    return _dct(x.shape[-2], BLOCK, x.device) @ x @ _dct(x.shape[-1], BLOCK, x.device).T


def transform(x: Tensor) -> Tensor:
    """Coefficients of x [..., h, w], shaped like x: those of `block_transform`, but for the DCT of all means in place of these."""
    x = block_transform(x)
    x[..., ::BLOCK, ::BLOCK] = dct(x[..., ::BLOCK, ::BLOCK])
    return x


def inverse(coefficients: Tensor) -> Tensor:
    """x [..., h, w] of its coefficients."""
    x = coefficients.clone()
    x[..., ::BLOCK, ::BLOCK] = inverse_dct(x[..., ::BLOCK, ::BLOCK])
    return _dct(x.shape[-2], BLOCK, x.device).T @ x @ _dct(x.shape[-1], BLOCK, x.device)
