"""Bits of each of UQDM's steps, through files, and what coding takes of one core.

    python benchmarks/uqdm.py PICTURES --model FOLDER [--reference reference.json --weights raw] [--every 4]

Each picture becomes a lossless file, which is written, read back and compared with the picture, and files that end after each
step, whose previews are compared with it. A reference holds, for weights and picture, {"bits_per_dim": [start, each step,
pixels]} of another program.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffusers_compress import UQDMPipeline, embedded_model, images
from diffusers_compress.codecs.uqdm.format import read_file
from diffusers_compress.metrics.distortion import psnr

RECONSTRUCTIONS = ("denoised", "flow", "ancestral")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--model", default=embedded_model("uqdm"))
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--weights", default="raw", help="of the reference")
    parser.add_argument("--every", type=int, default=1, help="take each n-th picture")
    parser.add_argument("--previews", action="store_true", help="PSNR of the files that end after each step, too")
    return parser.parse_args()


def measured(pipe, path, file, previews):
    """Of one picture: bits per number of each section and of all, CPU seconds of both ends, PSNR by (steps, reconstruction)."""
    image = images.open_image(path).convert("RGB")
    start = time.process_time()
    data = pipe.compress(image, lossless=True).bitstreams[0]
    seconds = [time.process_time() - start]
    file.write_bytes(data)
    data, start = file.read_bytes(), time.process_time()
    decoded = pipe.decompress(data).images[0]
    seconds.append(time.process_time() - start)
    if not np.array_equal(np.asarray(decoded), np.asarray(image)):
        raise SystemExit(f"{path}: the lossless file gives another picture")
    numbers = 3 * image.width * image.height
    _, parameters, sections, _ = read_file(data)
    bits = [8 * len(section) / numbers for section in sections] + [8 * len(data) / numbers]
    found = {}
    for steps in range(1, len(sections)) if previews else ():
        cut = data[: -4 - sum(map(len, sections[steps:]))]  # a checksum less: what is left of a file that was cut there
        for reconstruction in RECONSTRUCTIONS:
            back = pipe.decompress(cut, reconstruction=reconstruction, generator=torch.Generator().manual_seed(0)).images[0]
            x, y = (images.to_tensor(picture)[0] / 2 for picture in (image, back))
            found[steps, reconstruction] = psnr(x, y)
    return bits, seconds, found


def main():
    args = parse_args()
    torch.set_num_threads(1)
    Image.MAX_IMAGE_PIXELS = None
    pipe = UQDMPipeline.from_pretrained(args.model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    reference = json.loads(args.reference.read_text())[args.weights] if args.reference else {}
    rows, expected = [], []
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted(args.pictures.iterdir())[:: args.every]:
            rows.append(measured(pipe, path, Path(folder, "picture.dfc"), args.previews))
            if reference:
                bits = reference[path.name]["bits_per_dim"]
                expected.append([*bits[1:], sum(bits)])
            print(f"{path.name}: {rows[-1][0][-1]:.4f} bits a number, {rows[-1][1][0]:.2f} s, {rows[-1][1][1]:.2f} s", flush=True)
    means, (encode, decode) = np.mean([bits for bits, *_ in rows], 0), np.mean([seconds for _, seconds, _ in rows], 0)
    names = [f"step {i}" for i in range(1, len(means) - 1)] + ["pixels", "file"]
    head, lines = ["part", "bits a number"], [[name, f"{mean:.4f}"] for name, mean in zip(names, means)]
    if reference:
        head += ["reference", "difference"]
        for line, mean, other in zip(lines, means, np.mean(expected, 0)):
            line += [f"{other:.4f}", f"{100 * (mean / other - 1):+.2f} %"]
    print(f"\n{len(rows)} pictures, CPU seconds of one core: encode {encode:.2f}, decode {decode:.2f}\n")
    print("\n".join("| " + " | ".join(line) + " |" for line in [head, ["--"] * len(head), *lines]))
    if args.previews:
        print("\n| steps | " + " | ".join(f"{name}, dB" for name in RECONSTRUCTIONS) + " |\n" + "|--" * 4 + "|")
        for steps in range(1, len(means) - 1):
            values = [np.mean([found[steps, name] for *_, found in rows]) for name in RECONSTRUCTIONS]
            print(f"| {steps} | " + " | ".join(f"{value:.2f}" for value in values) + " |")


if __name__ == "__main__":
    main()
