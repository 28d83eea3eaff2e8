"""What knowing the error's variance brings DiffC: bytes against network calls, for streams that end at the same noise level.

    python benchmarks/diffc_variance.py FOLDER --out bytes_against_calls.svg

Prints, and plots, means over the pictures: bytes of the file, calls of the sender, PSNR of `denoised`, and the high-frequency power of
`flow` over that of the autoencoder's own picture (`realism.high_frequency_power`). Everything is measured on files that were written
and read back, by the trellis channel. Variances:

    fixed        that of the published coder
    default      the built-in spectrum
    calibrated   the model's spectrum of `calibration.calibrate_error`
    head         that times the model's variance head
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import torch

from diffusers_compress import DiffCPipeline, embedded_model, images
from diffusers_compress.codecs.diffc import format as diffc_format
from diffusers_compress.coding.channels import trellis
from diffusers_compress.diffusion import schedule
from diffusers_compress.files import write_file
from diffusers_compress.metrics.distortion import psnr, samples
from diffusers_compress.metrics.realism import high_frequency_power

matplotlib.use("svg")
KINDS = ("fixed", "default", "calibrated", "head")


def pipeline_of(kind, args):
    pipe = DiffCPipeline.from_pretrained(args.model, dtype=torch.float32).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    if kind != "head":
        pipe.variance_head = None
    if kind in ("fixed", "default"):
        pipe.register_to_config(calibration=None)
    trellis.TRELLIS = replace(trellis.TRELLIS, wide=kind != "fixed")
    return pipe


def power(image):
    return high_frequency_power(samples(image))


@torch.no_grad()
def own_picture(pipe, image):
    """The autoencoder's picture of a picture."""
    x_0 = pipe.encode_picture(images.pad(images.to_tensor(image)[0][None], pipe.vae_scale_factor))
    return images.to_output(images.crop(pipe.decode_latent(x_0), image.height, image.width))[0]


def measure(pipe, image, steps, fidelity, path):
    """(calls, bytes, PSNR of denoised, high-frequency power of flow over the autoencoder's)."""
    path.unlink(missing_ok=True)
    write_file(path, pipe.compress(image, fidelity=fidelity, num_coding_steps=steps, coder="trellis").bitstreams[0])
    data = path.read_bytes()
    path.unlink()
    denoised, flow = (pipe.decompress(data, reconstruction=kind).images[0] for kind in ("denoised", "flow"))
    return (
        diffc_format.describe(data)["steps"],
        len(data),
        psnr(samples(image), samples(denoised)),
        power(flow) / power(own_picture(pipe, image)),
    )


def plot(rows, path):
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for kind in KINDS:
        points = sorted((row["calls"], row["bytes"]) for row in rows if row["kind"] == kind)
        if points:
            axes.plot(*zip(*points), marker="o", label=kind)
    axes.set(xlabel="network calls of the sender", ylabel="bytes of the file", xscale="log")
    axes.legend(title="variance of the error")
    axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the plot; the rows go beside it as .jsonl")
    parser.add_argument("--steps", type=int, nargs="+", default=[3, 4, 6, 8, 12, 24, 48])
    parser.add_argument("--ratio", type=float, default=2.0, help="alpha/sigma where the streams end")
    parser.add_argument("--every", type=int, default=6, help="take each n-th picture only")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--model", default=embedded_model())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    pictures = sorted(p for p in args.folder.iterdir() if p.suffix.lower() in {".png", ".jpg", ".jpeg", ".webp"})[:: args.every]
    rows = []
    print(f"{len(pictures)} pictures, streams that end at alpha/sigma {args.ratio:g}\n")
    print("| variance | calls | bytes | denoised | high-frequency power of flow |\n|--|--|--|--|--|")
    for kind in args.kinds:
        pipe = pipeline_of(kind, args)
        noise = schedule.from_scheduler(pipe.scheduler)
        fidelity = 1 - schedule.timestep_at(noise, args.ratio) / (noise.alpha.numel() - 1)
        for steps in args.steps:
            loaded = [images.open_image(path).convert("RGB") for path in pictures]
            figures = [measure(pipe, image, steps, fidelity, args.out.with_suffix(".dfc")) for image in loaded]
            calls, size, decibel, texture = np.mean(figures, axis=0)
            rows.append({"kind": kind, "calls": calls, "bytes": size, "psnr": decibel, "texture": texture})
            print(f"| {kind} | {calls:.1f} | {size:.0f} | {decibel:.2f} dB | {texture:.3f} |", flush=True)
    args.out.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot(rows, args.out)


if __name__ == "__main__":
    main()
