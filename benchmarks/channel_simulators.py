"""Ways to simulate a noisy channel: what each costs in bits, how much of the shift arrives, and how hard the sender has to look.

    python benchmarks/channel_simulators.py

The task. The sender has x, n numbers from N(0, v). The receiver is to get y = x + noise, where the noise has variance 1, and knows
only that x is N(0, v). Both have the same random numbers. Shannon: no scheme needs less than the information in y about x,

    I = n log2(1 + v) / 2  bits

on average. How near one comes depends on I and on n, so each row of the tables is a pair of them.

The schemes.
    trellis, trellis32    this package's own: one long message, searched for by dynamic programming. The budget is fixed beforehand
                          and y is the best there is, not a draw.
    PFR                   Poisson functional representation (Li & El Gamal 2018): of shared candidates y_1, y_2, ... from N(0, 1 + v)
                          the one with the least arrival time over density ratio. Exact with candidates without end; here 2^(I + 8).
    PFR in chunks         the same for chunks of at most 14 bits, 2^(chunk + 2) candidates each (Vonderfecht & Liu 2025). Too few to be exact.
    ORC in chunks         ordered random coding (Theis & Yosri 2022): as many candidates, arrival times of a process that ends with them.
    greedy, 1-D           greedy rejection (Harsha et al. 2010; Flamich & Theis 2023), each number by itself: takes the first candidate
                          that the mass which is still missing allows. Exact.
    dither                x + u rounded, u shared (Ziv 1985): y has uniform noise. Exact for this noise, which is not Gaussian.
    dither, E8            the same, eight numbers at a time, rounded to the lattice E8, whose cell is rounder (Zamir & Feder 1996).

The columns.
    bits                  sent over useful, in percent. Useful is the mean of log2 q(y) / p(y), q = N(x, 1) and p = N(0, 1 + v): what y
                          is worth to a receiver who goes on as if its noise were Gaussian. It is I for whatever is exact.
    shift                 sum of x y over sum of x^2: 1 if all of x arrives.
    work                  log2 of the multiplications of the sender, about.
    bounds                on exact schemes for any p and q, over I: log2(I + 1) + 4 bits more always do (Li & El Gamal, PFR), even + 2.45
                          (ring toss, arXiv 2604.23076), if 2^I candidates or more are looked at; for some p and q hardly less than
                          log2(I + 1) does. The schemes here have Gaussian p and q, which can be cheaper.

Sent bits are the trellis' message, or -log2 of the probability that the receiver expects: Zipf's for indices of candidates; for
greedy rejection the frequencies of octaves; for rounded numbers their distribution given u. A range coder adds little to that. The two
PFR and ORC draw their candidates' inner products and lengths, from which all follows, and not the candidates themselves.
"""

import argparse
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import ndtr

from diffusers_compress.coding.channels import CHANNELS, channel_of

SIZES, BITS = (1, 16, 256, 16_384), (2, 10, 100, 1000)
MOST = 8  # bits a number: rows with more are left out
CHUNK_BITS, SPARE_BITS, EXACT_SPARE = 14, 2, 8
LARGEST_EXACT = 10  # bits of a message for which 2^(I + 8) candidates are drawn
UNIFORM = math.sqrt(12)  # step of rounding whose error has variance 1
E8 = 1 / math.sqrt(929 / 12960)  # step of the lattice whose cell has variance 1 a dimension (Conway & Sloane 1982)


# Each scheme: (x [B, n], v, I, generator) -> bits [B], <x, y> [B], |y|^2 [B], multiplications of a message


def trellis(name):
    channel = channel_of(CHANNELS[name].number)

    def simulate(x, v, kl, generator):
        shift, budget, step = torch.from_numpy(x).float(), channel.budget(kl), int(generator.integers(2**31))
        rank = torch.zeros(shift.shape, dtype=torch.int64)
        _, y = channel.encode(shift, torch.full_like(shift, v), rank, budget, step)
        return np.full(len(x), float(budget)), *products(x, y.double().numpy()), 2.0**14 * x.shape[1]

    return simulate


def products(x, y):
    return (x * y).sum(1), (y * y).sum(1)


def choose(x, v, count, ordered, generator):
    """Of `count` candidates y from N(0, 1 + v): index k from 1, <x, y> and |y|^2 of the one that PFR or ORC takes; x [n]."""
    length = math.sqrt(x @ x)
    along = math.sqrt(1 + v) * generator.standard_normal(count)
    across = (1 + v) * (2 * generator.standard_gamma((len(x) - 1) / 2, count) if len(x) > 1 else np.zeros(count))
    log_ratio = along * length - (along**2 + across) * v / (1 + v) / 2
    waits = generator.standard_exponential(count)
    arrivals = np.cumsum(waits / np.arange(count, 0, -1) if ordered else waits)
    k = int((np.log(arrivals) - log_ratio).argmin())
    return k + 1, along[k] * length, along[k] ** 2 + across[k]


def candidates(chunk_bits, spare_bits, ordered=False):
    def simulate(x, v, kl, generator):
        parts = np.array_split(x, max(1, math.ceil(kl / chunk_bits)), axis=1)
        bits = kl / len(parts)
        count = round(2 ** (bits + spare_bits))
        slope = 1 + 1 / (bits + math.log2(math.e) / math.e + 1)
        zipf = np.arange(1, count + 1.0) ** -slope
        cost = np.log2(zipf.sum() / zipf)
        found = np.zeros((3, len(x)))
        for part in parts:
            for i, row in enumerate(part):
                k, dot, square = choose(row, v, count, ordered, generator)
                found[:, i] += cost[k - 1], dot, square
        return *found, float(count) * x.shape[1]

    return simulate


def greedy(x, v, kl, generator):
    """Each number under N(0, 1 + v): with r = q / p a candidate is taken with probability (r - L) / S, L being the density given away so
    far and S the mass left."""
    m, spread = x.flatten(), math.sqrt(1 + v)
    centre, curvature = m * (1 + v) / v, v / (1 + v)  # r is largest there: log r = top - curvature (y - centre)^2 / 2
    top = math.log(spread) + m**2 / (2 * v)
    y, k, given, left = np.zeros_like(m), np.zeros_like(m), np.zeros_like(m), np.ones_like(m)
    open_, d = np.arange(len(m)), 0
    while len(open_):
        d += 1
        draw = spread * generator.standard_normal(len(open_))
        ratio = np.exp(top[open_] - curvature * (draw - centre[open_]) ** 2 / 2)
        taken = generator.random(len(open_)) * left[open_] < ratio - given[open_]
        y[open_[taken]], k[open_[taken]] = draw[taken], d
        open_ = open_[~taken]
        given[open_] += left[open_]
        # S = Q(r > L) - L P(r > L): r is above L in an interval
        half = np.sqrt(np.maximum(0, 2 * (top[open_] - np.log(given[open_])) / curvature))
        low, high = centre[open_] - half, centre[open_] + half
        q, p = (
            ndtr((high - mean) / deviation) - ndtr((low - mean) / deviation) for mean, deviation in ((m[open_], 1), (0, spread))
        )
        left[open_] = np.maximum(q - given[open_] * p, 1e-300)
    octave = np.floor(np.log2(k))
    _, row, counts = np.unique(octave, return_inverse=True, return_counts=True)
    cost = np.log2(len(k) / counts)[row] + octave
    return cost.reshape(x.shape).sum(1), *products(x, y.reshape(x.shape)), k.sum() / len(x)


def dither(x, v, kl, generator):
    u, deviation = generator.random(x.shape) - 0.5, math.sqrt(v) / UNIFORM
    k = np.floor(x / UNIFORM + u + 0.5)
    # That of k, by the nearer tail: x / step is in (k - u - 1/2, k - u + 1/2)
    edge = np.abs(k - u)
    bits = -np.log2(ndtr((0.5 - edge) / deviation) - ndtr((-0.5 - edge) / deviation))
    return bits.sum(1), *products(x, UNIFORM * (k - u)), float(x.shape[1])


def dither_e8(x, v, kl, generator):
    """A lattice point's probability is taken to be proportional to N(0, 1 + v) at y; with less than half a bit a number that is a bad guess."""
    blocks = x.reshape(-1, 8) / E8
    u = 2 * generator.random(blocks.shape)
    u -= nearest(u)
    point = nearest(blocks + u)
    y, variance = point - u, (1 + v) / E8**2

    # The sum over E8 = D8 and D8 + 1/2, D8 being the integers of even sum: (sum over all + sum over all with a sign) / 2
    reach, total = math.ceil(9 * math.sqrt(variance)) + 2, 0.0
    for coset in (0, 0.5):
        plain, signed = np.zeros((2, *u.shape))
        for k in range(-reach, reach + 1):
            term = np.exp(-((k + coset - u) ** 2) / (2 * variance))
            plain, signed = plain + term, signed + (-1) ** k * term
        total = total + (plain.prod(1) + signed.prod(1)) / 2
    bits = np.log2(total) + (y**2).sum(1) / (2 * variance * math.log(2))
    return bits.reshape(len(x), -1).sum(1), *products(x, E8 * y.reshape(x.shape)), 4.0 * x.shape[1]


def nearest(x):
    """The point of E8 nearest to each row of x [N, 8] (Conway & Sloane 1982, "Fast quantizing and decoding algorithms")."""
    points = []
    for coset in (0, 0.5):
        point = np.rint(x - coset)
        worst = np.abs(x - coset - point).argmax(1)[:, None]
        rest = np.take_along_axis(x - coset - point, worst, 1)
        odd = (point.sum(1, keepdims=True) % 2).astype(bool)
        np.put_along_axis(point, worst, np.take_along_axis(point, worst, 1) + odd * np.where(rest < 0, -1, 1), 1)
        points.append(point + coset)
    first, second = (((x - point) ** 2).sum(1, keepdims=True) for point in points)
    return np.where(first <= second, *points)


class Scheme(NamedTuple):
    """law: of y given x. fits: whether n numbers and I bits can be tried. effort: trials, relative."""

    simulate: Callable
    law: str
    fits: Callable = lambda n, kl: True
    effort: float = 1.0


SCHEMES = {
    "trellis": Scheme(trellis("trellis"), "the likeliest y", effort=0.5),
    "trellis32": Scheme(trellis("trellis32"), "the likeliest y", effort=0.1),
    "PFR": Scheme(
        candidates(math.inf, EXACT_SPARE), "exact but for candidates beyond 2^(I + 8)", lambda n, kl: kl <= LARGEST_EXACT
    ),
    "PFR in chunks": Scheme(candidates(CHUNK_BITS, SPARE_BITS), "not exact", lambda n, kl: kl <= CHUNK_BITS * n),
    "ORC in chunks": Scheme(candidates(CHUNK_BITS, SPARE_BITS, ordered=True), "not exact", lambda n, kl: kl <= CHUNK_BITS * n),
    "greedy, 1-D": Scheme(greedy, "exact", effort=2),
    "dither": Scheme(dither, "exact, noise uniform", effort=4),
    "dither, E8": Scheme(dither_e8, "exact, noise uniform in a cell of E8", lambda n, kl: n % 8 == 0 and 2 * kl >= n, effort=4),
}
BOUNDS = {"log2(I+1)": 0.0, "+ 2.45": 2.45, "+ 4": 4.0}


def measure(scheme, n, kl, trials, seed):
    """-> sent / useful - 1, two standard errors of it, shift, log2 of the work."""
    generator, v = np.random.default_rng(seed), 2 ** (2 * kl / n) - 1
    bits, dots, shifts, worth, work = [], 0.0, 0.0, [], 0.0
    size = min(trials, 4 if n > 1000 else 16)
    for _ in range(math.ceil(trials / size)):
        x = math.sqrt(v) * generator.standard_normal((size, n))
        sent, dot, square, work = scheme.simulate(x, v, kl, generator)
        length = (x * x).sum(1)
        # log2 q(y) / p(y), less what it would be on average of this x, were y drawn from q, plus I, which is that on average
        worth.append(kl + ((square - n - length) / (1 + v) - square + 2 * dot - length + n) / (2 * math.log(2)))
        bits.append(sent)
        dots, shifts = dots + dot.sum(), shifts + length.sum()
    bits, worth = np.concatenate(bits), np.concatenate(worth)
    useful, error = worth.mean(), 2 * worth.std() / math.sqrt(len(worth))
    if scheme.law.startswith("exact"):
        if abs(useful - kl) > 2 * error:
            raise RuntimeError(f"n = {n}, I = {kl}: {useful:.2f} +- {error:.2f} useful bits of what should be exact")
        useful, error = kl, 0.0
    ratio = bits.mean() / useful
    error = math.hypot(error / useful, 2 * bits.std() / bits.mean() / math.sqrt(len(bits)))
    return ratio - 1, ratio * error, dots / shifts, math.log2(work)


def table(title, rows, columns):
    """A table in Markdown: rows by (n, I), columns by scheme, what is missing as a dash."""
    print(f"\n{title}\n\n| n | I | " + " | ".join(columns) + " |\n" + "|--" * (len(columns) + 2) + "|")
    for (n, kl), cells in rows.items():
        print(f"| {n:,} | {kl:,} | " + " | ".join(cells.get(name, "-") for name in columns) + " |")


def percent(x):
    return f"{100 * x:+.1f} %" if x < 10 else f"x {1 + x:,.0f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=SCHEMES)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="n")
    parser.add_argument("--bits", type=int, nargs="+", default=BITS, help="I")
    parser.add_argument("--trials", type=int, default=5000, help="over I^0.75, more for fast schemes and fewer for large n")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    bits, shift, work = ({(n, kl): {} for n in args.sizes for kl in args.bits if kl <= MOST * n} for _ in range(3))
    worst = 0.0
    for n, kl in bits:
        for name in args.schemes:
            scheme = SCHEMES[name]
            if not scheme.fits(n, kl):
                continue
            trials = max(8, round(scheme.effort * args.trials / kl**0.75 / (n / 100 if n > 100 else 1) ** 0.25))
            over, error, reached, log_work = measure(scheme, n, kl, trials, args.seed)
            print(
                f"n {n:6} I {kl:5} {name:14} {percent(over):>8} +- {100 * error:4.1f}  shift {reached:.3f}  {trials} trials",
                flush=True,
            )
            worst = max(worst, error / (1 + over))
            bits[n, kl][name], shift[n, kl][name], work[n, kl][name] = percent(over), f"{reached:.2f}", f"{log_work:.0f}"
        for name, constant in BOUNDS.items():
            bits[n, kl][name] = percent((math.log2(kl + 1) + constant) / kl)
    table(
        f"Bits sent over useful ones, two standard errors {100 * worst:.0f} % or less, and one-shot bounds",
        bits,
        [*args.schemes, *BOUNDS],
    )
    table("Shift that arrived", shift, args.schemes)
    table("Work of the sender, log2 of multiplications", work, args.schemes)
    print("\n" + "\n".join(f"{name}: {SCHEMES[name].law}" for name in args.schemes))


if __name__ == "__main__":
    main()
