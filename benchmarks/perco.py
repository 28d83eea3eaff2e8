"""PerCo through files: sizes by part, and how much the decoder makes of the indices.

    python benchmarks/perco.py KODAK_FOLDER --out rows.jsonl

For each preset of the model and each picture: a file without a caption, one with the caption of its line in `--captions`; the first is
decoded, and the PSNR of what comes out is taken against its own picture and against each other picture of its size, which is what the
decoder makes of the indices of another picture; each sixth picture is decoded once more from its own seed (the column `same-seed` has the
largest difference of a sample) and from another one (`two-seeds`, PSNR between both). A run that was stopped goes on with what `--out`
does not have. Then the captions of `benchmarks/captions.txt` under CLIP's vocabulary, against zlib.
"""

import argparse
import json
import sys
import zlib
from pathlib import Path

import numpy as np
import torch

from diffusers_compress import PerCoPipeline, embedded_model, images
from diffusers_compress.codecs.perco.format import PRESETS, read_file
from diffusers_compress.codecs.perco.payload import choose_caption
from diffusers_compress.coding.range_coder import Encoder
from diffusers_compress.coding.text import vocabulary_of
from diffusers_compress.format import container
from diffusers_compress.metrics.distortion import psnr, samples

HERE = Path(__file__).parent


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="rows, one a line")
    parser.add_argument("--files", type=Path, default=Path("results/perco"), help="files and decoded pictures")
    parser.add_argument("--model", default=embedded_model("perco"))
    parser.add_argument("--presets", nargs="+", default=["0.0019", "0.1250"], choices=PRESETS)
    parser.add_argument("--captions", type=Path, default=HERE / "kodak_captions.txt")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=1, help="take each n-th picture only")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clip", type=Path, help="folder of CLIP's tokenizer, for the captions")
    return parser.parse_args()


def measure(pipe, image, caption, path, steps, twice):
    """Sizes of a picture's files, and what comes of the first: written to `path` and its siblings. `twice`: also from another seed."""
    plain = pipe.compress(image).bitstreams[0]
    path.write_bytes(plain)
    data = path.read_bytes()
    header, parameters, payload = read_file(data)
    config, shape = pipe.hyper_encoder.config, pipe.latent_shape(header.height, header.width)
    cells = int(np.prod(pipe.hyper_encoder.grid_shape(*shape[1:])))
    row = {"bytes": len(data), "header": container.overhead(header), "indices": len(payload), "cells": cells}
    row |= {"fixed": -(-cells * parameters.bits // 8), "stride": config.stride, "modelled": parameters.modelled}
    row["with_caption"] = len(pipe.compress(image, prompt=caption).bitstreams[0])
    first = pipe.decompress(data, num_inference_steps=steps).images[0]
    first.save(path.with_suffix(".png"))
    if twice:
        again, other = (
            pipe.decompress(each, num_inference_steps=steps).images[0]
            for each in (data, pipe.compress(image, seed=1).bitstreams[0])
        )
        row |= {
            "two_seeds": psnr(samples(first), samples(other)),
            "same_seed": int(np.abs(np.asarray(first, int) - np.asarray(again, int)).max()),
        }
    return row


def cross(folder, pictures):
    """Mean PSNR of the decoded pictures against their own originals, and against others of their size."""
    decoded = {path: samples(images.open_image(folder / f"{path.stem}.png")) for path in pictures}
    originals = {path: samples(images.open_image(path).convert("RGB")) for path in pictures}
    right = [psnr(originals[path], decoded[path]) for path in pictures]
    wrong = [
        np.mean([psnr(originals[a], decoded[b]) for b in pictures if b != a and decoded[b].shape == originals[a].shape])
        for a in pictures
    ]
    return np.mean(right), np.mean(wrong)


def caption_sizes(folder):
    """(bytes, bytes of zlib) of all captions, each with the byte that tells the vocabulary."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder)
    ours, theirs = 0, 0
    for text in (HERE / "captions.txt").read_text(encoding="utf-8").splitlines():
        encoder = Encoder()
        choose_caption(text, tokenizer, vocabulary_of(tokenizer))[1](encoder)
        ours, theirs = ours + len(encoder.getvalue()) + 1, theirs + len(zlib.compress(text.encode(), 9))
    return ours, theirs


def main():
    args = parse_args()
    pictures = sorted(path for path in args.folder.iterdir() if path.suffix.lower() in {".png", ".jpg", ".webp"})[:: args.every]
    texts = args.captions.read_text(encoding="utf-8").splitlines()[:: args.every]
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    for preset in args.presets:
        pipe = PerCoPipeline.from_pretrained(args.model, preset=preset, dtype=torch.float32).to(args.device)
        pipe.set_progress_bar_config(disable=True)
        folder = args.files / preset
        folder.mkdir(parents=True, exist_ok=True)
        for number, (path, text) in enumerate(zip(pictures, texts)):
            if not any(row["picture"] == path.name and row["preset"] == preset for row in rows):
                row = measure(pipe, images.open_image(path), text, folder / f"{path.stem}.dfc", args.steps, number % 6 == 0)
                rows.append({"preset": preset, "picture": path.name} | row)
                with args.out.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")

    print(f"{len(pictures)} pictures, means; {args.steps} network calls\n")
    columns = "bytes header indices fixed-length caption PSNR wrong-indices difference two-seeds same-seed".split()
    print("| preset |", " | ".join(columns), "|")
    print("|--" * (len(columns) + 1) + "|")
    for preset in args.presets:
        mine = [row for row in rows if row["preset"] == preset]
        mean = {
            name: np.mean([row[name] for row in mine if name in row])
            for name in ("bytes", "header", "indices", "fixed", "with_caption", "two_seeds")
        }
        right, wrong = cross(args.files / preset, pictures)
        cells = [f"{mean[name]:.1f}" for name in ("bytes", "header", "indices", "fixed")] + [
            f"{mean['with_caption'] - mean['bytes']:.1f}"
        ]
        cells += [
            f"{right:.2f}",
            f"{wrong:.2f}",
            f"{right - wrong:.2f}",
            f"{mean['two_seeds']:.2f}",
            str(max(row.get("same_seed", 0) for row in mine)),
        ]
        print(f"| {preset} |", " | ".join(cells), "|")
        print(
            f"\n{preset}: files of {min(row['bytes'] for row in mine)} to {max(row['bytes'] for row in mine)} bytes\n",
            file=sys.stderr,
        )
    if args.clip:
        ours, theirs = caption_sizes(args.clip)
        print(f"\nCaptions: {ours} bytes, zlib {theirs}: {ours / theirs:.3f}")


if __name__ == "__main__":
    main()
