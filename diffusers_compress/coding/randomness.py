"""Common randomness: the numbers that sender and receiver share without sending them. Part of the file format.

Every number is a function of (stream, step, position), made with integers only, so all devices agree to the last bit.
Generator: Philox-4x32-10 (Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
"""

import functools
import statistics

import torch
from torch import Tensor

from diffusers_compress.coding.devices import order_of

START, PERMUTATION, SIGNS, CODEBOOK, CANDIDATES, ARRIVALS, DITHER, CHECK, FINISH = range(9)  # streams
KEY = (0x44696666, 0x436F6D70)  # "DiffComp"
WORD = 0xFFFFFFFF


def philox(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox-4x32-10. counter: [..., 4] int64 holding 32-bit words -> [..., 4] int64 in [0, 2**32)."""
    c_0, c_1, c_2, c_3 = counter.unbind(-1)
    k_0, k_1 = key
    for _ in range(10):
        # The 64-bit products wrap into the sign; masking after the (arithmetic) shift restores the high word.
        p_0, p_1 = c_0 * 0xD2511F53, c_2 * 0xCD9E8D57
        c_0, c_1, c_2, c_3 = (p_1 >> 32 & WORD) ^ c_1 ^ k_0, p_1 & WORD, (p_0 >> 32 & WORD) ^ c_3 ^ k_1, p_0 & WORD
        k_0, k_1 = (k_0 + 0x9E3779B9) & WORD, (k_1 + 0xBB67AE85) & WORD
    return torch.stack([c_0, c_1, c_2, c_3], -1)


def words(n: int, stream: int, step: int = 0, device=None, offset: int = 0) -> Tensor:
    """Words offset .. offset + n - 1 of a stream -> [n] int64, uniform in [0, 2**32)."""
    first = offset // 4
    index = torch.arange(first, (offset + n + 3) // 4, device=device)
    counter = [index & WORD, torch.full_like(index, step), torch.full_like(index, stream), index >> 32]
    return philox(torch.stack(counter, -1), KEY).flatten()[offset - 4 * first :][:n]


@functools.cache
def normal_table(device: torch.device) -> Tensor:
    """Midpoint quantiles of the standard normal distribution, rounded to multiples of 2**-16 -> [65536] float32, rising."""
    quantile = statistics.NormalDist().inv_cdf
    upper = [round(quantile((i + 0.5) / 65536) * 65536) for i in range(32768, 65536)]
    return torch.tensor([-q for q in reversed(upper)] + upper, dtype=torch.float32, device=device) / 65536


def normals(n: int, stream: int, step: int = 0, device=None, offset: int = 0) -> Tensor:
    """Standard normals offset .. offset + n - 1 of a stream, one 16-bit half-word each, low half first -> [n] float32."""
    first = offset // 2
    word = words((offset + n + 1) // 2 - first, stream, step, device, first)
    half = torch.stack([word & 0xFFFF, word >> 16], -1).flatten()[offset - 2 * first :][:n]
    return normal_table(half.device)[half]


def permutation(n: int, step: int, device=None) -> Tensor:
    """Random order of 0 .. n - 1 -> [n] int64: positions sorted by their word; equal words keep their order."""
    return order_of(words(n, PERMUTATION, step, device))


def signs(n: int, step: int, device=None, stream: int = SIGNS) -> Tensor:
    """Random signs -> [n] float32: bit i % 32 (lowest first) of word i // 32; a set bit means -1."""
    word = words((n + 31) // 32, stream, step, device)
    bit = (word.to(torch.int32)[:, None] >> torch.arange(32, device=word.device, dtype=torch.int32) & 1).flatten()[:n]
    return 1.0 - 2.0 * bit.float()
