"""Relic on a folder of pictures, through files: what the entropy models save, and what denoising does to a picture.

    python benchmarks/relic.py FOLDER --bpp 0.03 0.06 0.1 0.2 0.3 0.4 --decode-every 3

Prints two Markdown tables of means, and with `--out FILE` writes one JSON line a picture and rate. Bytes are of files that were
written and read back; PSNR is over 8-bit sRGB samples.

Rate: the symbols of the hyperprior's file are coded again by the adaptive model, and by one table for each channel, "static" by its
calibrated deviation, "fitted" by the picture itself (as though that cost nothing). "Over ideal": file bytes less header and checksum,
over the code length of the integer tables.

Picture: HF is the luminance power above 1/8 cycle a pixel, relative to what the autoencoder alone gives back (geometric mean);
"as read" is the file's latent without denoising, "preview" what the entropy model expects.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from diffusers_compress import RelicPipeline, embedded_model, images
from diffusers_compress.codecs.relic import format as relic_format
from diffusers_compress.codecs.relic.quantizer import Quantizer
from diffusers_compress.coding import logistic
from diffusers_compress.format import container
from diffusers_compress.metrics.distortion import psnr, samples

DECODINGS = {"preview": {"preview": True}, "mean": {"realism": 0.0}, "half": {"realism": 0.5}, "sample": {"realism": 1.0}}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bpp", type=float, nargs="+", default=[0.03, 0.06, 0.1, 0.2, 0.3, 0.4])
    parser.add_argument("--model", default=embedded_model())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=5, help="network calls")
    parser.add_argument("--every", type=int, default=1, help="take each n-th picture only")
    parser.add_argument("--decode-every", type=int, default=1, help="decode each n-th of these only")
    parser.add_argument("--rounding", default="plain", choices=relic_format.ROUNDINGS)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def texture(picture):
    """Luminance power above 1/8 cycle a pixel."""
    y = np.asarray(picture.convert("L"), dtype=float)
    y = (y - y.mean()) * np.hanning(y.shape[0])[:, None] * np.hanning(y.shape[1])
    frequency = np.hypot(np.fft.fftfreq(y.shape[0])[:, None], np.fft.fftfreq(y.shape[1]))
    return float((np.abs(np.fft.fft2(y)) ** 2)[frequency > 1 / 8].sum())


def picture_of(pipe, latent, size):
    x = pipe.decode_latent(latent[None].float().to(pipe.device)).cpu()
    return images.to_output(images.crop(x, size[1], size[0]))[0]


def static_bytes(quantizer, v):
    """One table for each channel: (chosen by its calibrated deviation, by the picture), in bytes."""
    bits = np.zeros(2)
    indices = np.arange(64)
    for unit, values, dither in zip(quantizer.units, v, quantizer.dither):
        if unit:
            k = (values + dither) // logistic.UNIT
            costs = logistic.code_length(k[:, None], dither[:, None], indices).sum(0)
            # a logistic law's standard deviation is pi / sqrt(3) times its scale
            calibrated = round(4 * np.log2(unit / logistic.UNIT * np.sqrt(3) / np.pi) + 20)
            bits += costs[np.clip(calibrated, 0, 63)], costs.min()
    return bits / 8


def measure_rate(pipe, image, bpp, path, rounding):
    row = {"target": bpp}
    start = time.perf_counter()
    path.write_bytes(pipe.compress(image, target_bpp=bpp, rounding=rounding).bitstreams[0])
    row["encode_seconds"] = time.perf_counter() - start
    data = path.read_bytes()
    header, parameters, payload = relic_format.read_file(data)
    row |= {"bytes": len(data), "bpp": 8 * len(data) / (image.width * image.height)}
    row |= {"step": relic_format.step_width(parameters.step), "timestep": parameters.timestep, "channels": sum(parameters.coded)}

    start = time.perf_counter()
    quantizer = Quantizer(parameters, pipe.statistics(), pipe.latent_shape(header.height, header.width))
    v = pipe.entropy_model().receive(quantizer, payload).v
    row["entropy_decode_seconds"] = time.perf_counter() - start
    sender = pipe.entropy_model().send(quantizer, v)
    row["over_ideal"] = len(payload) / (sender.bits() / 8)
    overhead = container.overhead(header)
    for name in ("hyperprior", "adaptive"):
        row[name] = overhead + len(pipe.entropy_model(name).send(quantizer, v).payload())
    row["static"], row["fitted"] = overhead + static_bytes(quantizer, v)
    return row


def measure_picture(pipe, image, path, steps):
    data, original = path.read_bytes(), image.convert("RGB")
    x = images.pad(images.to_tensor(image)[0][None], pipe.vae_scale_factor)
    x_0 = pipe.encode_picture(x)[0].cpu()
    alone = picture_of(pipe, x_0, image.size)
    _, parameters, payload = relic_format.read_file(data)
    y_hat, _ = pipe.read_latent(parameters, payload, x_0.shape, pipe.noise_schedule())
    shown = {"autoencoder": alone, "as read": picture_of(pipe, y_hat, image.size)}
    for name, options in DECODINGS.items():
        start = time.perf_counter()
        shown[name] = pipe.decompress(data, num_inference_steps=steps, **options).images[0]
        seconds = time.perf_counter() - start
    row = {"decode_seconds": seconds}
    for name, picture in shown.items():
        row |= {f"psnr_{name}": psnr(samples(original), samples(picture)), f"hf_{name}": texture(picture) / texture(alone)}
    return row


def print_table(columns, rows, rates):
    print("| target bpp |", " | ".join(columns), "|")
    print("|--" * (len(columns) + 1) + "|")
    for bpp in rates:
        mine = [row for row in rows if row["target"] == bpp]
        print(f"| {bpp} |", " | ".join(value(mine) for value in columns.values()), "|")
    print()


def mean(name, form):
    return lambda rows: format(np.mean([row[name] for row in rows]), form)


def geometric_mean(name):
    return lambda rows: format(np.exp(np.mean([np.log(row[name]) for row in rows])), ".3f")


def ratio(name, other):
    return lambda rows: format(sum(row[name] for row in rows) / sum(row[other] for row in rows), ".3f")


@torch.no_grad()
def main():
    args = parse_args()
    pictures = sorted(p for p in args.folder.iterdir() if p.suffix.lower() in {".png", ".jpg", ".jpeg", ".webp"})[:: args.every]
    if not pictures:
        raise SystemExit(f"no pictures in {args.folder}")
    pipe = RelicPipeline.from_pretrained(args.model, dtype=torch.float32).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.dfc"
        for number, picture in enumerate(pictures):
            image = images.open_image(picture)
            for bpp in args.bpp:
                rows.append({"picture": picture.name} | measure_rate(pipe, image, bpp, path, args.rounding))
                if number % args.decode_every == 0:
                    rows[-1] |= measure_picture(pipe, image, path, args.steps)
                if args.out:
                    with args.out.open("a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")

    print(f"{len(pictures)} pictures\n")
    columns = {name: mean(name, ".0f") for name in ("bytes", "hyperprior", "adaptive", "static", "fitted")}
    columns |= {"adaptive / static": ratio("adaptive", "static"), "adaptive / fitted": ratio("adaptive", "fitted")}
    columns |= {"hyperprior / adaptive": ratio("hyperprior", "adaptive"), "over ideal": mean("over_ideal", ".4f")}
    columns = {"bpp": mean("bpp", ".4f")} | columns | {"step width": mean("step", ".3f"), "timestep": mean("timestep", ".0f")}
    columns |= {"channels": mean("channels", ".1f"), "encode s": mean("encode_seconds", ".2f")}
    columns |= {"entropy decode s": mean("entropy_decode_seconds", ".2f"), "over target": lambda rows: over_target(rows)}
    print_table(columns, rows, args.bpp)

    decoded = [row for row in rows if "decode_seconds" in row]
    print(f"{len(decoded) // len(args.bpp)} pictures\n")
    columns = {"PSNR autoencoder": mean("psnr_autoencoder", ".2f")}
    columns |= {f"PSNR {name}": mean(f"psnr_{name}", ".2f") for name in ("as read", *DECODINGS)}
    columns |= {f"HF {name}": geometric_mean(f"hf_{name}") for name in ("as read", *DECODINGS)}
    columns |= {"decode s": mean("decode_seconds", ".1f")}
    print_table(columns, decoded, args.bpp)


def over_target(rows):
    return str(sum(row["bpp"] > row["target"] for row in rows))


if __name__ == "__main__":
    main()
