"""The published channel, for comparison: Poisson functional representation of chunks of up to 14 bits.

Vonderfecht & Liu, "Lossy compression with pretrained diffusion models", 2025; Li & El Gamal, "Strong functional representation
lemma", 2018. The dimensions are permuted and cut into chunks; of a chunk's shared candidates c_k ~ N(0, I) the sender picks the
one that minimises T_k p(c_k) / q(c_k), T_k the arrival times of a Poisson process, and sends k under Zipf's distribution. The
budget of a step is its KL in whole bits.

2^(KL + 2) candidates are too few for an exact draw: about 0.86 of the shift arrives, and about half of its variance.
"""

import math

import numpy as np
import torch
from torch import Tensor

from diffusers_compress.coding import randomness
from diffusers_compress.coding.index_payload import (  # noqa: F401 - a channel's
    CHUNK_BITS,
    SPARE_BITS,
    bits_of_chunks,
    chunk_count,
    octave_count,
    pack,
    payload_bytes,
    unpack,
)

SPAN = 2 ** (CHUNK_BITS + SPARE_BITS)  # more than the candidates of any chunk
wide = False
BLOCK = 2**20  # normals drawn at a time: about 100 MB


def budget(kl: float) -> int:
    """KL of a step, in whole bits."""
    if not 0 <= kl < math.inf:
        raise ValueError(f"kl {kl}: must be finite and not negative")
    return round(kl)


def kl(budget: int) -> float:
    """Useful bits that a budget stands for (they do not all arrive, see above)."""
    return float(budget)


def _bounds(n: int, chunks: int) -> list[tuple[int, int]]:
    return [(n * c // chunks, n * (c + 1) // chunks) for c in range(chunks)]


def _candidates(first: int, last: int, low: int, high: int, step: int, device=None) -> Tensor:
    """Candidates first .. last - 1 of the chunk with dimensions low .. high - 1 -> [last - first, high - low]."""
    n, count = high - low, last - first
    stream = randomness.CANDIDATES
    return randomness.normals(count * n, stream, step, device, SPAN * low + first * n).view(count, n)


def _choose(shift: Tensor, bits: int, low: int, high: int, step: int) -> int:
    """Index of the candidate that minimises log T_k - log q(c_k) / p(c_k), where log q / p = <c_k, shift> + constant."""
    count = 2 ** octave_count(bits) - 1
    size = max(1, BLOCK // max(1, high - low))
    blocks = [(first, min(first + size, count)) for first in range(0, count, size)]
    log_ratio = torch.cat([_candidates(*block, low, high, step, shift.device) @ shift for block in blocks]).cpu().double()
    # The receiver does not know the arrival times, which need not be the same elsewhere; here they make the choice repeatable.
    uniform = (randomness.words(count, randomness.ARRIVALS, step, offset=SPAN * low).double() + 0.5) / 2**32
    return int((uniform.log().neg().cumsum(0).log() - log_ratio).argmin())


def encode(shift: Tensor, excess: Tensor, rank: Tensor, budget: int, step: int) -> tuple[np.ndarray, Tensor]:
    """Index of one candidate a chunk, for each picture. `excess` and `rank` are not used.

    shift: [B, n] float32, in units of the noise's standard deviation, |shift|^2 / (2 ln 2) about `budget` bits
    -> (messages [B, chunks] int64, y [B, n] float32).
    """
    n, chunk_bits = shift.shape[1], list(bits_of_chunks(budget))
    permuted = shift[:, randomness.permutation(n, step, shift.device)]
    messages = np.zeros((len(shift), len(chunk_bits)), dtype=np.int64)
    if budget:
        for message, row in zip(messages, permuted):
            for c, (low, high) in enumerate(_bounds(n, len(chunk_bits))):
                message[c] = _choose(row[low:high], chunk_bits[c], low, high, step)
    return messages, decode(messages, excess, rank, budget, step)


def decode(messages: np.ndarray, excess: Tensor, rank: Tensor, budget: int, step: int) -> Tensor:
    """Samples y [B, n] float32 that messages [B, chunks] stand for, the same on every device. `excess` [B, n] and `rank` are not used."""
    if messages.shape != (len(excess), chunk_count(budget)):
        raise ValueError(f"messages of shape {list(messages.shape)}: {len(excess)} of {chunk_count(budget)} chunks are wanted")
    n, device = excess.shape[1], excess.device
    bounds = _bounds(n, chunk_count(budget))
    order = randomness.permutation(n, step, device)
    y = torch.empty_like(excess)
    for row, message in zip(y, messages.tolist()):
        chunks = [_candidates(k, k + 1, low, high, step, device)[0] for k, (low, high) in zip(message, bounds) if high > low]
        row[order] = torch.cat([y.new_empty(0), *chunks])
    return y
