"""What theory says of a Gaussian source, and how near the package's own equations, solvers and channel come to it. No network, no picture.

    python benchmarks/theory.py --out theory

The source has independent coefficients with a power spectrum P_i = frequency^-exponent, mean 1, and its exact denoiser, as in
`gaussian_source.py`. Rates are bits, distortions and distances mean squares, of a coefficient.

R(D)      least rate for a squared error D, by reverse water-filling (Cover & Thomas, theorem 10.3.3):
              D = sum_i min(theta, P_i),  R = 1/2 sum_i max(0, log2(P_i / theta))
R(D, 0)   the same for pictures that are distributed as the source. With common randomness each coefficient and its picture are jointly Gaussian
          with correlation rho, R = -1/2 log2(1 - rho^2), D = 2 P (1 - rho) (Zhang et al. 2021), all coefficients at one slope dD/dR. Without it
          the best code of error D gives natural pictures of error 2 D: R(D / 2) (Blau & Michaeli 2019; Yan et al. 2021).
noisy x_t what DiffC sends with an ideal channel: R = 1/2 sum_i log2(1 + snr P_i), which is 1/2 the integral of the denoiser's error over
          the snr (I-MMSE, Guo, Shamai & Verdu 2005; the integral is taken by the trapezium rule from the denoiser as a check), and the error
          of the mean, of the end of the probability-flow ODE (exact, and by `solvers.solve` in 10 calls) and of an ancestral draw.
dial      D over D* + (P* - P)^2, which the law says is 1: of `realism.dial` with P = (1 - realism) P*, for one source drawn; and in
          expectation of the ODE with its score scaled by c, in steps of the closed form z_s = x_0_hat + (sigma_s / sigma_t)^c (z_t - x_0_hat),
          z = x_t / alpha_t. P, the distance from the distribution of the source, is summed over coefficients.
DiffC     the package's own files of such a source, by `gaussian_source.code`, with the trellis.

    python benchmarks/theory.py --photos KODAK --every 6 --crop 256 --out theory

does not look at a Gaussian source but at photos, as the embedded model's network knows them, in a plot of its own:

I-MMSE    bits that x_t holds of x_0, 1/2 the integral of the network's squared error over the snr (by the trapezium rule over --levels levels),
          against that error: what an ideal channel with infinitely many steps would send. A network that knew less would have more error,
          hence more bits.
ideal KL  DiffC's loop with a channel that draws x_s itself, and is charged the exact KL of each of its 12 steps.
files     of DiffC and Relic, whole, and the error of the receiver's mean of x_0. "over" is bits over those that I-MMSE says for the same error.
"""

import argparse
from pathlib import Path

import gaussian_source
import numpy as np
import torch
from diffusers import DDIMScheduler, UniPCMultistepScheduler

from diffusers_compress import DiffCPipeline, RelicPipeline, contract, embedded_model, images
from diffusers_compress.codecs.diffc import ends, rate
from diffusers_compress.codecs.diffc import format as diffc_format
from diffusers_compress.codecs.relic import format as relic_format
from diffusers_compress.coding.channels import CHANNELS, channel_of
from diffusers_compress.diffusion import schedule, solvers
from diffusers_compress.diffusion.realism import dial
from diffusers_compress.files import find_files
from diffusers_compress.format import container

LEVELS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "sample"}
SNRS = (0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
REALISM = (0.0, 0.25, 0.5, 0.75, 1.0)


def rate_distortion(power, distortion):
    """R(D) in bits a coefficient, for mean squared errors [K] -> [K]."""
    count = power.numel()
    return torch.tensor([gaussian_source.rate_distortion(power, float(d) * count) / count for d in distortion])


def natural_rate_distortion(power, slopes):
    """(R, D) a coefficient of R(D, 0) with common randomness, at which all coefficients have the slope dD/dR = -slope.

    R = -1/2 log2(1 - rho^2), D = 2 P (1 - rho):  dD/dR = -2 ln 2 P (1 - rho^2) / rho
    """
    slopes = slopes[:, None] / (2 * torch.log(torch.tensor(2.0, dtype=torch.float64)))
    # P (1 - rho^2) = slope rho
    rho = (-slopes + (slopes**2 + 4 * power**2).sqrt()) / (2 * power)
    return -0.5 * torch.log2(1 - rho**2).mean(1), (2 * power * (1 - rho)).mean(1)


def moments(power, snr):
    """D* and the gains of mean and flow at an snr: x_0_hat = mean z, x_0 = flow z where z = x_0 + noise of variance 1 / snr."""
    mean = snr * power / (1 + snr * power)
    return power / (1 + snr * power), mean, mean.sqrt()


def error(power, snr, gain):
    """Of gain z as an estimate of x_0, and the distance of its distribution from the source's, both squared and a coefficient."""
    squared = (1 - gain) ** 2 * power + gain**2 / snr
    distance = (power.sqrt() - gain * (power + 1 / snr).sqrt()) ** 2
    return squared, distance


def integrated_rate(power, snr, points=20_000):
    """I-MMSE: 1/2 integral of the denoiser's error over the snr, in bits a coefficient."""
    levels = torch.cat([torch.zeros(1, dtype=torch.float64), torch.logspace(-6, 0, points, dtype=torch.float64) * snr])
    errors = torch.stack([(power / (1 + level * power)).mean() for level in levels])
    return float(torch.trapezoid(errors, levels)) / 2 / float(torch.log(torch.tensor(2.0)))


def scaled_gain(power, snr, c, steps):
    """Gain on z of the score-scaled ODE from this snr down to no noise, in steps that are equal in sqrt of the noise's deviation."""
    deviations = torch.linspace(float(snr) ** -0.25, 0, steps + 1, dtype=torch.float64) ** 2
    gain = torch.ones_like(power)
    for t, s in zip(deviations, deviations[1:]):
        mean = power / (power + t**2)
        gain = gain * (mean + (s / t) ** c * (1 - mean))
    return gain


def solved(power, noise, snr, make, seed=0):
    """(x_0, what the walk make(x_t, t) returns) of a source at about this snr."""
    t = schedule.timestep_at(noise, snr**0.5)
    x_0 = gaussian_source.draw(power, seed)
    alpha, sigma = noise.level(t)
    x_t = alpha * x_0 + sigma * torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed + 1))

    def network(x_t, timesteps, active):
        return gaussian_source.posterior_mean(x_t, power, *noise.level(timesteps[0]))

    return x_0, solvers.run([make(x_t, t)], network)[0], float(noise.snr[t])


def mean_square(x):
    return float(x.double().square().mean())


# ------------------------------------------------------------------------------------------------- photos, and a network


def mean_of(pipe, x_t, t):
    """The network's x_0_hat for x_t [1, C, h, w] at timestep t."""
    return pipe.finish([(x_t, t)], [""], 1, 0.0)


def total_square(x):
    return float(x.double().square().sum())


def information_curve(pipe, x_0, levels, seed):
    """(bits [K], squared error [K]) from pure noise, where x_0_hat is 0, to alpha / sigma = 8, at levels that are even in its root."""
    noise, generator = pipe.noise_schedule(), torch.Generator().manual_seed(seed)
    snrs, errors = [0.0], [total_square(x_0)]
    for ratio in 8 * np.linspace(1 / levels, 1, levels) ** 2:
        t = schedule.timestep_at(noise, ratio)
        alpha, sigma = noise.level(t)
        x_t = alpha * x_0 + sigma * torch.randn(x_0.shape, generator=generator)
        snrs.append(float(noise.snr[t]))
        errors.append(total_square(mean_of(pipe, x_t, t) - x_0))
    areas = np.diff(snrs) * (np.array(errors[1:]) + errors[:-1]) / 2
    return np.concatenate([[0], np.cumsum(areas)]) / 2 / np.log(2), np.array(errors)


def ideal_chain(pipe, x_0, fidelity, seed):
    """(KL in bits of all steps, squared error) of DiffC's loop with a perfect channel."""
    noise, channel = schedule.from_pure_noise(pipe.noise_schedule()), gaussian_source.PerfectChannel(seed, True)
    header = container.Header(contract.DIFFC, x_0.shape[-1], x_0.shape[-2], bytes(4), b"")
    parameters, shape = diffc_format.Parameters(CHANNELS["trellis"].number, 0), tuple(x_0.shape[1:])
    control = rate.down_to(noise.timestep_of(fidelity), noise, header, parameters, 12, pipe.error_calibration(), shape)
    sender = ends.Sender(x_0, control)
    sender.channel = channel
    ((x_t, t),) = pipe.reverse(noise, channel, [sender], shape, [""])
    return sum(sender.messages), total_square(mean_of(pipe, x_t, t) - x_0)


def diffc_file(pipe, x_0, image, fidelity):
    """(bits of the file, squared error of the receiver's mean)"""
    data = pipe.compress(image, fidelity=fidelity).bitstreams[0]
    _, parameters, messages, _ = diffc_format.read_file(data)
    noise = schedule.from_pure_noise(pipe.noise_schedule())
    receiver = ends.Receiver(noise, parameters, messages)
    ((x_t, t),) = pipe.reverse(noise, channel_of(parameters.channel), [receiver], tuple(x_0.shape[1:]), [""])
    return 8 * len(data), total_square(mean_of(pipe, x_t, t) - x_0)


def relic_file(pipe, x_0, image, fidelity):
    data = pipe.compress(image, fidelity=fidelity).bitstreams[0]
    _, parameters, payload = relic_format.read_file(data)
    noise = pipe.noise_schedule()
    y_hat, _ = pipe.read_latent(parameters, payload, tuple(x_0.shape[1:]), noise)
    x_t = noise.level(parameters.timestep)[0] * y_hat[None].float()
    return 8 * len(data), total_square(mean_of(pipe, x_t, parameters.timestep) - x_0)


@torch.no_grad()
def photos(args):
    """Curves and points of the photos, summed over them: bits a pixel, mean squared error of the latent."""
    diffc, relic = (kind.from_pretrained(embedded_model()) for kind in (DiffCPipeline, RelicPipeline))
    for pipe in (diffc, relic):
        pipe.set_progress_bar_config(disable=True)
    fidelities, curves, points, pixels, count = (0.4, 0.55, 0.7, 0.8), [], {}, 0, 0
    for seed, path in enumerate(list(find_files(args.photos).files.values())[:: args.every]):
        image = images.open_image(path).convert("RGB")
        left, top = ((side - args.crop) // 2 for side in image.size)
        image = image.crop((left, top, left + args.crop, top + args.crop))
        x_0 = diffc.encode_picture(diffc.pad(images.to_tensor(image)[0])[None])
        pixels, count = pixels + args.crop**2, count + x_0.numel()
        curves.append(information_curve(diffc, x_0, args.levels, seed))
        for fidelity in fidelities:
            for name, found in (
                ("ideal KL, 12 steps", ideal_chain(diffc, x_0, fidelity, seed)),
                ("DiffC's files", diffc_file(diffc, x_0, image, fidelity)),
                ("Relic's files", relic_file(relic, x_0, image, fidelity)),
            ):
                points.setdefault((name, fidelity), []).append(found)
    bits, errors = (sum(column) for column in zip(*curves))
    print("| what | fidelity | bits a pixel | mean squared error | over I-MMSE at that error |\n|--|--|--|--|--|")
    rows = {}
    for (name, fidelity), found in sorted(points.items()):
        sent, error = np.sum(found, 0)
        same = np.exp(np.interp(-np.log(error), -np.log(errors[1:]), np.log(bits[1:])))
        rows.setdefault(name, []).append((sent / pixels, error / count))
        print(f"| {name} | {fidelity:g} | {sent / pixels:.4f} | {error / count:.4f} | {sent / same:.3f} |", flush=True)
    plot_photos(args.out / "network.png", (bits / pixels, errors / count), rows)


def plot_photos(path, curve, rows):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(7, 4.8), layout="constrained")
    axes.plot(*curve, "k.-", label="I-MMSE of the network")
    for (name, points), style in zip(rows.items(), ("C3s", "C0^", "C1o")):
        axes.plot(*zip(*points), style, label=name)
    axes.set(xscale="log", yscale="log", xlabel="bits a pixel", ylabel="squared error of the mean, of a latent's coefficient")
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())  # which would overlap
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("theory"), help="folder of the plots")
    parser.add_argument("--dims", type=int, nargs=3, default=[4, 64, 64], metavar=("C", "H", "W"))
    parser.add_argument("--exponent", type=float, default=2)
    parser.add_argument("--diffc", type=float, nargs="*", default=[0.1, 0.3, 1.0], help="end snr of DiffC's own files")
    parser.add_argument("--photos", type=Path, help="folder: the network on photos in place of the Gaussian source")
    parser.add_argument("--every", type=int, default=6)
    parser.add_argument("--crop", type=int, default=256, help="side of the photos' middle that is taken")
    parser.add_argument("--levels", type=int, default=48)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.photos:
        photos(args)
        return
    power = gaussian_source.power_spectrum(tuple(args.dims), args.exponent)
    flat = power.flatten()
    scheduler = UniPCMultistepScheduler(**LEVELS)
    noise = schedule.from_scheduler(scheduler)

    print("| snr | bits, exact | by I-MMSE | D mean | D flow | in 10 calls | D draw | draw over flow, dB | R(D) of the mean |")
    print("|--|--|--|--|--|--|--|--|--|")
    rows = []
    for snr in SNRS:
        x_0, walked, snr = solved(power, noise, snr, lambda x, t: solvers.solve(x, t, 10, noise, scheduler))
        least, mean, flow = moments(flat, snr)
        bits = float(torch.log2(1 + snr * flat).mean()) / 2
        d_flow = float(error(flat, snr, flow)[0].mean())
        row = [
            snr,
            bits,
            integrated_rate(flat, snr),
            float(least.mean()),
            d_flow,
            mean_square(walked - x_0),
            2 * float(least.mean()),
        ]
        rows.append(row)
        decibels = 10 * torch.log10(torch.tensor(row[6] / d_flow))
        bound = float(rate_distortion(flat, [row[3]])[0])
        print("| " + " | ".join(f"{value:.4g}" for value in [*row, float(decibels), bound]) + " |", flush=True)

    print("\n| realism, 2 - c | dial, 10 calls | scaled, 10 steps | 50 steps |")
    print("|--|--|--|--|")
    curves = {}
    for realism in REALISM:
        x_0, x, snr = solved(power, noise, 1.0, lambda x, t: dial(solvers.solve(x, t, 10, noise, scheduler), realism, noise))
        least, mean, flow = moments(flat, snr)
        farthest = error(flat, snr, mean)[1]
        expected = float(least.mean()) + realism**2 * float(farthest.mean())
        cells = [mean_square(x - x_0) / expected]
        for steps in (10, 50):
            squared, distance = error(flat, snr, scaled_gain(flat, snr, 2 - realism, steps))
            reached = least.sum() + (farthest.sum().sqrt() - distance.sum().sqrt()) ** 2
            cells.append(float(squared.sum() / reached))
        curves[realism] = mean_square(x - x_0)
        print(f"| {realism:g} | " + " | ".join(f"{cell:.4f}" for cell in cells) + " |", flush=True)

    own = []
    coded = schedule.from_pure_noise(schedule.from_scheduler(DDIMScheduler(**LEVELS)))
    if args.diffc:
        print("\n| DiffC's file, end snr | bits | D of its mean | R(D) |\n|--|--|--|--|")
    for end_snr in args.diffc:
        x_0 = gaussian_source.draw(power, 0)
        _, sent, _, x_0_hat = gaussian_source.code(coded, power, x_0, "trellis", "exact", 8, end_snr, 0)
        own.append((sent / flat.numel(), mean_square(x_0 - x_0_hat)))
        print(
            f"| {end_snr:g} | {own[-1][0]:.4f} | {own[-1][1]:.4f} | {float(rate_distortion(flat, [own[-1][1]])[0]):.4f} |",
            flush=True,
        )
    plot(args.out / "theory.png", flat, rows, own, curves)


def plot(path, power, rows, own, curves):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    rows = [row for row in rows if row[0] < 40]
    distortions = torch.logspace(-1.5, -0.02, 60, dtype=torch.float64)
    rates = rate_distortion(power, distortions)
    left.plot(rates, distortions, "k", label="R(D)")
    left.plot(rates, 2 * distortions, "k:", label="natural pictures, no common randomness: R(D / 2)")
    left.plot(
        *natural_rate_distortion(power, torch.logspace(-1.5, 2, 60, dtype=torch.float64)),
        "k--",
        label="R(D, 0), common randomness",
    )
    for column, label, style in ((3, "x_t: mean", "C0-"), (4, "x_t: flow", "C1-"), (6, "x_t: ancestral draw", "C2-")):
        left.plot([row[1] for row in rows], [row[column] for row in rows], style, label=label)
    left.plot([row[1] for row in rows], [row[5] for row in rows], "C1o", markersize=4, label="x_t: solver, 10 calls")
    if own:
        left.plot(*zip(*own), "C3s", label="DiffC's files, mean")
    left.set(xscale="log", yscale="log", xlabel="bits a coefficient", ylabel="squared error a coefficient", ylim=(0.02, 2.2))
    left.legend(fontsize="small")
    right.plot([1 - a for a in curves], list(curves.values()), "C1o-", label="dial, 10 calls")
    first, last = curves[0.0], curves[1.0]
    shares = torch.linspace(0, 1, 50)
    right.plot(shares, first + (1 - shares) ** 2 * (last - first), "k--", label="D* + (P* - P)^2")
    right.set(xlabel="P / P*", ylabel="squared error a coefficient", title="snr 1")
    right.legend(fontsize="small")
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
