"""Lossless files of all codecs beside PNG, WebP, JPEG XL and JPEG 2000: bytes and CPU seconds, every file written, read back and compared.

    python benchmarks/lossless.py PICTURES OUT [--codecs relic refine diffc perco] [--bpp 0.05] [--every 3] [--crop 256]
    python benchmarks/lossless.py PICTURES OUT --again    # decode what lies in OUT once more, as on another machine or with another torch

Each lossy part has so many bits per pixel at most, if its codec needs a rate; of Refine it is a JPEG of fidelity 0.1. "Pixels alone" are coded
by the same model without a lossy file: what this costs, or saves, is the difference. Files, and one row for each in rows.jsonl, stay in OUT:
started again, it goes on from there.
"""

import argparse
import functools
import io
import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffusers_compress import embedded_model, images
from diffusers_compress.codecs import describe, lossy_part
from diffusers_compress.coding import pixel_model
from diffusers_compress.coding.range_coder import Decoder, Encoder
from diffusers_compress.contract import CODECS, LOSSLESS
from diffusers_compress.format.container import read_header


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


def jpeg_xl():
    import imagecodecs

    return (
        lambda image: imagecodecs.jpegxl_encode(np.asarray(image), lossless=True, effort=7),
        lambda data: Image.fromarray(imagecodecs.jpegxl_decode(data)),
    )


OTHERS = {
    "PNG, optimized": lambda: by_pillow("PNG", optimize=True),
    "JPEG 2000": lambda: by_pillow("JPEG2000", irreversible=False),
    "WebP, method 6": lambda: by_pillow("WEBP", lossless=True, quality=100, method=6),
    "JPEG XL, effort 7": jpeg_xl,
    "pixels alone": alone,
}


MODELS = {}  # codec: folder, in place of the embedded one


@functools.cache
def pipeline(key):
    pipe = CODECS[key].pipeline_class().from_pretrained(MODELS.get(key) or embedded_model(key))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def coder(key, bpp):
    """(encode, decode) of one of our codecs."""
    rate = {"fidelity": 0.1} if key == "refine" else {"target_bpp": bpp} if bpp else {}

    def encode(image):
        return pipeline(key).compress(image, lossless=True, **rate).bitstreams[0]

    return encode, lambda data: pipeline(key).decompress(data).images[0]


def opened(path, crop):
    image = images.open_image(path).convert("RGB")
    if crop:
        left, top = (image.width - crop) // 2, (image.height - crop) // 2
        image = image.crop((left, top, left + crop, top + crop))
    return image


def check(name, image, decoded):
    if not np.array_equal(np.asarray(decoded), np.asarray(image)):
        raise SystemExit(f"{name} gives another picture back")


def measured(name, encode, decode, image, path):
    """Bytes of the file, of its lossy part, CPU seconds of both ends. SystemExit for a picture that comes back differently."""
    start = time.process_time()
    path.write_bytes(encode(image))
    middle = time.process_time()
    data = path.read_bytes()
    check(path.name, image, decode(data))
    end = time.process_time()
    return len(data), len(lossy_part(data) or b"") if path.suffix == ".dfc" else 0, middle - start, end - middle


def again(args):
    """Decode all our files in OUT and compare them with the pictures."""
    found, predicted = Counter(), Counter()
    for path in sorted(args.out.glob("*.dfc")):
        data = path.read_bytes()
        number = read_header(data)[0].codec % LOSSLESS
        key = next(key for key, codec in CODECS.items() if codec.number == number)
        check(
            path.name,
            opened(args.pictures / f"{path.name.partition('.')[0]}.png", args.crop),
            pipeline(key).decompress(data).images[0],
        )
        found[key] += 1
        predicted[key] += bool(describe(data).get("predicted"))
        print(path.name, "every pixel is back", flush=True)
    print(
        f"\ntorch {torch.__version__}: "
        + ", ".join(f"{CODECS[key].name} {n} ({predicted[key]} predicted)" for key, n in found.items())
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--codecs", nargs="*", default=list(CODECS), choices=CODECS)
    parser.add_argument("--bpp", type=float, nargs="+", default=[0.05], help="of the lossy part")
    parser.add_argument("--every", type=int, default=1, help="take each n-th picture")
    parser.add_argument("--crop", type=int, help="take the middle square with this side")
    parser.add_argument("--again", action="store_true", help="only decode the files in OUT and compare")
    parser.add_argument("--model", nargs=2, action="append", default=[], metavar=("CODEC", "FOLDER"), help="not the embedded one")
    args = parser.parse_args()
    MODELS.update(args.model)
    torch.set_num_threads(1)
    if args.again:
        return again(args)
    coders = {}
    for key in args.codecs:
        for bpp in args.bpp if CODECS[key].rate == "required" and key != "refine" else [None]:
            coders[CODECS[key].name + (f", {bpp} bpp" if bpp else "")] = (
                f"{key}{bpp or ''}.dfc",
                functools.partial(coder, key, bpp),
            )

    coders |= {name: (name, make) for name, make in OTHERS.items()}
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "rows.jsonl"
    rows = {(row["picture"], row["coder"]): row for row in map(json.loads, log.read_text().splitlines())} if log.exists() else {}
    paths = sorted(args.pictures.glob("*.png"))[:: args.every]
    with log.open("a") as lines:
        for name, (file, make) in coders.items():
            for path in (path for path in paths if (path.stem, name) not in rows):
                image = opened(path, args.crop)
                found = measured(name, *make(), image, args.out / f"{path.stem}.{file}")
                values = dict(zip(("bytes", "lossy", "encode", "decode"), found))
                rows[path.stem, name] = {"picture": path.stem, "coder": name, "pixels": image.width * image.height, **values}
                print(json.dumps(rows[path.stem, name]), file=lines, flush=True)
    print(f"{len(paths)} pictures, all back bit for bit\n\n| | bpp | of it lossy | encode s | decode s |\n|--|--|--|--|--|")
    for name in coders:
        found = [rows[path.stem, name] for path in paths]
        pixels, size, lossy, encoding, decoding = (
            sum(row[field] for row in found) for field in ("pixels", "bytes", "lossy", "encode", "decode")
        )
        seconds = f"{encoding / len(paths):.2f} | {decoding / len(paths):.2f}"
        print(f"| {name} | {8 * size / pixels:.3f} | {8 * lossy / pixels:.3f} | {seconds} |")


if __name__ == "__main__":
    main()
