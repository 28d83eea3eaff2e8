"""What the whole DiffC chain costs where the truth is known: a Gaussian source with its exact denoiser, no network and no picture.

    python benchmarks/gaussian_source.py --sources 3

The coefficients of the source (`dct.transform`) are independent Gaussians with a power spectrum P_i = frequency^-exponent, mean
1, so that the posterior mean E[x_0 | x_t] is one Wiener filter, with the error e_i = P_i / (1 + snr P_i). The product's own loop,
file and budgets run over Stable Diffusion's levels; budgets are chosen so that a perfect channel would end at the wanted snr.

channel   perfect: draws y ~ N(m, I) itself and is charged the exact KL of every step and no side information, so what it lies
          above 1 is the loss of few big steps and of the start from noise. published: the Poisson channel simulated in law
          (`diffc_efficiency.PublishedChannel`), charged its payload alone. trellis, trellis32, poisson: the product's.
error     what the reference knows of the error: exact; wrong, by a factor exp(N(0, 1)) for each coefficient; default, the built-in
          spectrum 1 / frequency^2; none, the variance of the published coder.
sent      bits of the payload and of `Parameters`, in whole bytes as in a file; not the header that every codec has. Of it
          `side` are those of the parameters.
D         |x_0 - x_0_hat|^2 / dimensions, x_0_hat being the denoised estimate where the stream ends, as the receiver has it.
ideal     Information that x_t holds at the snr g where the exact denoiser has this error on average:
              D = sum_i P_i / (1 + g P_i)                                       solved for g
              I(x_0; x_g) = 1/2 integral_0^g mmse(g') dg' = 1/2 sum_i log2(1 + g P_i)     Guo, Shamai & Verdu 2005 (I-MMSE)
          Sending x_g in this many bits is the best that a coder of noisy latents can do: infinitely many steps, perfect channel.
R(D)      Rate-distortion function: what any coder needs at least for this error, by reverse water-filling:
              D = sum_i min(theta, P_i),    R = 1/2 sum_i max(0, log2(P_i / theta))        Cover & Thomas, theorem 10.3.3

+- is the standard deviation over sources; one source's ratio may be below 1, since D and bits are those of one draw. All rows see the
same sources. The Poisson channel takes minutes.
"""

import argparse
import math
import statistics
from dataclasses import replace

import numpy as np
import torch
from diffc_efficiency import PublishedChannel
from diffusers import DDIMScheduler

from diffusers_compress import contract
from diffusers_compress.codecs.diffc import ends, loop, reference
from diffusers_compress.codecs.diffc import format as diffc_format
from diffusers_compress.codecs.diffc.rate import RateControl
from diffusers_compress.coding import dct, index_payload, randomness
from diffusers_compress.coding.channels import CHANNELS, channel_of
from diffusers_compress.diffusion import schedule
from diffusers_compress.format import container


class PerfectChannel:
    """Draws y ~ N(shift, I) where no receiver could follow; its message is the KL in bits."""

    def __init__(self, seed, wide):
        self.wide, self.generator = wide, torch.Generator().manual_seed(seed)

    def kl(self, budget):
        return budget

    def budget(self, kl):
        return round(kl)

    def encode(self, shift, excess, rank, budget, step):
        nats = (excess.double().log1p() + (1 + shift.double().square()) / (1 + excess.double()) - 1).sum(1) / 2
        return (nats / math.log(2)).tolist(), shift + torch.randn(shift.shape, generator=self.generator)

    def payload_bytes(self, budgets):
        return sum(budgets) // 8


def power_spectrum(shape, exponent):
    """P_i for every coefficient of latents of `shape` [C, h, w], mean 1, the same for all C -> [C, h, w] float64."""
    power = reference.frequencies(*shape[1:]) ** -exponent
    return (power / power.mean()).expand(shape)


def draw(power, seed):
    """A source -> x_0 [1, C, h, w] float32."""
    white = torch.randn(power.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return dct.inverse((white * power.sqrt()).float())[None]


def posterior_mean(x_t, power, alpha, sigma):
    """E[x_0 | x_t] for x_t [1, C, h, w], the Wiener filter."""
    gain = (alpha * power / (alpha**2 * power + sigma**2)).float()
    return dct.inverse(gain * dct.transform(x_t))


def error_variance(kind, snr, power, seed):
    """What the reference is told of the error's variance [C, h, w]."""
    error = power / (1 + snr * power)
    if kind == "wrong":
        error = error * torch.randn(power.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).exp()
    return reference.error_variance(None, snr, tuple(power.shape)) if kind == "default" else error.float()


def solve(rising, value):
    """The x > 0 at which a rising function takes this value, by bisection."""
    low, high = 1e-9, 1e9
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if rising(middle) < value else (low, middle)
    return high


def information(power, error):
    """Bits of I(x_0; x_g) at the snr g where the denoiser's mean total squared error is `error`."""
    g = solve(lambda g: -float((power / (1 + g * power)).sum()), -error)
    return float(torch.log2(1 + g * power).sum()) / 2


def rate_distortion(power, error):
    """Bits of R(D) at a total squared error D = `error`."""
    theta = solve(lambda theta: float(power.clamp(max=theta).sum()), error)
    return float(torch.log2(power / theta).clamp(min=0).sum()) / 2


def estimate(noise, power, channel, end, kind, seed):
    """x_0_hat where the chain of a Sender or Receiver ends."""
    x_t = randomness.normals(power.numel(), randomness.START).view(1, *power.shape)

    def denoiser(x_t, timesteps, active):
        return posterior_mean(x_t, power, *noise.level(timesteps[0]))

    def known_error(x_t, x_0_hat, timesteps):
        error = error_variance(kind, float(noise.snr[timesteps[0]]), power, seed)[None]
        return error, reference.rank(error)

    ((x_t, t),) = loop.reverse(noise, channel, x_t, [end], denoiser, known_error)
    return posterior_mean(x_t, power, *noise.level(t))


def code(noise, power, x_0, name, kind, steps, end_snr, seed):
    """Send x_0 and receive it -> (steps, sent bits, side bits among them, x_0_hat of the receiver)."""
    number = CHANNELS[name].number if name in CHANNELS else 1
    wide = kind != "none"
    if name == "perfect":
        channel = PerfectChannel(seed, wide)
    elif name == "published":
        channel = PublishedChannel(seed)
    else:
        channel = channel_of(number)
        channel = replace(channel, wide=wide) if channel.wide else channel
    useful = float(torch.log2(1 + end_snr * power).sum()) / 2
    budget = diffc_format.nearest(channel.budget(useful / steps), diffc_format.BUDGET_DIGITS)
    header = container.Header(contract.DIFFC, 8 * power.shape[-1], 8 * power.shape[-2], bytes(4), b"")
    sender = ends.Sender(x_0, RateControl(noise, header, diffc_format.Parameters(number, budget), 0, steps, math.inf))
    sender.channel = channel
    x_0_hat = estimate(noise, power, channel, sender, kind, seed)
    if name == "perfect":
        return len(sender.messages), sum(sender.messages), 0, x_0_hat
    if name == "published":
        payload = index_payload.pack(sender.messages, sender.rate.parameters.budgets)
        return len(sender.messages), 8 * (len(payload) - index_payload.LENGTH_BYTES), 0, x_0_hat

    data = sender.file()
    header, parameters, messages, _ = diffc_format.read_file(data)
    side, payload = len(header.parameters), len(data) - container.overhead(header)
    received = estimate(noise, power, channel, ends.Receiver(noise, parameters, messages), kind, seed)
    if not torch.equal(received, x_0_hat):
        raise RuntimeError(f"the receiver's estimate differs: {name}, {steps} steps, source {seed}")
    return len(sender.messages), 8 * (payload + side), 8 * side, received


def row(noise, power, seeds, name, kind, steps, end_snr):
    """One line of the table, over all sources."""
    results = []
    for seed in seeds:
        x_0 = draw(power, seed)
        taken, sent, side, x_0_hat = code(noise, power, x_0, name, kind, steps, end_snr, seed)
        error = float((x_0 - x_0_hat).double().square().sum())
        ideal, bound = information(power, error), rate_distortion(power, error)
        results.append((taken, sent, side, error / power.numel(), ideal, sent / ideal, sent / bound))
    taken, sent, side, error, ideal, ratio, over_bound = (np.mean(column) for column in zip(*results))
    spread = statistics.stdev(result[5] for result in results) if len(results) > 1 else math.nan
    return (
        f"{end_snr:7g} {taken:5.0f}  {name:9} {kind:7} {sent:6.0f} {side:5.0f} {error:6.3f} {ideal:6.0f}"
        f"   {ratio:.3f} +- {spread:.3f} {over_bound:10.3f}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the first source")
    parser.add_argument("--dims", type=int, nargs=3, default=[4, 64, 64], metavar=("C", "H", "W"))
    parser.add_argument("--exponent", type=float, default=2)
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 6, 8, 12, 25])
    parser.add_argument("--end-snr", type=float, nargs="+", default=[0.3, 1.0])
    names = ["perfect", "published", *CHANNELS]
    parser.add_argument("--channels", nargs="+", default=["perfect", "trellis"], choices=names)
    parser.add_argument("--errors", nargs="+", default=["exact", "wrong", "none"], choices=["exact", "wrong", "default", "none"])
    args = parser.parse_args()

    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="sample")
    noise = schedule.from_pure_noise(schedule.from_scheduler(scheduler))
    power = power_spectrum(tuple(args.dims), args.exponent)
    print(
        f"{power.numel()} dimensions, spectrum frequency^-{args.exponent:g}, {args.sources} sources; +- is their standard deviation"
    )
    print("end snr steps  channel   error     sent  side      D  ideal      sent/ideal  sent/R(D)", flush=True)
    for end_snr in args.end_snr:
        for steps in args.steps:
            for name in args.channels:
                for kind in ["none"] if name in ("published", "poisson") else args.errors:
                    seeds = range(args.seed, args.seed + args.sources)
                    print(row(noise, power, seeds, name, kind, steps, end_snr), flush=True)


if __name__ == "__main__":
    main()
