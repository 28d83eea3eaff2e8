"""The trellis channel: a step is sent by trellis-coded source coding of its shift with a shared random codebook.

Marcellin & Fischer, "Trellis coded quantization", 1990; random codebooks and shift-register trellises as in Mao, Gray & Linder,
"Rate-constrained simulation and source coding IID sources", 2011, and Tseng et al., "QTIP", 2024.

The dimensions are permuted and sign-flipped by common randomness and cut into segments. The state of a segment is the last
STATE_BITS bits of the message so far and names the segment's codeword, a window of one shared Gaussian sequence. The encoder
looks for the message whose codewords have the largest inner product with the shift (Viterbi); the decoder gathers windows. The
budget is the length of the message in bits and the whole cost of a step.

y is a maximum rather than a draw: along the shift its length is that of the shift, with almost no variance. In all other
directions it is standard normal.
"""

import math

import numpy as np
import torch
from torch import Tensor

from diffusers_compress import common_randomness

STATE_BITS = 14
SEGMENT_BITS = 2
FIRST_WEIGHT = 12  # the first segment's share of the dimensions, where a further one has as many as it has bits
STATES = 2**STATE_BITS
BLOCK = 256  # segments scored at a time: about 100 MB


def kl(budget: int) -> float:
    """Useful bits, (achieved shift along the wanted one)^2 / (2 ln 2), that a message of `budget` bits delivers on average."""
    # Measured (benchmarks/channel_overhead.py). A lone segment gives the largest of 2^budget normals.
    return budget**2 / (budget + 3.3) if budget <= STATE_BITS else 0.925 * budget - 2.35


def budget(kl: float) -> int:
    """Bits of the message whose delivered shift has the norm of the wanted one: inverse of `kl`, rounded."""
    if not 0 <= kl < math.inf:
        raise ValueError(f"kl {kl}: must be finite and not negative")
    return round((kl + math.sqrt(kl**2 + 13.2 * kl)) / 2 if kl <= 11.4 else (kl + 2.35) / 0.925)


def _segments(n: int, budget: int, device=None) -> tuple[Tensor, Tensor]:
    """(message bits read when each segment's state is complete [S], segment of each permuted dimension [n]); integers only."""
    ends = torch.tensor([*range(STATE_BITS, budget, SEGMENT_BITS), budget], device=device)
    weight = (ends - STATE_BITS).clamp(min=0) + FIRST_WEIGHT
    bounds = n * weight // weight[-1]
    return ends, torch.searchsorted(bounds, torch.arange(n, device=device), right=True)


def _scores(shift: Tensor, segment: Tensor, first: int, last: int, spectrum: Tensor) -> Tensor:
    """Inner products of segments first .. last - 1 with the codewords of all states -> [last - first, STATES]."""
    chosen = ((segment >= first) & (segment < last)).nonzero().squeeze(1)
    # sum_i noise[(k + i) mod STATES] m[i], for all k, is the circular convolution of the noise with m placed at -i
    folded = shift.new_zeros(last - first, STATES)
    folded.index_put_((segment[chosen] - first, -chosen % STATES), shift[chosen], accumulate=True)
    return torch.fft.irfft(torch.fft.rfft(folded).mul_(spectrum), STATES)


def _viterbi(shift: Tensor, ends: Tensor, segment: Tensor, codebook: Tensor) -> np.ndarray:
    """Message of largest total inner product -> [budget] uint8."""
    spectrum = torch.fft.rfft(codebook)
    bits = [int(ends[0])] + ends.diff().tolist()
    came_from = []
    for j, new in enumerate(bits):
        if j % BLOCK == 0:
            scores = _scores(shift, segment, j, min(j + BLOCK, len(bits)), spectrum)
        if j == 0:
            best = scores[0, : 2**new]  # with fewer bits than STATE_BITS only these states can be reached
            continue
        # State k follows the 2^new states whose low bits are the high bits of k.
        best, high = best.view(2**new, -1).max(0)
        came_from.append(high.to(torch.uint8))
        best = (scores[j % BLOCK].view(-1, 2**new) + best[:, None]).flatten()

    state = int(best.argmax())
    came_from = torch.cat([*came_from, torch.empty(0, dtype=torch.uint8, device=shift.device)]).cpu().numpy()
    message = []  # the last bit first
    for j in range(len(bits) - 1, -1, -1):
        message += [state >> i & 1 for i in range(bits[j])]
        if j:
            kept = state >> bits[j]
            state = kept | int(came_from[(j - 1) * (STATES >> SEGMENT_BITS) + kept]) << (STATE_BITS - bits[j])
    return np.array(message[::-1], dtype=np.uint8)


def encode(shift: Tensor, budget: int, step: int) -> tuple[np.ndarray, Tensor]:
    """Message of `budget` bits that moves a standard normal sample along `shift`.

    shift: [n] float32, in units of the noise's standard deviation -> (message [budget] uint8 of 0 and 1, y [n] float32).
    """
    n, device = len(shift), shift.device
    ends, segment = _segments(n, budget, device)
    codebook = common_randomness.normals(STATES, common_randomness.CODEBOOK, step, device)
    order, signs = common_randomness.permutation(n, step, device), common_randomness.signs(n, step, device)
    message = _viterbi(shift[order] * signs, ends, segment, codebook)
    return message, decode(message, n, budget, step, device)


def decode(message: np.ndarray, n: int, budget: int, step: int, device=None) -> Tensor:
    """Sample that a message stands for -> [n] float32, the same on every device."""
    if len(message) != budget:
        raise ValueError(f"message of {len(message)} bits: its budget is {budget}")
    ends, segment = _segments(n, budget, device)
    padded = torch.cat([torch.zeros(STATE_BITS, dtype=torch.int64), torch.as_tensor(message, dtype=torch.int64)]).to(ends.device)
    state = torch.zeros_like(ends)
    for i in range(STATE_BITS):  # of the last STATE_BITS bits, the oldest first
        state = state << 1 | padded[ends + i]
    window = (state[segment] + torch.arange(n, device=ends.device)) % STATES
    codebook = common_randomness.normals(STATES, common_randomness.CODEBOOK, step, device)
    y = torch.empty(n, device=ends.device)
    y[common_randomness.permutation(n, step, device)] = codebook[window] * common_randomness.signs(n, step, device)
    return y


def payload_bytes(budgets: list[int], payload: bytes | None = None) -> int:
    """Length of the whole payload, which the budgets alone decide."""
    return -(-sum(budgets) // 8)


def pack(messages: list[np.ndarray], budgets: list[int]) -> bytes:
    """All messages' bits one after the other, the first in the highest bit of the first byte, zeros up to a whole byte."""
    if [len(message) for message in messages] != list(budgets):
        raise ValueError(f"messages of {[len(message) for message in messages]} bits: their budgets are {budgets}")
    return np.packbits(np.concatenate([np.empty(0, np.uint8), *messages])).tobytes()


def unpack(payload: bytes, budgets: list[int]) -> list[np.ndarray]:
    """Messages of the whole steps that a payload holds."""
    bits = np.unpackbits(np.frombuffer(payload, dtype=np.uint8))
    messages, start = [], 0
    for budget in budgets:
        if start + budget > len(bits):
            break
        messages.append(bits[start : start + budget])
        start += budget
    return messages
