"""Text+Sketch through files: the sketch's coder against zlib and PNG, bytes of each part, whether decoded pictures follow their sketches.

    python benchmarks/text_sketch.py FOLDER --every 1 --out OUT

Edges of a picture are the N pixels of steepest gradient, across which it is greatest (Canny's, smoothed over 4 pixels), N being the pixels
of the sketch's lines, thinned. The F-score counts those within 2 pixels of each other. `own`: with the file's sketch; `other`: with that
of the next picture of the same size; `original`: of the original picture with its own sketch, which is coarse. PSNR is in dB. Captions are
those of kodak_captions.txt, in CLIP's tokens; the embedded model's prompts do nothing, so pictures are coded without.
"""

import argparse
import io
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import distance_transform_edt
from skimage import feature, filters, morphology
from tqdm import tqdm

from diffusers_compress import TextSketchPipeline, embedded_model
from diffusers_compress.codecs.text_sketch import edges, payload, thumbnail
from diffusers_compress.codecs.text_sketch.format import read_file
from diffusers_compress.coding import sketch_model
from diffusers_compress.coding.range_coder import Encoder
from diffusers_compress.metrics.distortion import psnr, samples

TOLERANCE, SMOOTHING = 2, 4.0  # pixels


def size_of(encode, *arguments):
    encoder = Encoder()
    encode(encoder, *arguments)
    return len(encoder.getvalue())


def single_pattern(grid):
    """Bytes of an ideal coder that learns JBIG2's pattern of ten cells alone: (n + 0.4) / (N + 0.8) of what was seen."""
    known, seen, bits = np.pad(grid, ((3, 0), (3, 3))), {}, 0.0
    for y, x in np.ndindex(grid.shape):
        counts = seen.setdefault(tuple(known[y + 3 + i, x + 3 + j] for i, j in sketch_model.CELLS[:10]), [0.4, 0.4])
        bits -= math.log2(counts[grid[y, x]] / sum(counts))
        counts[grid[y, x]] += 1
    return math.ceil(bits / 8)


def png_size(grid):
    Image.fromarray(grid > 0).save(buffer := io.BytesIO(), "PNG", optimize=True)
    return len(buffer.getvalue())


def coder_row(pictures, side, threshold):
    totals = np.zeros(6)
    for picture in tqdm(pictures, desc=f"sketches of {side}"):
        grid = edges.quantized(edges.strengths(samples(picture) * 2 - 1, side), threshold, 2)
        packed = np.packbits(grid > 0, axis=1).tobytes()
        totals += (
            size_of(sketch_model.encode, grid, 2),
            single_pattern(grid),
            len(zlib.compress(packed, 9)),
            png_size(grid),
            grid.size,
            grid.sum(),
        )
    ours, ten, packed, png, cells, lines = totals / len(pictures)
    sizes = " | ".join(f"{size:.0f}" for size in (ours, ten, packed, png))
    return f"| {side} | {threshold} | {100 * lines / cells:.1f} % | {sizes} | {ours / min(packed, png):.3f} |"


def lines_of(grid, levels, height, width):
    """A sketch's lines, one pixel wide."""
    return morphology.skeletonize(edges.spread(grid, levels, height, width)[0].numpy() >= 0.5)


def edges_of(picture, count):
    """The `count` strongest edge pixels."""
    grey = np.asarray(picture.convert("L"), dtype=float) / 255
    crest = feature.canny(grey, SMOOTHING, 0.0, 0.0, mode="nearest")
    strength = np.where(crest, filters.sobel(filters.gaussian(grey, SMOOTHING, mode="nearest"), mode="nearest"), 0)
    return strength >= np.partition(strength.ravel(), -count)[-count] if count else np.zeros_like(crest)


def f_score(a, b):
    if not (a.any() and b.any()):
        return float(a.any() == b.any())
    precision, recall = (np.mean(distance_transform_edt(~other)[mask] <= TOLERANCE) for mask, other in ((a, b), (b, a)))
    return 2 * precision * recall / max(precision + recall, 1e-9)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default=embedded_model("text-sketch"))
    parser.add_argument("--every", type=int, default=1, help="decode each n-th picture only")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--candidates", type=int, default=1)
    parser.add_argument("--option", nargs="*", default=[], metavar="NAME=VALUE", help="numbers, of compress")
    parser.add_argument("--decode-option", nargs="*", default=[], metavar="NAME=VALUE", help="numbers, of decompress")
    parser.add_argument("--out", type=Path, help="decoded pictures go here")
    parser.add_argument("--only-coder", action="store_true")
    args = parser.parse_args()
    paths = sorted(args.folder.glob("*.png"))
    pictures = [Image.open(path).convert("RGB") for path in paths]

    print("| cells | threshold | lines | bytes | one pattern, ideal | zlib | PNG, 1 bit | of the smaller |\n|" + "--|" * 8)
    for side, threshold in (64, 0.4), (128, 0.4), (128, 0.25), (192, 0.4):
        print(coder_row(pictures, side, threshold), flush=True)
    import open_clip

    tokenizer = open_clip.SimpleTokenizer()
    captions = (Path(__file__).with_name("kodak_captions.txt")).read_text(encoding="utf-8").splitlines()
    ids = [tokenizer.encode(caption) for caption in captions]
    sizes = [size_of(payload.encode_ids, each, payload.way_of(each)) for each in ids]
    print(f"\nprompts: {np.mean([len(each) for each in ids]):.1f} tokens in {np.mean(sizes):.1f} bytes")
    if args.only_coder:
        return

    pipe = TextSketchPipeline.from_pretrained(args.model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    options, decoding = (
        {name: float(value) if "." in value else int(value) for name, value in (each.split("=") for each in given)}
        for given in (args.option, args.decode_option)
    )
    decoding, rows, lines = decoding | {"num_inference_steps": args.steps}, [], []
    for path, picture in tqdm(list(zip(paths, pictures))[:: args.every], desc="pictures"):
        data = pipe.compress(picture, candidates=args.candidates, decoding=decoding, **options).bitstreams[0]
        header, parameters, symbols = read_file(data)
        content = pipe.read_content(header, parameters, symbols)
        decoded = pipe.decompress(data, **decoding).images[0]
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            decoded.save(args.out / f"{path.stem}.png")
            Image.fromarray(255 * (content.sketch > 0).astype(np.uint8)).save(args.out / f"{path.stem}-sketch.png")
        colours = size_of(thumbnail.encode, content.thumbnail) if parameters.thumbnail else 0
        lines.append(lines_of(content.sketch, parameters.levels, picture.height, picture.width))
        rows.append(
            (path.stem, picture, decoded, len(data), colours, size_of(sketch_model.encode, content.sketch, parameters.levels))
        )
    print("\n| picture | file | thumbnail | sketch | bpp | PSNR | F own | F other | F original |\n|--|--|--|--|--|--|--|--|--|")
    figures = []
    for i, (name, picture, decoded, size, colours, sketch) in enumerate(rows):
        others = [lines[(i + k) % len(rows)] for k in range(1, len(rows)) if lines[(i + k) % len(rows)].shape == lines[i].shape]
        found = edges_of(decoded, int(lines[i].sum()))
        bpp = 8 * size / (picture.width * picture.height)
        scores = [f_score(found, each) for each in (lines[i], *others[:1])]
        scores += [math.nan] * (2 - len(scores)) + [f_score(edges_of(picture, int(lines[i].sum())), lines[i])]
        figures.append((size, colours, sketch, bpp, psnr(samples(picture), samples(decoded)), *scores))
        print(f"| {name} | " + " | ".join(shown(figures[-1])) + " |")
    mean = np.nanmean(figures, axis=0)
    print("| mean | " + " | ".join(shown(mean)) + f" |\n\nF own / F other: {mean[5] / mean[6]:.2f}")
    again = pipe.decompress(data, **decoding).images[0]
    print(f"the last file decoded again: {'the same picture' if again.tobytes() == decoded.tobytes() else 'ANOTHER PICTURE'}")


def shown(figures):
    size, colours, sketch, bpp, decibels, *scores = figures
    return [
        f"{size:.0f}",
        f"{colours:.0f}",
        f"{sketch:.0f}",
        f"{bpp:.4f}",
        f"{decibels:.2f}",
        *(f"{score:.3f}" for score in scores),
    ]


if __name__ == "__main__":
    main()
