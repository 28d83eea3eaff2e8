"""The trellis channel: a step is sent by trellis-coded source coding of its shift with a shared random codebook.

Marcellin & Fischer, "Trellis coded quantization", 1990; random codebooks and shift-register trellises as in Mao, Gray & Linder,
"Rate-constrained simulation and source coding IID sources", 2011, and Tseng et al., "QTIP", 2024.

The sender wants y ~ q = N(m, I), m being the shift; what both sides expect is the reference p = N(0, 1 + v), v the excess variance
of each dimension. The dimensions are ordered and sign-flipped by common randomness and cut into segments. The state of a segment
is the last `state_bits` bits of the message so far and names the segment's codeword c, a window of one shared Gaussian sequence,
which stands for y = sqrt(1 + v) c. The encoder looks for the message of largest likelihood ratio (Viterbi):

    log q(y) / p(y)  =  sum_i  sqrt(1 + v_i) c_i m_i - c_i^2 v_i / 2  + what does not depend on c

The decoder gathers windows. The budget is the length of the message in bits and the whole cost of a step.

y is a maximum rather than a draw: in the one direction that the message decides it has almost no variance.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusers_compress import common_randomness

GROUP = 16  # dimensions that are mixed
SCORED = 512  # segments scored at a time
WINDOW = 256  # dimensions scored at a time


@dataclass(frozen=True)
class Trellis:
    """A channel with 2^state_bits states and 2^segment_bits ways on from each. More states, and shorter segments, cost the sender time
    and nothing else; they need a little fewer bits."""

    state_bits: int
    segment_bits: int
    first_weight: int  # the first segment's share of the dimensions, where a further one has as many as it has bits
    slope: float  # of the useful bits over the budget
    intercept: float
    wide: bool = True  # whether the reference knows the error's variance; if not, v = 0 as in the published coder

    def kl(self, budget: int) -> float:
        """Useful bits that a message of `budget` bits delivers on average: the KL of the q that it simulates from p."""
        # Measured (benchmarks/channel_overhead.py). A lone segment gives the largest of 2^budget normals.
        return budget**2 / (budget + 3.3) if budget <= self.state_bits else self.slope * budget - self.intercept

    def budget(self, kl: float) -> int:
        """Bits of the message that delivers `kl` useful bits: inverse of `kl`, rounded."""
        if not 0 <= kl < math.inf:
            raise ValueError(f"kl {kl}: must be finite and not negative")
        lone = (kl + math.sqrt(kl**2 + 13.2 * kl)) / 2
        return round(lone if lone <= self.state_bits else max(self.state_bits, (kl + self.intercept) / self.slope))

    def encode(self, shift: Tensor, excess: Tensor, rank: Tensor, budget: int, step: int) -> tuple[np.ndarray, Tensor]:
        """Messages of `budget` bits each that simulate N(shift, 1) where N(0, 1 + excess) is expected.

        shift, excess: [B, n] float32, in units of the noise's standard deviation and variance; rank: [B, n] integers, the larger
        the more information a dimension is expected to hold -> (messages [B, budget] uint8 of 0 and 1, y [B, n] float32).
        """
        order, signs, line = _layout(rank, step)
        m = _mix(shift.gather(1, order) * signs, budget)[:, line]
        v = _even(excess.gather(1, order), budget)[:, line]
        likelihood = torch.stack([(1 + v).sqrt() * m, -v / 2], 1)
        messages = self._viterbi(likelihood, *self._segments(shift.shape[1], budget), self._codebook(step, shift.device))
        return messages, self.decode(messages, excess, rank, budget, step)

    def decode(self, messages: np.ndarray, excess: Tensor, rank: Tensor, budget: int, step: int) -> Tensor:
        """Samples y [B, n] float32 that messages [B, budget] stand for; excess and rank [B, n] as in `encode`."""
        if messages.shape != (len(excess), budget):
            raise ValueError(f"messages of shape {list(messages.shape)}: {len(excess)} of {budget} bits are wanted")
        n, device = excess.shape[1], excess.device
        ends, bounds = self._segments(n, budget)
        padded = np.pad(messages.astype(np.int64), ((0, 0), (self.state_bits, 0)))
        state = np.zeros((len(messages), len(ends)), dtype=np.int64)
        for i in range(self.state_bits):  # of the last state_bits bits, the oldest first
            state = state << 1 | padded[:, np.array(ends) + i]
        origin = torch.as_tensor(state - np.array(bounds[:-1]), device=device)  # where ordered dimension 0 would be
        lengths = torch.tensor(bounds, device=device).diff()
        window = (origin.repeat_interleave(lengths, 1) + torch.arange(n, device=device)) % 2**self.state_bits
        order, signs, line = _layout(rank, step)
        y = torch.empty_like(excess)
        y[:, line] = self._codebook(step, device)[window]
        y = _mix((1 + _even(excess.gather(1, order), budget)).sqrt() * y, budget) * signs
        return torch.empty_like(y).scatter_(1, order, y)

    @staticmethod
    def payload_bytes(budgets: list[int], payload: bytes | None = None) -> int:
        """Length of the whole payload, which the budgets alone decide."""
        return -(-sum(budgets) // 8)

    @staticmethod
    def pack(messages: list[np.ndarray], budgets: list[int]) -> bytes:
        """All messages' bits one after the other, the first in the highest bit of the first byte, zeros up to a whole byte."""
        if [len(message) for message in messages] != list(budgets):
            raise ValueError(f"messages of {[len(message) for message in messages]} bits: their budgets are {budgets}")
        return np.packbits(np.concatenate([np.empty(0, np.uint8), *messages])).tobytes()

    @staticmethod
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

    def _codebook(self, step: int, device) -> Tensor:
        return common_randomness.normals(2**self.state_bits, common_randomness.CODEBOOK, step, device)

    def _segments(self, n: int, budget: int) -> tuple[list[int], list[int]]:
        """(message bits read when each segment's state is complete [S], first ordered dimension of each, and n [S + 1])."""
        ends = [*range(self.state_bits, budget, self.segment_bits), budget]
        weights = [max(0, end - self.state_bits) + self.first_weight for end in ends]
        return ends, [0] + [n * weight // weights[-1] for weight in weights]

    def _viterbi(self, terms: Tensor, ends: list[int], bounds: list[int], codebook: Tensor) -> np.ndarray:
        """Messages of largest total score -> [B, budget] uint8."""
        batch, bits = len(terms), [ends[0]] + [high - low for low, high in zip(ends, ends[1:])]
        longest = max([high - low for low, high in zip(bounds[1:], bounds[2:])], default=WINDOW)
        windows = _windows(codebook, min(longest, WINDOW))
        # With fewer bits than state_bits only the lowest 2^bits states can be reached.
        best = _scores(terms, bounds[:2], windows)[:, 0, : 2 ** bits[0]]
        came_from = []
        for first in range(1, len(bits), SCORED):
            last = min(first + SCORED, len(bits))
            scores = _scores(terms, bounds[first : last + 1], windows)
            for j in range(first, last):
                # State k follows the 2^bits states whose low bits are the high bits of k.
                best, high = best.view(batch, 2 ** bits[j], -1).max(1)
                came_from.append(high.to(torch.uint8))
                best = (scores[:, j - first].view(batch, -1, 2 ** bits[j]) + best[..., None]).flatten(1)

        state = best.argmax(1).cpu().numpy()
        came_from = [table.cpu().numpy() for table in came_from]
        message = np.empty((batch, ends[-1]), dtype=np.uint8)
        for j in range(len(bits) - 1, -1, -1):
            for i in range(bits[j]):
                message[:, ends[j] - 1 - i] = state >> i & 1
            if j:
                kept = state >> bits[j]
                state = kept | came_from[j - 1][np.arange(batch), kept].astype(np.int64) << (self.state_bits - bits[j])
        return message


def _layout(rank: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """(dimensions by falling rank, else at random [B, n]; random signs [n]; those dimensions' order on the line [n]).

    Fibonacci hashing spreads the dimensions of any rank evenly over the line, so that all segments hold about as much (Knuth, TAOCP 3,
    section 6.4: the multiples of the golden ratio modulo 1).
    """
    n, device = rank.shape[1], rank.device
    shuffled = common_randomness.permutation(n, step, device)
    order = shuffled[(-rank[:, shuffled]).sort(dim=1, stable=True).indices]
    line = (torch.arange(n, device=device) * 0x9E3779B1 & common_randomness.WORD).argsort()
    return order, common_randomness.signs(n, step, device), line


def _mix(x: Tensor, budget: int) -> Tensor:
    """Hadamard transform, its own inverse, of each group of GROUP among about the first `budget` of x [B, n], n - n % GROUP at most.

    Where a single dimension holds several bits, an unusual value would overtax its segment: so neighbours share it.
    """
    groups, rest = _groups(x, budget)
    hadamard = torch.ones(1, 1, device=x.device)
    while len(hadamard) < GROUP:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], device=x.device), hadamard)
    return torch.cat([(groups @ hadamard / GROUP**0.5).flatten(1), rest], 1)


def _even(v: Tensor, budget: int) -> Tensor:
    """The mean in place of each v [B, n] of a group."""
    groups, rest = _groups(v, budget)
    return torch.cat([groups.mean(2, keepdim=True).expand_as(groups).flatten(1), rest], 1)


def _groups(x: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    count = min(x.shape[1] // GROUP, -(-budget // GROUP))
    return x[:, : GROUP * count].unflatten(1, (count, GROUP)), x[:, GROUP * count :]


def _windows(codebook: Tensor, length: int) -> Tensor:
    """c_i of all states for i = 0 .. length - 1, and c_i^2 below -> [2 length, states]."""
    windows = torch.cat([codebook, codebook[: length - 1]]).unfold(0, len(codebook), 1)
    return torch.cat([windows, windows.square()])


def _scores(terms: Tensor, bounds: list[int], windows: Tensor) -> Tensor:
    """Log likelihood ratios of the codewords of all states, for the segments between `bounds`.

    terms: [B, 2, n], the factors of c_i and of c_i^2 -> [B, len(bounds) - 1, states].
    """
    low, high = (torch.tensor(ends, device=terms.device)[:, None] for ends in (bounds[:-1], bounds[1:]))
    length, result = len(windows) // 2, 0
    for start in range(0, max(1, int((high - low).max())), length):
        i = low + start + torch.arange(length, device=terms.device)
        factors = terms[:, :, i.clamp(max=terms.shape[-1] - 1)] * (i < high)  # [B, 2, S, length]
        # From dimension `start` on a state's window is that of a later state.
        result = result + (factors.transpose(1, 2).flatten(2) @ windows).roll(-start, -1)
    return result
