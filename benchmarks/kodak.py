"""Rate and distortion of DiffC on a folder of pictures, through files: one process encodes, another decodes.

    python benchmarks/kodak.py FOLDER --bpp 0.02 0.05 0.1 --jobs 2

Prints a Markdown table of means, and with `--out FILE` writes one JSON line a picture and rate. Everything is measured on the file
that was written and read back; PSNR is over 8-bit sRGB samples. With more jobs than one, seconds are those of one thread each.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers_compress.pipelines.diffc import describe

from diffusers_compress import DiffCPipeline, embedded_model, images


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bpp", type=float, nargs="+", default=[0.02, 0.05, 0.1])
    parser.add_argument("--reconstruction", nargs="+", default=["flow", "denoised"])
    parser.add_argument("--model", default=embedded_model())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--spacing", type=float, default=0.125)
    parser.add_argument("--steps", type=int, default=10, help="network calls of the reconstruction")
    parser.add_argument("--every", type=int, default=1, help="take each n-th picture only")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each if there are several")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


@cache
def pipeline(model, device, jobs):
    if jobs > 1:
        torch.set_num_threads(1)
    pipe = DiffCPipeline.from_pretrained(model, dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def psnr(a, b):
    return float(10 * np.log10(255**2 / np.mean((np.asarray(a, dtype=float) - np.asarray(b, dtype=float)) ** 2)))


def encode(args, picture, bpp, path):
    """Write the file; seconds."""
    pipe, image = pipeline(args.model, args.device, args.jobs), images.open_image(picture)
    start = time.perf_counter()
    path.write_bytes(pipe.compress(image, target_bpp=bpp, spacing=args.spacing).bitstreams[0])
    return time.perf_counter() - start


def decode(args, picture, bpp, path):
    """Read the file and measure: one row of figures."""
    pipe, image, data = pipeline(args.model, args.device, args.jobs), images.open_image(picture), path.read_bytes()
    row = {"picture": picture.name, "target": bpp, "bytes": len(data), "bpp": 8 * len(data) / (image.width * image.height)}
    row["steps"] = describe(data)["steps"]
    for reconstruction in args.reconstruction:
        start = time.perf_counter()
        decoded = pipe.decompress(data, reconstruction=reconstruction, num_inference_steps=args.steps).images[0]
        row[f"{reconstruction}_seconds"] = time.perf_counter() - start
        row[f"{reconstruction}_psnr"] = psnr(image.convert("RGB"), decoded)
    return row


def vae_psnr(args, picture):
    """PSNR of the autoencoder alone."""
    pipe, image = pipeline(args.model, args.device, args.jobs), images.open_image(picture).convert("RGB")
    x = images.pad(images.to_tensor(image)[0][None], pipe.vae_scale_factor)
    with torch.no_grad():
        x_hat = pipe.decode_latent(pipe.encode_picture(x))
    return psnr(image, images.to_output(images.crop(x_hat, image.height, image.width))[0])


def in_processes(jobs, function, *columns):
    """function over the columns' rows in fresh processes, in order."""
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(function, *columns))


def main():
    args = parse_args()
    pictures = sorted(p for p in args.folder.iterdir() if p.suffix.lower() in {".png", ".jpg", ".jpeg", ".webp"})[:: args.every]
    if not pictures:
        raise SystemExit(f"no pictures in {args.folder}")
    cases = [(args, picture, bpp) for bpp in args.bpp for picture in pictures]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.dfc" for number in range(len(cases))]
        seconds = in_processes(args.jobs, encode, *zip(*cases), paths)
        rows = in_processes(args.jobs, decode, *zip(*cases), paths)
    for row, time_taken in zip(rows, seconds):
        row["encode_seconds"] = time_taken
    if args.out:
        args.out.write_text("".join(json.dumps(row) + "\n" for row in rows))

    ceiling = np.mean(in_processes(args.jobs, vae_psnr, [args] * len(pictures), pictures))
    print(f"{len(pictures)} pictures; the autoencoder alone: {ceiling:.2f} dB\n")
    names = [name for name in rows[0] if name.endswith(("_psnr", "_seconds"))]
    print(
        "| target bpp | bpp | of target | bytes | steps |",
        *(f"{name.replace('_', ' ').replace('psnr', 'PSNR')} |" for name in names),
    )
    print("|--" * (5 + len(names)) + "|")
    for bpp in args.bpp:
        mine = [row for row in rows if row["target"] == bpp]
        over = sum(row["bpp"] > bpp for row in mine)
        mean = {name: np.mean([row[name] for row in mine]) for name in ["bpp", "bytes", "steps", *names]}
        values = " | ".join(f"{mean[name]:.2f}" if name.endswith("psnr") else f"{mean[name]:.1f}" for name in names)
        share = f"{100 * mean['bpp'] / bpp:.1f} %" + (f", {over} OVER" if over else "")
        print(f"| {bpp} | {mean['bpp']:.4f} | {share} | {mean['bytes']:.0f} | {mean['steps']:.1f} | {values} |")


if __name__ == "__main__":
    main()
