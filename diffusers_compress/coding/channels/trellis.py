"""The trellis channel: a step is sent by trellis-coded source coding of its shift with a shared random codebook.

Marcellin & Fischer, "Trellis coded quantization", 1990; random codebooks and shift-register trellises as in Mao, Gray & Linder,
"Rate-constrained simulation and source coding IID sources", 2011, and Tseng et al., "QTIP", 2024.

The sender wants y ~ q = N(m, I), m being the shift; what both sides expect is the reference p = N(0, 1 + v), v the excess variance
of each dimension. The dimensions are ordered and sign-flipped by common randomness and cut into segments. The state of a segment
is the last `state_bits` bits of the message so far and names the segment's codeword c, a window of one shared Gaussian sequence,
which stands for y = sqrt(1 + v) c. The encoder looks for the message of largest likelihood ratio:

    log q(y) / p(y)  =  sum_i  sqrt(1 + v_i) c_i m_i - c_i^2 v_i / 2  + what does not depend on c

Of 2^14 states Viterbi's algorithm finds the best message. With 2^32, too many for that, the M-algorithm follows only the best few
messages from segment to segment (Jelinek & Anderson, "Instrumentable tree encoding of information sources", 1971) and still finds
better ones: whatever so many bits have told apart stays apart.

The decoder gathers windows. The budget is the length of the message in bits and the whole cost of a step.

y is a maximum rather than a draw: in the one direction that the message decides it has almost no variance.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_compress.coding import bit_payload, randomness
from diffusers_compress.coding.channels import search
from diffusers_compress.coding.channels.search import CODEBOOK_BITS, GOLDEN_RATIO
from diffusers_compress.coding.devices import order_of, to_device

SEGMENT_BITS = 4
FIRST_WEIGHT = 12  # the first segment's share of the dimensions, where a further one has as many as it has bits
GROUP = 16  # dimensions that are mixed
WINDOW = 256  # dimensions of a segment up to which a matrix product gives its scores
SCORED, TRANSFORMED = 512, 64  # segments scored at a time, by a matrix product and by Fourier transforms


@dataclass(frozen=True)
class Trellis:
    """A channel with 2^state_bits states, CODEBOOK_BITS at least. The sender's search is Viterbi's with so few, or follows
    `survivors` messages: the more, the fewer bits and the more of the sender's time, and of nobody else's."""

    state_bits: int
    slope: float  # of the useful bits over the budget
    intercept: float
    survivors: int | None = None
    wide: bool = True  # whether the reference knows the error's variance; if not, v = 0 as in the published coder

    payload_bytes, pack, unpack = map(staticmethod, (bit_payload.payload_bytes, bit_payload.pack, bit_payload.unpack))

    def kl(self, budget: int) -> float:
        """Useful bits that a message of `budget` bits delivers on average: the KL of the q that it simulates from p."""
        # Measured (benchmarks/channel_overhead.py). A lone segment gives the largest of 2^budget normals.
        return budget**2 / (budget + 3.3) if budget <= CODEBOOK_BITS else self.slope * budget - self.intercept

    def budget(self, kl: float) -> int:
        """Bits of the message that delivers `kl` useful bits: inverse of `kl`, rounded."""
        if not 0 <= kl < math.inf:
            raise ValueError(f"kl {kl}: must be finite and not negative")
        lone = (kl + math.sqrt(kl**2 + 13.2 * kl)) / 2
        return round(lone if lone <= CODEBOOK_BITS else max(CODEBOOK_BITS, (kl + self.intercept) / self.slope))

    def encode(self, shift: Tensor, excess: Tensor, rank: Tensor, budget: int, step: int) -> tuple[np.ndarray, Tensor]:
        """Messages of `budget` bits each that simulate N(shift, 1) where N(0, 1 + excess) is expected.

        shift, excess: [B, n] float32, in units of the noise's standard deviation and variance; rank: [B, n] integers, the larger
        the more information a dimension is expected to hold -> (messages [B, budget] uint8 of 0 and 1, y [B, n] float32).
        """
        n, device = shift.shape[1], shift.device
        order, line = _order(rank, step), _line(n, device)
        _, signs, codebook = _shared(n, step, device)
        m = _mix(shift.gather(1, order) * signs, budget)
        v = _even(excess.gather(1, order), budget)
        likelihood = torch.stack([(1 + v).sqrt() * m, -v / 2], 1)[..., line]
        ends, bounds = _segments(n, budget)
        bits, scores = np.diff([0, *ends]).tolist(), _segment_scores(likelihood, bounds, codebook)
        follow, survivors = search.on(device)
        if self.survivors:
            messages = search.m_algorithm(bits, scores, self.survivors, survivors)
        else:
            messages = search.viterbi(bits, scores, follow)
        return messages, self._sample(messages, order, v, step)

    def decode(self, messages: np.ndarray, excess: Tensor, rank: Tensor, budget: int, step: int) -> Tensor:
        """Samples y [B, n] float32 that messages [B, budget] stand for; excess and rank [B, n] as in `encode`."""
        if messages.shape != (len(excess), budget):
            raise ValueError(f"messages of shape {list(messages.shape)}: {len(excess)} of {budget} bits are wanted")
        order = _order(rank, step)
        return self._sample(messages, order, _even(excess.gather(1, order), budget), step)

    def _sample(self, messages: np.ndarray, order: Tensor, v: Tensor, step: int) -> Tensor:
        """y [B, n] of messages [B, budget], by the order of the dimensions and their excess in that order, [B, n] each."""
        n, device, budget = v.shape[1], v.device, messages.shape[1]
        ends, bounds = _segments(n, budget)
        padded = np.pad(messages.astype(np.int64), ((0, 0), (self.state_bits, 0)))
        state = np.zeros((len(messages), len(ends)), dtype=np.int64)
        for i in range(self.state_bits):  # of the last state_bits bits, the oldest first
            state = state << 1 | padded[:, np.array(ends) + i]
        origin = search.place(state) - np.array(bounds[:-1])  # where ordered dimension 0 would be
        window = (origin.repeat(np.diff(bounds), axis=1) + np.arange(n)) % 2**CODEBOOK_BITS
        _, signs, codebook = _shared(n, step, device)
        y = torch.empty_like(v)
        y[:, _line(n, device)] = codebook[torch.as_tensor(window, device=device)]
        y = _mix((1 + v).sqrt() * y, budget) * signs
        return torch.empty_like(y).scatter_(1, order, y)


def _segments(n: int, budget: int) -> tuple[list[int], list[int]]:
    """(message bits read when each segment's state is complete [S], first ordered dimension of each, and n [S + 1])."""
    ends = [*range(CODEBOOK_BITS, budget, SEGMENT_BITS), budget]
    weights = [max(0, end - CODEBOOK_BITS) + FIRST_WEIGHT for end in ends]
    return ends, [0] + [n * weight // weights[-1] for weight in weights]


@functools.lru_cache(4)  # a step of 12 megapixels takes some 50 MB
def _shared(n: int, step: int, device: torch.device) -> list[Tensor]:
    """What both ends draw for a step: the dimensions in random order [n], random signs [n], the codebook [2^CODEBOOK_BITS]."""
    codebook = randomness.normals(2**CODEBOOK_BITS, randomness.CODEBOOK, step)
    return to_device(device, randomness.permutation(n, step), randomness.signs(n, step), codebook)


def _order(rank: Tensor, step: int) -> Tensor:
    """Dimensions by falling rank [B, n], else at random."""
    shuffled, _, _ = _shared(rank.shape[1], step, rank.device)
    return shuffled[order_of(-rank[:, shuffled])]


@functools.lru_cache(4)
def _line(n: int, device: torch.device) -> Tensor:
    """Where on the line each of the ordered dimensions lies [n].

    Fibonacci hashing spreads the dimensions of any rank evenly over the line, so that all segments hold about as much (Knuth, TAOCP 3,
    section 6.4: the multiples of the golden ratio modulo 1).
    """
    return (torch.arange(n) * GOLDEN_RATIO & randomness.WORD).argsort().to(device)


def _mix(x: Tensor, budget: int) -> Tensor:
    """Hadamard transform, its own inverse, of each group of GROUP among about the first `budget` of x [B, n], n - n % GROUP at most.

    Where a single dimension holds several bits, an unusual value would overtax its segment: so neighbours share it.
    """
    groups, rest = _groups(x, budget)
    return torch.cat([(groups @ _hadamard(x.device) / GROUP**0.5).flatten(1), rest], 1)


@functools.lru_cache(16)
def _hadamard(device: torch.device) -> Tensor:
    """Of 1 and -1 [GROUP, GROUP] float32."""
    matrix = torch.ones(1, 1, dtype=torch.float32)  # whatever a program's default type is
    while len(matrix) < GROUP:
        matrix = torch.kron(matrix.new_tensor([[1, 1], [1, -1]]), matrix)
    return matrix.to(device)


def _even(v: Tensor, budget: int) -> Tensor:
    """The mean in place of each v [B, n] of a group."""
    groups, rest = _groups(v, budget)
    return torch.cat([groups.mean(2, keepdim=True).expand_as(groups).flatten(1), rest], 1)


def _groups(x: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    count = min(x.shape[1] // GROUP, -(-budget // GROUP))
    return x[:, : GROUP * count].unflatten(1, (count, GROUP)), x[:, GROUP * count :]


def _segment_scores(terms: Tensor, bounds: list[int], codebook: Tensor) -> Iterator[Tensor]:
    """Log likelihood ratios of the codewords of all states, for a run of segments at a time; the first segment is alone.

    terms: [B, 2, n], the factors of c_i and of c_i^2 -> [B, segments, states].
    """
    ends, codewords = torch.tensor(bounds, device=terms.device), torch.stack([codebook, codebook.square()])
    lengths = np.diff(bounds).tolist()
    longest = max(lengths[1:], default=0)
    by_product = longest <= WINDOW
    windows, spectrum = _windows(codewords, longest) if by_product else None, torch.fft.rfft(codewords)
    yield _by_transform(_factors(terms, ends[:2], lengths[0]), spectrum)
    size = SCORED if by_product else TRANSFORMED
    for first in range(1, len(lengths), size):
        factors = _factors(terms, ends[first : first + size + 1], longest)
        yield factors.transpose(1, 2).flatten(2) @ windows if by_product else _by_transform(factors, spectrum)


def _factors(terms: Tensor, bounds: Tensor, longest: int) -> Tensor:
    """Those of the segments between `bounds`, of `longest` dimensions at most: [B, 2, segments, longest]."""
    i = bounds[:-1, None] + torch.arange(longest, device=terms.device)
    return terms[:, :, i.clamp(max=terms.shape[-1] - 1)] * (i < bounds[1:, None])


def _windows(codewords: Tensor, length: int) -> Tensor:
    """c_i of all states for i = 0 .. length - 1, and c_i^2 below -> [2 length, states]."""
    return (
        torch.cat([codewords, codewords[:, : max(0, length - 1)]], 1).unfold(1, codewords.shape[1], 1)[:, :length].flatten(0, 1)
    )


def _by_transform(factors: Tensor, spectrum: Tensor) -> Tensor:
    """Scores of all states as correlations [B, segments, states], each by Fourier transforms, which take as long for any length."""
    states = 2**CODEBOOK_BITS
    if factors.shape[-1] > states:  # the codebook is a ring
        factors = F.pad(factors, (0, -factors.shape[-1] % states)).unflatten(-1, (-1, states)).sum(-2)
    of_factors = torch.fft.rfft(factors, states).conj_physical()
    return torch.fft.irfft(torch.addcmul(of_factors[:, 0] * spectrum[0], of_factors[:, 1], spectrum[1]), states)


# The lines through the useful bits were measured (benchmarks/channel_overhead.py).
TRELLIS = Trellis(state_bits=14, slope=0.925, intercept=2.35)
TRELLIS32 = Trellis(state_bits=32, slope=0.96, intercept=2.6, survivors=search.SURVIVORS)
