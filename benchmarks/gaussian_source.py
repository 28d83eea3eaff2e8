"""What the whole DiffC chain costs where the truth is known: a Gaussian source with its exact denoiser, no network and no picture.

    python benchmarks/gaussian_source.py --sources 3 --channels perfect trellis

The source is a stationary Gaussian field whose power spectrum v_i falls as frequency^-exponent, mean 1, so that the posterior mean
E[x_0 | x_t] is one Wiener filter. The product's own loop, level placement and budget rounding run over Stable Diffusion's levels.

sent     bits of the payload and of `diffc.Parameters` (budgets, spacing, fraction of the last step), in whole bytes as in a file;
         not the header that every codec has. Of it `side` are those of the parameters.
error    D = |x_0 - x_0_hat|^2, x_0_hat being the denoised estimate where the stream ends, as the receiver has it from these bytes;
         printed as D / dimensions.
ideal    Information that x_t holds at the snr g where the exact denoiser has this error on average:
             D = sum_i v_i / (1 + g v_i)                                       solved for g
             I(x_0; x_g) = 1/2 integral_0^g mmse(g') dg' = 1/2 sum_i log2(1 + g v_i)     Guo, Shamai & Verdu 2005 (I-MMSE)
         Sending x_g in this many bits is the best that a coder of noisy latents can do: infinitely many steps, perfect channel.
R(D)     Rate-distortion function: what any coder needs at least for this error, by reverse water-filling:
             D = sum_i min(theta, v_i),    R = 1/2 sum_i max(0, log2(v_i / theta))        Cover & Thomas, theorem 10.3.3

The `perfect` channel draws y ~ N(m, I) itself and is charged the exact KL of every step and no side information: what it lies above
1 is the loss of few big steps and of the start from noise. +- is the standard deviation over sources; one source's ratio may be
below 1, since D and bits are those of one draw. All channels see the same sources. The Poisson channel takes minutes.
"""

import argparse
import math
import statistics

import torch
from diffusers import DDIMScheduler

from diffusers_compress import bitstream, common_randomness, diffusion, schedule
from diffusers_compress.pipelines import diffc


class PerfectChannel:
    """Draws y ~ N(shift, I) where no receiver could follow; its message is the KL in bits."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def budget(self, kl):
        return round(kl)

    def encode(self, shift, budget, step):
        return float(shift.square().sum()) / (2 * math.log(2)), shift + torch.randn(shift.shape, generator=self.generator)

    def payload_bytes(self, budgets):
        return 0


def power_spectrum(shape, exponent):
    """v_i for every element of fft2 over the last two of `shape` [C, h, w], mean 1, the same for all C -> [C, h, w] float64."""
    f_y, f_x = (torch.fft.fftfreq(n, dtype=torch.float64) for n in shape[1:])
    frequency = torch.hypot(f_y[:, None], f_x[None]).clamp(min=1 / max(shape[1:]))
    v = frequency**-exponent
    return (v / v.mean()).expand(shape)


def draw(v, seed):
    """A source with power spectrum v [C, h, w] -> x_0 [1, C, h, w] float32."""
    white = torch.randn(v.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.fft.ifft2(torch.fft.fft2(white) * v.sqrt()).real.float()[None]


def posterior_mean(x_t, v, alpha, sigma):
    """E[x_0 | x_t] for x_t [1, C, h, w], the Wiener filter."""
    gain = (alpha * v / (alpha**2 * v + sigma**2)).float()
    return torch.fft.ifft2(torch.fft.fft2(x_t) * gain).real


def solve(rising, value):
    """The x > 0 at which a rising function takes this value, by bisection."""
    low, high = 1e-9, 1e9
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if rising(middle) < value else (low, middle)
    return high


def information(v, error):
    """Bits of I(x_0; x_g) at the snr g where the denoiser's mean total squared error is `error`."""
    g = solve(lambda g: -float((v / (1 + g * v)).sum()), -error)
    return float(torch.log2(1 + g * v).sum()) / 2


def rate_distortion(v, error):
    """Bits of R(D) at a total squared error D = `error`."""
    theta = solve(lambda theta: float(v.clamp(max=theta).sum()), error)
    return float(torch.log2(v / theta).clamp(min=0).sum()) / 2


def estimate(noise, v, end):
    """x_0_hat where the chain of a Sender or Receiver ends."""
    x_t = common_randomness.normals(v.numel(), common_randomness.START).view(1, *v.shape)

    def denoiser(x_t, timesteps, active):
        return posterior_mean(x_t, v, *noise.level(timesteps[0]))

    ((x_t, t),) = diffusion.run([diffc.reverse(noise, x_t, end)], denoiser)
    return posterior_mean(x_t, v, *noise.level(t))


def code(noise, v, x_0, name, spacing, end_snr, seed):
    """Send x_0 and receive it -> (steps, sent bits, side bits among them, x_0_hat of the receiver)."""
    stop_t = schedule.timestep_at(noise, math.sqrt(end_snr))
    number = diffc.CHANNEL_NUMBERS.get(name)
    header = diffc.Header(diffc.DIFFC, 8 * v.shape[-1], 8 * v.shape[-2], bytes(4), b"")
    sender = diffc.Sender(noise, x_0, header, diffc.Parameters(number or 1, spacing, 128, []), stop_t, math.inf)
    if not number:
        sender.channel = PerfectChannel(seed)
    x_0_hat = estimate(noise, v, sender)
    if not number:
        return len(sender.messages), sum(sender.messages), 0, x_0_hat

    data = sender.file()
    header, parameters, messages, _ = diffc.read_file(data)
    side, payload = len(header.parameters), len(data) - bitstream.overhead(header)
    receiver = diffc.Receiver(noise, parameters, messages)
    received = estimate(noise, v, receiver)
    if not torch.equal(received, x_0_hat):
        raise RuntimeError(f"the receiver's estimate differs: {name}, spacing {spacing}, source {seed}")
    return len(sender.messages), 8 * (payload + side), 8 * side, received


def row(noise, v, seeds, name, spacing, end_snr):
    """One line of the table, over all sources."""
    results = []
    for seed in seeds:
        x_0 = draw(v, seed)
        steps, sent, side, x_0_hat = code(noise, v, x_0, name, spacing, end_snr, seed)
        error = float((x_0 - x_0_hat).double().square().sum())
        ideal, bound = information(v, error), rate_distortion(v, error)
        results.append((steps, sent, side, error / v.numel(), ideal, sent / ideal, sent / bound))
    steps, sent, side, error, ideal, ratio, over_bound = map(statistics.fmean, zip(*results))
    spread = statistics.stdev(result[5] for result in results) if len(results) > 1 else math.nan
    return (
        f"{end_snr:7g} {spacing:4}/64 {steps:6.0f}  {name:8} {sent:6.0f} {side:5.0f} {error:6.3f} {ideal:6.0f}"
        f"   {ratio:.3f} +- {spread:.3f} {over_bound:10.3f}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the first source")
    parser.add_argument("--dims", type=int, nargs=3, default=[4, 64, 64], metavar=("C", "H", "W"))
    parser.add_argument("--exponent", type=float, default=2)
    parser.add_argument("--spacings", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="of the levels in alpha/sigma, in 1/64")
    parser.add_argument("--end-snr", type=float, nargs="+", default=[0.3, 1.0])
    names = ["perfect", *diffc.CHANNEL_NUMBERS]
    parser.add_argument("--channels", nargs="+", default=["perfect", "trellis"], choices=names)
    args = parser.parse_args()

    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="sample")
    noise, v = schedule.from_scheduler(scheduler), power_spectrum(args.dims, args.exponent)
    print(
        f"{v.numel()} dimensions, spectrum frequency^-{args.exponent:g}, {args.sources} sources; +- is their standard deviation"
    )
    print("end snr spacing steps  channel    sent  side  error  ideal      sent/ideal  sent/R(D)", flush=True)
    for end_snr in args.end_snr:
        for spacing in args.spacings:
            for name in args.channels:
                print(row(noise, v, range(args.seed, args.seed + args.sources), name, spacing, end_snr), flush=True)


if __name__ == "__main__":
    main()
