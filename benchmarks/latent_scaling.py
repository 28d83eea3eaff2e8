"""How many principal components of 8x8 blocks a latent should have, and how they should be scaled, for DiffC; no training.

    python benchmarks/latent_scaling.py PHOTOS KODAK

The prior is a stationary Gaussian with the photos' power spectrum, the denoiser its Wiener filter, the coder ideal: bits from pure noise to
a noise level by the error on the way there (I-MMSE: Guo et al. 2005, eq. 1). PSNR is that of the denoised mean, means over the pictures.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from diffusers_compress import WienerUNet, images
from diffusers_compress.coding.dct import dct, inverse_dct

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from train_common import load_photos  # noqa: E402
from train_embedded import BLOCK, Components, photo_at_blocks  # noqa: E402

RATES = (0.02, 0.05, 0.1, 0.2, 0.4)  # bits per pixel
SIGMAS = np.geomspace(60, 0.03, 32)  # sigma / alpha


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("kodak", type=Path)
    parser.add_argument("--channels", type=int, nargs="+", default=[12, 16, 24, 32])
    parser.add_argument("--spreads", type=float, nargs="+", default=[0.0, 0.25, 0.5])
    parser.add_argument("--every", type=int, default=2, help="measure each n-th picture only")
    return parser.parse_args()


def decode(components, z):
    blocks = torch.einsum("kc,bchw->bkhw", components.synthesis, z) + components.mean[:, None, None]
    return F.pixel_shuffle(blocks, BLOCK)


def psnr(x, x_hat):
    return float(10 * torch.log10(4 / (x - x_hat).square().mean()))


def curve(components, power, x):
    """PSNR in dB at RATES of a picture [1, 3, H, W]."""
    z, generator = components.encode(x), torch.Generator().manual_seed(0)
    coefficients, errors, decibels = dct(z), [], []
    for sigma in SIGMAS:
        noisy = coefficients + sigma * torch.randn(z.shape, generator=generator)
        estimate = power / (power + sigma**2) * noisy
        errors.append(float((estimate - coefficients).square().sum()))
        decibels.append(psnr(x, decode(components, inverse_dct(estimate))))
    snr, errors = SIGMAS**-2.0, np.array(errors)
    nats = snr[0] * float(z.square().sum()) / 2 + np.concatenate([[0], np.cumsum(np.diff(snr) * (errors[1:] + errors[:-1]) / 4)])
    return np.interp(RATES, nats / math.log(2) / x[0, 0].numel(), decibels)


@torch.no_grad()
def main():
    args = parse_args()
    photos = load_photos(args.photos)[::3]
    pictures = [images.to_tensor(Image.open(path))[0][None] for path in sorted(args.kodak.iterdir())[:: args.every]]
    print(
        "| channels | power of std | components alone | "
        + " | ".join(map(str, RATES))
        + " bpp |\n"
        + "|--" * (3 + len(RATES))
        + "|"
    )
    for channels in args.channels:
        for spread in args.spreads:
            components = Components.measure(photos, channels, spread)
            spectrum = WienerUNet(channels, channels, block_out_channels=(32,), down_block_types=("DownBlock2D",),
                                  up_block_types=("UpBlock2D",))  # fmt: skip
            spectrum.fit([components.encode(photo_at_blocks(photo))[0] for photo in photos[::2]])
            alone = np.mean([psnr(x, decode(components, components.encode(x)).clamp(-1, 1)) for x in pictures])
            rows = [curve(components, spectrum.power(*(side // BLOCK for side in x.shape[-2:])), x) for x in pictures]
            print(
                f"| {channels} | {spread} | {alone:.2f} | " + " | ".join(f"{d:.2f}" for d in np.mean(rows, 0)) + " |", flush=True
            )


if __name__ == "__main__":
    main()
