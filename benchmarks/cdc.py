"""CDC through files: sizes beside the model's own estimate, and what noise, steps, another process and another type change.

    python benchmarks/cdc.py PICTURES [--model FOLDER] [--every 4] [--fidelity 0.01 0.5 1]

Each picture becomes a file at each rate, which is written and read back. A second process, the command line's, decodes it with weights
of other types. Then 1e-3 times normal noise is added to all that a convolution gives, those in integers included: no symbol may change.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffusers_compress import CDCPipeline, embedded_model, images
from diffusers_compress.codecs.cdc.format import read_file
from diffusers_compress.files import PICTURE_SUFFIXES
from diffusers_compress.metrics.distortion import psnr
from diffusers_compress.metrics.wasserstein import wasserstein_distortion
from diffusers_compress.models.fixed_point import FixedPointConv

PERTURBATION = 1e-3


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--model", default=embedded_model("cdc"))
    parser.add_argument("--every", type=int, default=1, help="take each n-th picture")
    parser.add_argument("--fidelity", type=float, nargs="+", default=[0.01, 0.5, 1.0], help="rates")
    parser.add_argument("--gamma", type=float, nargs="+", default=[0.0, 0.8])
    parser.add_argument("--steps", type=int, nargs="*", default=[4, 17, 65])
    parser.add_argument("--dtypes", nargs="*", default=["float16", "bfloat16"], help="of a second process")
    return parser.parse_args()


def estimated_bits(pipe, x, level):
    """Of a picture x [3, H, W], by the model's probabilities."""
    x = images.pad(x, pipe.multiple)[None].to(**pipe.place)
    with torch.no_grad():
        return float(pipe.context_model.eval()(x, pipe.rates([level]))[1])


def compared(x, image):
    """PSNR, Wasserstein distortion."""
    x, x_hat = ((each + 1) / 2 for each in (x, images.to_tensor(image)[0]))
    return psnr(x, x_hat), wasserstein_distortion(x, x_hat)


def symbols_stay(pipe, data):
    """Whether the file's symbols are the same with small errors in all that convolutions give."""
    file = read_file(data)
    expected, exact = pipe.read_symbols(*file), FixedPointConv.convolve

    def disturbed(layer, *given):
        y = exact(layer, *given)
        return y + PERTURBATION * torch.randn(y.shape, dtype=y.dtype)

    FixedPointConv.convolve = disturbed
    try:
        return torch.equal(pipe.read_symbols(*file), expected)
    finally:
        FixedPointConv.convolve = exact


def decoded_elsewhere(args, file, dtype, steps):
    """The picture that a second process makes of a file."""
    out = file.with_suffix(".png")
    words = ["decode", file, out, "--force", "--model", args.model, "--dtype", dtype, "--steps", steps]
    subprocess.run([sys.executable, "-m", "diffusers_compress.cli", *map(str, words)], check=True, capture_output=True)
    return Image.open(out)


def measured(args, pipe, image, fidelity, file):
    """Figures by name, of one picture at one rate."""
    x, _ = images.to_tensor(image)
    start = time.process_time()
    file.write_bytes(pipe.compress(image, fidelity=fidelity).bitstreams[0])
    found, data = {"encode, s": time.process_time() - start}, file.read_bytes()
    _, parameters, payload = read_file(data)
    found["bpp"] = 8 * len(data) / (image.width * image.height)
    estimate = estimated_bits(pipe, x, parameters.level) / 8
    found |= {"file / estimate": len(data) / estimate, "payload / estimate": len(payload) / estimate}
    found["symbols stay"] = float(symbols_stay(pipe, data))
    found["preview"] = compared(x, pipe.decompress(data, preview=True).images[0])
    for steps in args.steps:
        for gamma in args.gamma:
            start = time.process_time()
            picture = pipe.decompress(data, gamma=gamma, num_inference_steps=steps).images[0]
            found[f"decode {steps}, s"] = time.process_time() - start
            found[f"gamma {gamma:g}, {steps} steps"] = compared(x, picture)
    for dtype in args.dtypes:
        steps = min(args.steps)
        here = compared(x, pipe.decompress(data, num_inference_steps=steps).images[0])[0]
        found[f"PSNR, {dtype} elsewhere"] = compared(x, decoded_elsewhere(args, file, dtype, steps))[0] - here
    return found


def main():
    args = parse_args()
    torch.set_num_threads(1)
    pipe = CDCPipeline.from_pretrained(args.model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    paths = sorted(path for path in args.pictures.iterdir() if path.suffix in PICTURE_SUFFIXES)[:: args.every]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "picture.dfc")
        for fidelity in args.fidelity:
            rows = [measured(args, pipe, images.open_image(path).convert("RGB"), fidelity, file) for path in paths]
            print(
                f"\nfidelity {fidelity:g}, {len(rows)} pictures, PSNR and Wasserstein distortion or one figure, and the largest\n"
            )
            for name in rows[0]:
                values = np.array([row[name] for row in rows])
                mean = " | ".join(f"{value:.4g}" for value in np.atleast_1d(values.mean(0)))
                print(f"| {name} | {mean} | {np.abs(values.reshape(len(rows), -1)[:, 0]).max():.4g} |", flush=True)


if __name__ == "__main__":
    main()
