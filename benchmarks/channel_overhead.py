"""What the channels cost: bits sent over useful bits, for synthetic shifts. Prints one row for each channel, profile and KL.

useful bits = (mean achieved shift along the wanted one)^2 / (2 ln 2); sent / useful is 1 for a perfect channel. Sent bits are
those of one payload for all trials, without what an empty payload takes. The Poisson channel draws up to 65,536 candidates:
expect minutes.
"""

import argparse
import math
import time

import torch

from diffusers_compress.channels import poisson, trellis

PROFILES = {"even": lambda n: torch.ones(n), "smooth": lambda n: torch.exp(2 * torch.sin(2 * math.pi * torch.arange(n) / n))}


def random_shift(n, kl, profile, generator):
    """Shift of `kl` bits: white Gaussian noise times a profile -> [n]."""
    m = torch.randn(n, generator=generator) * PROFILES[profile](n)
    return m * math.sqrt(2 * math.log(2) * kl) / m.norm()


def measure(channel, n, kl, profile, trials, seed, device):
    """-> (sent bits, useful bits, two relative standard errors of their ratio, achieved / wanted shift, seconds of both)."""
    generator = torch.Generator().manual_seed(seed)
    budget = channel.budget(kl)
    messages, achieved, encoding, decoding = [], [], 0.0, 0.0
    for step in range(trials):
        shift = random_shift(n, kl, profile, generator).to(device)
        start = time.perf_counter()
        message, y = channel.encode(shift, budget, seed + step)
        middle = time.perf_counter()
        if not torch.equal(channel.decode(message, n, budget, seed + step, device), y):
            raise RuntimeError(f"decoder's sample differs at step {seed + step}")
        encoding, decoding = encoding + middle - start, decoding + time.perf_counter() - middle
        messages.append(message)
        achieved.append((y @ shift / shift.norm()).item())
    sent = 8 * (len(channel.pack(messages, [budget] * trials)) - len(channel.pack([], []))) / trials
    achieved = torch.tensor(achieved, dtype=torch.float64)
    useful = achieved.mean().item() ** 2 / (2 * math.log(2))
    single = torch.tensor([8.0 * len(channel.pack([message], [budget])) for message in messages])
    error = 2 * math.hypot(2 * achieved.std() / achieved.mean(), single.std() / single.mean()) / math.sqrt(trials)
    wanted = math.sqrt(2 * math.log(2) * kl)
    return sent, useful, error, achieved.mean().item() / wanted, encoding / trials, decoding / trials


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=40, help="of the trellis; 100 / KL times as many below 100 bits")
    parser.add_argument("--poisson-trials", type=int, default=6, help="0: leave this channel out")
    parser.add_argument("--dims", type=int, default=16_384)
    parser.add_argument("--kl", type=float, nargs="+", default=[20, 100, 500], help="bits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    print(f"{args.dims} dimensions; +- is two standard errors")
    print("channel profile     KL    sent  useful  sent/useful      shift/wanted  encode ms  decode ms  trials", flush=True)
    for name, channel, trials in (("trellis", trellis, args.trials), ("poisson", poisson, args.poisson_trials)):
        for profile in PROFILES if trials else ():
            for kl in args.kl:
                count = math.ceil(trials * max(1, 100 / kl))
                measured = measure(channel, args.dims, kl, profile, count, args.seed, args.device)
                sent, useful, error, shift, encoding, decoding = measured
                ratio = sent / useful
                print(
                    f"{name:7} {profile:7} {kl:6.0f} {sent:7.1f} {useful:7.1f}  {ratio:.3f} +- {error * ratio:.3f}"
                    f"  {shift:12.3f} {1e3 * encoding:10.1f} {1e3 * decoding:10.1f} {count:7}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
