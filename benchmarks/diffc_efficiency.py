"""DiffC against the published coder and schedule: bytes at equal PSNR, with a fifth and a tenth of its network calls.

    python benchmarks/diffc_efficiency.py FOLDER --out DIR

Published: the timesteps of Vonderfecht & Liu (2025), counted off their configuration, the variance of the published coder, and the
Poisson functional representation in chunks of up to 14 bits out of 2^16 candidates under a Zipf law (`channels/poisson.py`). Drawing
2^16 candidates of all dimensions takes hours a picture on a CPU, so a candidate is drawn here as what decides: its inner product with
the shift, N(0, |shift|^2). That chooses index and y with exactly the law of the real coder; the index is packed by the real one. Its
bytes are those of the payload and of our container with an empty header of DiffC: budgets and schedule are not charged.

Ours: files as `compress` writes them at the bytes per pixel that the published stream reached, read back and decoded, with a fifth
and a tenth of its calls (rounded up); all side information is in them. PSNR is that of `denoised`, over 8-bit samples, for both.

DIR/rows.jsonl gets a line a picture and is not measured twice; the table is the mean over pictures of the Bjontegaard rate difference
(Bjontegaard 2001, piecewise cubic interpolation of the logarithm of bytes over PSNR).
"""

import argparse
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator

from diffusers_compress import DiffCPipeline, contract, embedded_model, images
from diffusers_compress.codecs.diffc import format as diffc_format
from diffusers_compress.codecs.diffc import loop
from diffusers_compress.codecs.diffc.ends import Planned
from diffusers_compress.codecs.diffc.rate import overhead
from diffusers_compress.coding import index_payload, randomness
from diffusers_compress.coding.channels import poisson
from diffusers_compress.diffusion import equations, schedule
from diffusers_compress.files import write_file
from diffusers_compress.format import container
from diffusers_compress.metrics.distortion import psnr, samples

# Network calls that the published schedule has made when it reaches a timestep.
CALLS = {1000: 0, 900: 4, 800: 8, 700: 12, 600: 17, 500: 24, 400: 35, 300: 46, 200: 62, 100: 90, 50: 113, 20: 142, 10: 152}
OURS = {
    "a fifth": (5, "trellis"),
    "a fifth, trellis32": (5, "trellis32"),
    "a tenth": (10, "trellis"),
    "a tenth, trellis32": (10, "trellis32"),
}


class PublishedChannel:
    """The Poisson channel with candidates drawn as their inner product with the shift."""

    wide = False
    kl, budget, payload_bytes = map(staticmethod, (poisson.kl, poisson.budget, index_payload.payload_bytes))

    def __init__(self, seed):
        self.generator = np.random.default_rng(seed)

    def encode(self, shift, excess, rank, budget, step):
        messages, ys = zip(*[self.simulate(row.double().numpy(), budget) for row in shift])
        return list(messages), torch.from_numpy(np.stack(ys)).float()

    def simulate(self, shift, budget):
        """(index of each chunk, y [n])."""
        n, chunk_bits = len(shift), list(index_payload.bits_of_chunks(budget))
        order = self.generator.permutation(n)
        y, message = np.empty(n), np.zeros(len(chunk_bits), dtype=np.int64)
        for c, (low, high) in enumerate(poisson._bounds(n, len(chunk_bits))):
            m, chosen = shift[order[low:high]], self.generator.standard_normal(high - low)
            length = np.linalg.norm(m)
            if budget and length:
                count = 2 ** index_payload.octave_count(chunk_bits[c]) - 1
                along = self.generator.standard_normal(count)
                arrivals = np.log(self.generator.standard_exponential(count).cumsum())
                message[c] = (arrivals - along * length).argmin()
                chosen += (along[message[c]] - chosen @ m / length) * m / length
            y[order[low:high]] = chosen
        return message, y


class PublishedSender:
    """Knows x_0 and goes down the published schedule."""

    def __init__(self, noise, x_0):
        self.noise, self.x_0, self.messages, self.budgets = noise, x_0, [], []
        calls = np.interp(np.arange(153), list(CALLS.values()), list(CALLS))
        self.timesteps = [min(noise.alpha.numel() - 1, round(t)) for t in calls]

    def goes_on(self, t, step):
        return step + 1 < len(self.timesteps) and not self.enough()

    @staticmethod
    def plan(channel, senders, ts, x_0_hat, error, limits):
        (sender,), (t,) = senders, ts
        s = sender.timesteps[len(sender.messages) + 1]
        budget = round(float(equations.kl_bits(sender.x_0, x_0_hat, sender.noise.snr[t], sender.noise.snr[s])))
        sender.budgets.append(budget)
        shift = float(sender.noise.snr[s] - sender.noise.snr[t]) ** 0.5 * (sender.x_0 - x_0_hat).flatten()
        return [Planned(s, budget, shift, torch.zeros_like(shift))]

    @staticmethod
    def transmit(channel, shifts, v, rank, budget, step):
        return channel.encode(torch.stack(shifts), v, rank, budget, step)


def picture_of(pipe, x_0, image):
    pixels = images.crop(pipe.decode_latent(x_0), image.height, image.width)
    return images.to_output(pixels)[0]


@torch.no_grad()
def published(pipe, image, targets, seed):
    """For each target in bpp the first step of the stream that reaches it: [{calls, bytes, psnr}]."""
    noise = schedule.from_scheduler(pipe.scheduler)
    x_0 = pipe.encode_picture(images.pad(images.to_tensor(image)[0][None], pipe.vae_scale_factor))
    header = container.Header(contract.DIFFC, image.width, image.height, bytes(4), b"")
    empty, sender, points = overhead(header, diffc_format.Parameters(2, 0)), PublishedSender(noise, x_0), []
    embeds = pipe.encode_prompt([""])

    def stream_bytes():
        return empty - 2 + len(index_payload.pack(sender.messages, sender.budgets))

    sender.enough = lambda: len(points) == len(targets)

    def network(x_t, t, active):
        output = pipe.predict(x_t, t, embeds)
        reached = [target for target in targets[len(points) :] if 8 * stream_bytes() >= target * image.width * image.height]
        if reached:
            x_0_hat = equations.predict_x0(output, x_t, *noise.level(t[0]), noise.prediction_type)
            decoded = picture_of(pipe, x_0_hat, image)
            point = {"calls": len(sender.messages), "bytes": stream_bytes(), "psnr": psnr(samples(image), samples(decoded))}
            points.extend([point] * len(reached))
        return output

    def no_variance(x_t, x_0_hat, t):
        return torch.ones_like(x_t), torch.zeros_like(x_t)

    x_t = randomness.normals(x_0.numel(), randomness.START, device=x_0.device).view_as(x_0)
    loop.reverse(noise, PublishedChannel(seed), x_t, [sender], network, no_variance)
    return points


def ours(pipe, image, target, steps, channel):
    """{calls, bytes, psnr} of a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "one.dfc"
        files = pipe.compress(image, target_bpp=target, num_coding_steps=steps, coder=channel).bitstreams
        write_file(path, files[0])
        data = path.read_bytes()
    decoded = pipe.decompress(data, reconstruction="denoised").images[0]
    return {"calls": diffc_format.describe(data)["steps"], "bytes": len(data), "psnr": psnr(samples(image), samples(decoded))}


def measure(args, pipe, path, seed):
    image = images.open_image(path).convert("RGB")
    row = {"picture": path.name, "published": published(pipe, image, sorted(args.bpp), seed)}
    pixels = image.width * image.height
    for name, (share, channel) in OURS.items():
        row[name] = [
            ours(pipe, image, 8 * point["bytes"] / pixels, math.ceil(point["calls"] / share), channel)
            for point in row["published"]
        ]
    return row


def rate_difference(reference, points):
    """Mean difference of bytes at equal PSNR, as a share of the reference's bytes."""
    curves, spans = [], []
    for curve in (reference, points):
        known = sorted({point["psnr"]: math.log(point["bytes"]) for point in curve}.items())
        levels, logs = zip(*known)
        curves.append(PchipInterpolator(levels, logs))
        spans.append((levels[0], levels[-1]))
    low, high = max(span[0] for span in spans), min(span[1] for span in spans)
    means = [curve.integrate(low, high) / (high - low) for curve in curves]
    return math.exp(means[1] - means[0]) - 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bpp", type=float, nargs="+", default=[0.01, 0.02, 0.035, 0.06, 0.1])
    parser.add_argument("--model", default=embedded_model())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--every", type=int, default=1, help="take each n-th picture only")
    parser.add_argument("--first", type=int, default=0, help="beginning with this one")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "rows.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    pipe = DiffCPipeline.from_pretrained(args.model, dtype=torch.float32).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    paths = sorted(p for p in args.folder.iterdir() if p.suffix.lower() in {".png", ".jpg", ".jpeg", ".webp"})[
        args.first :: args.every
    ]
    for seed, path in enumerate(paths):
        if path.name not in {row["picture"] for row in rows}:
            rows.append(measure(args, pipe, path, seed))
            with log.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")

    print(
        f"{len(rows)} pictures\n\n| calls | " + " | ".join(f"{bpp} bpp" for bpp in sorted(args.bpp)) + " | bytes at equal PSNR |"
    )
    print("|--" * (len(args.bpp) + 2) + "|")
    for name in ("published", *OURS):
        points = list(zip(*[row[name] for row in rows]))
        cells = [
            "{:.1f} calls, {:.0f} bytes, {:.2f} dB".format(*(np.mean([p[k] for p in at]) for k in ("calls", "bytes", "psnr")))
            for at in points
        ]
        differences = [rate_difference(row["published"], row[name]) for row in rows] if name != "published" else [0]
        spread = f" ± {2 * np.std(differences) / len(differences) ** 0.5:.1%}" if name != "published" else ""
        print(f"| {name} | " + " | ".join(cells) + f" | {np.mean(differences):+.1%}{spread} |")


if __name__ == "__main__":
    main()
