"""Refined files of a folder's pictures at the bases' lowest rates, through files: what refinement gains and costs.

    python benchmarks/refine.py FOLDER --every 6 --bases jpeg avif webp jxl
    python benchmarks/refine.py FOLDER --large 4000 3000 --steps 2

The first prints for each base and rate the means over pictures of PSNR, Wasserstein distortion (WD, framelets, 16 pixels) and sliced
Wasserstein distance (SWD): of the base, of the pictures at each realism, with the PSNR that the law of Eq. 17 gives beside it, the squared
error at realism 0 times 1 + a^2. Then: whether the base file came out of the file byte for byte and the preview is what its own codec
decodes; of JPEG, by how much the refined 8-bit picture's coefficients are outside their cells at most (8-bit levels of an orthonormal
DCT), and the share of coefficients that encoding it again with the same tables and subsampling does not give back (idempotence). Of "diffc"
and "relic", for which `--model` must be an untrained one, knobs stand for .05, .1, .15 and .2 bits per pixel.

The second refines one JPEG of that size, the folder's pictures side by side, and prints its seconds and the peak memory of the process.
`--out FILE` keeps one JSON line a picture and rate, and goes on from there: one file for each `--steps`, `--form` and `--model`.
"""

import argparse
import io
import json
import math
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffusers_compress import RefinePipeline, embedded_model
from diffusers_compress.codecs.refine import bases, jpeg, trained
from diffusers_compress.codecs.refine.format import LEARNED, base_file
from diffusers_compress.contract import CODECS
from diffusers_compress.images import formats
from diffusers_compress.metrics.distortion import psnr, samples
from diffusers_compress.metrics.realism import sliced_wasserstein
from diffusers_compress.metrics.wasserstein import wasserstein_distortion

LEARNED_BPP = (0.05, 0.1, 0.15, 0.2)  # in place of knobs
REALISM = (0.0, 0.25, 0.5, 0.75, 1.0)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bases", nargs="+", default=list(formats.FORMATS), choices=bases.NAMES)
    parser.add_argument(
        "--knobs", type=int, nargs="+", default=[0, 1, 2, 3], help="places on the base's scale, from the lowest rate"
    )
    parser.add_argument("--every", type=int, default=1, help="take each n-th picture only")
    parser.add_argument("--steps", type=int, default=8, help="network calls")
    parser.add_argument("--form", choices=list(trained.LATE_START), help="of a trained model, in place of its own")
    parser.add_argument("--model", default=embedded_model("refine"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--large", type=int, nargs=2, metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def figures(original, picture):
    x, x_hat = samples(original), samples(picture)
    return {"psnr": psnr(x, x_hat), "wd": wasserstein_distortion(x, x_hat), "swd": sliced_wasserstein(x, x_hat)}


def encoded_again(picture, like):
    """The picture as a JPEG with the tables and the subsampling of another one."""
    other, file = Image.open(io.BytesIO(like)), io.BytesIO()
    picture.save(file, "JPEG", qtables=other.quantization, subsampling="4:2:0")
    return file.getvalue()


def cells_kept(picture, data):
    """Of the coefficients of a refined picture: the largest excess over its cell, and the share that another encoding changes."""
    cells = jpeg.read_cells(data)
    x = torch.from_numpy(np.array(picture)).movedim(-1, 0).float() / 127.5 - 1
    again = jpeg.read_cells(encoded_again(picture, data))
    pairs = [(one.stored, two.stored) for one, two in zip(cells.planes, again.planes)]
    changed = sum(int((one != two).sum()) for one, two in pairs) / sum(one.numel() for one, _ in pairs)
    return {"excess": float(jpeg.excess(x, cells).max()), "changed": changed}


def rate_of(base, knob):
    if base in LEARNED:
        return {"target_bpp": LEARNED_BPP[knob]}
    return {"fidelity": max(knob / (len(formats.FORMATS[base].knobs) - 1), 1e-9)}


def by_its_own_codec(pipe, image, base, knob, data, around):
    """The base file as its own codec writes it, and that codec's picture of `data`. around: bytes of the refined file beside it."""
    if base in LEARNED:
        codec = bases.learned(pipe, base)
        limit = int(LEARNED_BPP[knob] * image.width * image.height / 8) - around
        return codec.compress(image, max_bytes=limit).bitstreams[0], codec.decompress(data, **CODECS[base].preview).images[0]
    codec = formats.FORMATS[base]
    return codec.encode(image, codec.knobs[knob]), codec.decode(data)


def measure(pipe, path, base, knob, steps):
    image = Image.open(path).convert("RGB")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "picture.dfc")
        file.write_bytes(pipe.compress(image, **rate_of(base, knob), base=base).bitstreams[0])
        data = file.read_bytes()
    preview = pipe.decompress(data, preview=True).images[0]
    row = {"picture": path.name, "base": base, "knob": knob, "steps": steps, "form": pipe.config.form, "bytes": len(data)}
    row["bpp"] = 8 * len(data) / (image.width * image.height)
    row["base_bytes"] = len(base_file(data))
    written, shown = by_its_own_codec(pipe, image, base, knob, base_file(data), len(data) - len(base_file(data)))
    row["extracted"], row["preview"] = base_file(data) == written, bool(np.array_equal(np.asarray(preview), np.asarray(shown)))
    row["of_base"] = figures(image, preview)
    start = time.perf_counter()
    for realism in reversed(REALISM):  # all but the first from what was kept
        file = io.BytesIO()
        pipe.decompress(data, realism=realism, num_inference_steps=steps).images[0].save(file, "PNG")
        picture = Image.open(file)
        row[str(realism)] = figures(image, picture)
        if realism == 1:
            row["seconds"] = time.perf_counter() - start
            row |= cells_kept(picture, base_file(data)) if base == "jpeg" else {}
    return row


def mean(rows, *keys):
    found = []
    for row in rows:
        for key in keys:
            row = row[key]
        found.append(row)
    return sum(found) / len(found)


def tables(rows):
    kinds = sorted({(row["base"], row["knob"]) for row in rows}, key=lambda kind: (bases.NAMES.index(kind[0]), kind[1]))
    columns = ("of_base", *map(str, REALISM))
    for name, digits in (("psnr", 2), ("wd", 1), ("swd", 1)):
        print(f"\n{name}\n| base, knob | pictures | bpp | base | {' | '.join(f'realism {a}' for a in REALISM)} |")
        print("|--" * (4 + len(REALISM)) + "|")
        for kind in kinds:
            some = [row for row in rows if (row["base"], row["knob"]) == kind]
            cells = " | ".join(f"{mean(some, column, name):.{digits}f}" for column in columns)
            print(f"| {kind[0]}, {kind[1]} | {len(some)} | {mean(some, 'bpp'):.3f} | {cells} |")
            if name == "psnr":
                law = [mean(some, "0.0", "psnr") - 10 * math.log10(1 + a * a) for a in REALISM]
                print(f"| law 1 + a^2 | | | | {' | '.join(f'{value:.2f}' for value in law)} |")
    print(f"\nextracted byte for byte: {sum(row['extracted'] for row in rows)} of {len(rows)}; ", end="")
    print(f"preview to the pixel: {sum(row['preview'] for row in rows)} of {len(rows)}")
    of_jpeg = [row for row in rows if "excess" in row]
    if of_jpeg:
        print(f"JPEG: largest excess over a cell {max(row['excess'] for row in of_jpeg):.2f}, ", end="")
        print(f"changed by encoding again {mean(of_jpeg, 'changed'):.2e}")


def large(pipe, paths, width, height, steps):
    canvas = Image.new("RGB", (width, height))
    pictures = [Image.open(path).convert("RGB") for path in paths]
    side_x, side_y = pictures[0].size
    places = [(left, top) for top in range(0, height, side_y) for left in range(0, width, side_x)]
    for i, place in enumerate(places):
        canvas.paste(pictures[i % len(pictures)].resize((side_x, side_y)), place)
    file = io.BytesIO()
    canvas.save(file, "JPEG", quality=10)
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    picture = pipe.refine(file.getvalue(), num_inference_steps=steps).images[0]
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{picture.width}x{picture.height}: {seconds:.0f} s, peak {peak:.2f} GiB, before it {before:.2f} GiB")
    print({"jpeg": figures(canvas, formats.opened("jpeg", file.getvalue())), "refined": figures(canvas, picture)})


def main():
    args = parse_args()
    pipe = RefinePipeline.from_pretrained(args.model).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    if args.form:
        pipe.register_to_config(form=args.form)
    paths = sorted(args.folder.glob("*.png"))[:: args.every]
    if args.large:
        return large(pipe, paths, *args.large, args.steps)
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out and args.out.exists() else []
    known = {(row["picture"], row["base"], row["knob"]) for row in rows}
    for knob in args.knobs:
        for base in args.bases:
            for path in paths:
                if (path.name, base, knob) not in known:
                    rows.append(measure(pipe, path, base, knob, args.steps))
                    if args.out:
                        with args.out.open("a") as file:
                            file.write(json.dumps(rows[-1]) + "\n")
    tables(rows)


if __name__ == "__main__":
    main()
