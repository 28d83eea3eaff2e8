"""What `tune="ms-ssim"` gives and takes: DiffC tuned and not, at the bytes of another format's files.

    python benchmarks/tuning.py KODAK --bpp 0.05 0.1 0.2 0.4

Of each picture AVIF makes its largest file within the rate, or its smallest if none is; DiffC gets as many bytes. All files are written
and read back.
"""

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from diffusers_compress import DiffCPipeline, embedded_model, images
from diffusers_compress.codecs.diffc.tuning import TUNES
from diffusers_compress.evaluation.baselines import BASELINES
from diffusers_compress.files import find_files
from diffusers_compress.images.formats import largest_that_fits
from diffusers_compress.metrics import PICTURE_METRICS, distortion

METRICS = ("psnr", "ms_ssim", "wasserstein", "swd")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--against", choices=BASELINES, default="avif")
    parser.add_argument("--bpp", type=float, nargs="+", default=[0.1])
    parser.add_argument("--tune", choices=TUNES, nargs="+", default=list(TUNES))
    parser.add_argument("--realism", type=float, nargs="+", default=[0.0])
    parser.add_argument("--coding-steps", type=int, help="num_coding_steps of DiffC; its own default if not given")
    parser.add_argument("--every", type=int, default=1, help="take each n-th picture only")
    args = parser.parse_args()
    pipe = DiffCPipeline.from_pretrained(embedded_model(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    metrics, baseline = [PICTURE_METRICS[name].load() for name in METRICS], BASELINES[args.against]
    pictures = [images.open_image(path).convert("RGB") for path in list(find_files(args.folder).files.values())[:: args.every]]

    print("| bpp | codec | " + " | ".join(METRICS) + " | mean bpp | higher MS-SSIM |\n" + "|--" * (len(METRICS) + 4) + "|")
    for bpp in args.bpp:
        rows = defaultdict(list)
        for image in pictures:
            for name, file, decoded in coded(pipe, baseline, image, bpp, args):
                x, x_hat = distortion.samples(image), distortion.samples(decoded)
                rows[name].append([8 * file / x[0].numel(), *(metric(x, x_hat, None) for metric in metrics)])
        reference, at = np.array(rows[args.against]), 1 + METRICS.index("ms_ssim")
        for name, own in rows.items():
            rate, *figures = np.mean(own, 0)
            wins = f"{(np.array(own)[:, at] > reference[:, at]).sum()} of {len(own)}"
            cells = " | ".join(f"{figure:.4g}" for figure in figures)
            print(f"| {bpp:g} | {name} | {cells} | {rate:.4f} | {wins} |", flush=True)


def coded(pipe, baseline, image, bpp, args):
    """(name, bytes, decoded picture) of each codec, through files."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "picture"
        file.write_bytes(largest_that_fits(baseline, image, bpp * image.width * image.height / 8)[0])
        size, steps = file.stat().st_size, {"num_coding_steps": args.coding_steps} if args.coding_steps else {}
        yield args.against, size, baseline.decode(file.read_bytes())
        for tune in args.tune:
            file.write_bytes(pipe.compress(image, max_bytes=size, tune=tune, **steps).bitstreams[0])
            for realism in args.realism:
                name = f"DiffC, {tune}, realism {realism:g}"
                yield name, file.stat().st_size, pipe.decompress(file.read_bytes(), realism=realism).images[0]


if __name__ == "__main__":
    main()
