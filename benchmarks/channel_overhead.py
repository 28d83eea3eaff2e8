"""What the channels cost: bits sent over useful bits, for synthetic errors. Prints one row for each channel, profile and KL.

    python benchmarks/channel_overhead.py --poisson-trials 0

The coefficients of an error are normal with variance e_i: all the same (even), or exp(1.5 N(0, 1)) (uneven). The receiver knows e and
the budget, and so the excess v; the sender goes as far as in the codec: until N(m, I) lies the budget's KL from N(0, I + v).

useful bits    what the sample y that was sent is worth, the mean of
                   log2 q(y) / p(y) = sum_i [log(1 + v_i) + y_i^2 / (1 + v_i) - (y_i - m_i)^2] / (2 ln 2)
               For the Poisson channel, which sends too few of a draw's noise, (mean achieved shift along m)^2 / (2 ln 2).
sent / useful  is 1 for a perfect channel. +- is two standard errors.

Sent bits are those of one payload for all trials, without what an empty payload takes. After a trellis' rows comes the line through
its useful bits, useful = slope sent - intercept, by least squares of the relative error; those lines are in `channels/__init__.py`.
The Poisson channel draws up to 65,536 candidates: expect minutes.
"""

import argparse
import math
import platform
import time
from dataclasses import replace

import numpy as np
import torch

from diffusers_compress.codecs.diffc import reference
from diffusers_compress.coding.channels import CHANNELS, channel_of

PROFILES = {"even": 0.0, "uneven": 1.5}  # standard deviation of log e


def draw(batch, n, kl, channel, budget, spread, generator):
    """Shifts of `kl` bits, with the excess and the rank that the receiver knows -> three [batch, n]."""
    e = (spread * torch.randn(batch, n, generator=generator)).exp()
    error = e.sqrt() * torch.randn(batch, n, generator=generator)
    if not channel.wide:
        return error * math.sqrt(2 * math.log(2) * kl) / error.norm(dim=1, keepdim=True), torch.zeros_like(e), reference.rank(e)
    v = reference.excess(e, channel.kl(budget))
    reached = reference.snr_gain(error.square(), v, channel.kl(budget)).float()
    return reached.sqrt()[:, None] * error, v, reference.rank(e)


def likelihood_ratio(y, m, v):
    """log2 q(y) / p(y), q = N(m, I), p = N(0, I + v) -> [B]."""
    y, m, v = y.double(), m.double(), v.double()
    return (v.log1p() + y.square() / (1 + v) - (y - m).square()).sum(1) / (2 * math.log(2))


def measure(channel, n, kl, spread, batches, batch, seed, device):
    """-> (sent bits, useful bits, two relative standard errors of their ratio, seconds of encoding and of decoding a picture)."""
    generator = torch.Generator().manual_seed(seed)
    budget, trials = channel.budget(kl), batches * batch
    messages, worth, encoding, decoding = [], [], 0.0, 0.0
    for step in range(seed, seed + batches):
        m, v, rank = (x.to(device) for x in draw(batch, n, kl, channel, budget, spread, generator))
        start = time.perf_counter()
        message, y = channel.encode(m, v, rank, budget, step)
        middle = time.perf_counter()
        if not torch.equal(channel.decode(message, v, rank, budget, step), y):
            raise RuntimeError(f"decoder's samples differ at step {step}")
        encoding, decoding = encoding + middle - start, decoding + time.perf_counter() - middle
        messages.extend(message)
        worth.append(likelihood_ratio(y, m, v) if channel.wide else ((y * m).sum(1) / m.norm(dim=1)).double())
    worth = torch.cat(worth)
    useful = worth.mean() if channel.wide else worth.mean().square() / (2 * math.log(2))
    error = worth.std() / worth.mean() * (1 if channel.wide else 2)
    sent = 8 * (len(channel.pack(messages, [budget] * trials)) - len(channel.pack([], []))) / trials
    single = torch.tensor([8.0 * len(channel.pack([message], [budget])) for message in messages])
    error = 2 * math.hypot(error, single.std() / single.mean()) / math.sqrt(trials)
    return sent, float(useful), error, encoding / trials, decoding / trials


def line(rows):
    """(slope, intercept) of the line through (sent, useful) with the least relative error, and the largest that is left."""
    sent, useful = np.array(rows).T
    terms = np.stack([sent, -np.ones_like(sent)], 1) / useful[:, None]
    fitted = np.linalg.lstsq(terms, np.ones_like(sent), rcond=None)[0]
    return *fitted, np.abs(terms @ fitted - 1).max()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", nargs="+", default=list(CHANNELS), choices=CHANNELS)
    parser.add_argument("--trials", type=int, default=40, help="of a trellis; 100 / KL times as many below 100 bits")
    parser.add_argument("--poisson-trials", type=int, default=6, help="0: leave this channel out")
    parser.add_argument("--batch", type=int, default=4, help="pictures at a time")
    parser.add_argument("--dims", type=int, default=16_384)
    parser.add_argument("--kl", type=float, nargs="+", default=[20, 100, 500, 1500], help="bits")
    parser.add_argument("--survivors", type=int, help="messages that the search of trellis32 follows, in place of its own number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{platform.machine()} CPU"
    print(
        f"{args.dims} dimensions, batches of {args.batch}; {name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print("channel    profile     KL    sent  useful  sent/useful       encode ms  decode ms  trials", flush=True)
    for name in args.channels:
        channel, trials = channel_of(CHANNELS[name].number), args.poisson_trials if name == "poisson" else args.trials
        if args.survivors and getattr(channel, "survivors", None):
            channel = replace(channel, survivors=args.survivors)
        rows = []
        for profile, spread in PROFILES.items() if trials else ():
            for kl in args.kl:
                batches = math.ceil(trials * max(1, 100 / kl) / args.batch)
                measured = measure(channel, args.dims, kl, spread, batches, args.batch, args.seed, args.device)
                sent, useful, error, encoding, decoding = measured
                rows.append((sent, useful))
                ratio = sent / useful
                print(
                    f"{name:10} {profile:7} {kl:6.0f} {sent:7.1f} {useful:7.1f}  {ratio:.3f} +- {error * ratio:.3f}"
                    f"  {1e3 * encoding:12.1f} {1e3 * decoding:10.1f} {batches * args.batch:7}",
                    flush=True,
                )
        if channel.wide and len(rows) > 1:
            slope, intercept, worst = line(rows)
            print(f"{name:10} useful = {slope:.4f} sent - {intercept:.2f}, to {100 * worst:.1f} %", flush=True)


if __name__ == "__main__":
    main()
