"""Lossless files of a codec beside PNG, WebP, JPEG XL and JPEG 2000: bytes and CPU seconds, every file written, read back and compared.

    python benchmarks/lossless.py PICTURES [--codecs relic refine diffc perco] [--bpp 0.05] [--every 3] [--crop 256]

Each lossy part has so many bits per pixel at most. "Pixels alone" are coded by the same model without a lossy file: what this costs, or
saves, is the difference.
"""

import argparse
import io
import tempfile
import time
from pathlib import Path

import imagecodecs
import numpy as np
import torch
from PIL import Image

import diffusers_compress
from diffusers_compress import embedded_model, images
from diffusers_compress.codecs import lossy_part
from diffusers_compress.coding import pixel_model
from diffusers_compress.coding.range_coder import Decoder, Encoder
from diffusers_compress.contract import CODECS


def by_pillow(format, **options):
    def encode(image):
        file = io.BytesIO()
        image.save(file, format, **options)
        return file.getvalue()

    return encode, lambda data: Image.open(io.BytesIO(data)).convert("RGB")


def alone():
    def encode(image):
        encoder = Encoder()
        pixel_model.encode(encoder, np.asarray(image).transpose(2, 0, 1))
        return image.width.to_bytes(2, "big") + image.height.to_bytes(2, "big") + encoder.getvalue()

    def decode(data):
        shape = int.from_bytes(data[2:4], "big"), int.from_bytes(data[:2], "big")
        return Image.fromarray(pixel_model.decode(Decoder(data[4:]), shape).transpose(1, 2, 0))

    return encode, decode


OTHERS = {
    "PNG, optimized": by_pillow("PNG", optimize=True),
    "JPEG 2000": by_pillow("JPEG2000", irreversible=False),
    "WebP, method 6": by_pillow("WEBP", lossless=True, quality=100, method=6),
    "JPEG XL, effort 7": (
        lambda image: imagecodecs.jpegxl_encode(np.asarray(image), lossless=True, effort=7),
        lambda data: Image.fromarray(imagecodecs.jpegxl_decode(data)),
    ),
    "pixels alone": alone(),
}


def coder(key, bpp):
    """(encode, decode) of one of our codecs."""
    codec = CODECS[key]
    pipe = getattr(diffusers_compress, codec.pipeline_class().__name__).from_pretrained(embedded_model(key))
    pipe.set_progress_bar_config(disable=True)
    rate = {"target_bpp": bpp} if codec.rate == "required" else {}
    return lambda image: pipe.compress(image, lossless=True, **rate).bitstreams[0], lambda data: pipe.decompress(data).images[0]


def measured(name, encode, decode, image, path):
    """Bytes of the file, of its lossy part, CPU seconds of both ends. SystemExit for a picture that comes back differently."""
    start = time.process_time()
    path.write_bytes(encode(image))
    middle = time.process_time()
    data = path.read_bytes()
    if not np.array_equal(np.asarray(decode(data)), np.asarray(image)):
        raise SystemExit(f"{name} gives another picture back")
    end = time.process_time()
    return len(data), len(lossy_part(data) or b"") if data[:1] == b"\xdf" else 0, middle - start, end - middle


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--codecs", nargs="*", default=["relic", "refine", "diffc", "perco"], choices=CODECS)
    parser.add_argument("--bpp", type=float, nargs="+", default=[0.05], help="of the lossy part")
    parser.add_argument("--every", type=int, default=1, help="take each n-th picture")
    parser.add_argument("--crop", type=int, help="take the middle square with this side")
    args = parser.parse_args()
    torch.set_num_threads(1)
    coders = dict(OTHERS)
    for key in args.codecs:
        for bpp in args.bpp if CODECS[key].rate == "required" else [None]:
            coders[CODECS[key].name + (f", {bpp} bpp" if bpp else "")] = coder(key, bpp)

    rows, pixels = {name: [] for name in coders}, 0
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted(args.pictures.glob("*.png"))[:: args.every]:
            image = images.open_image(path).convert("RGB")
            if args.crop:
                left, top = (image.width - args.crop) // 2, (image.height - args.crop) // 2
                image = image.crop((left, top, left + args.crop, top + args.crop))
            pixels += image.width * image.height
            for name, pair in coders.items():
                rows[name].append(measured(name, *pair, image, Path(folder, "file")))
            print(
                path.name, " ".join(f"{8 * row[-1][0] / (image.width * image.height):.3f}" for row in rows.values()), flush=True
            )
    print(
        f"\n{len(rows['pixels alone'])} pictures, all back bit for bit\n\n| | bpp | of it lossy | encode s | decode s |\n|--|--|--|--|--|"
    )
    for name, row in rows.items():
        size, lossy, encoding, decoding = np.sum(row, 0)
        print(
            f"| {name} | {8 * size / pixels:.3f} | {8 * lossy / pixels:.3f} | {encoding / len(row):.2f} | {decoding / len(row):.2f} |"
        )


if __name__ == "__main__":
    main()
