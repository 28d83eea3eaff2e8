"""What `importance` gives and takes: PSNR within a mask of a tenth of the picture and outside of it, at equal bytes.

    python benchmarks/importance.py KODAK --codecs diffc relic --bpp 0.05 --every 6

The mask is a rectangle with the picture's own shape, whose place goes with the picture's number: the middle, then nearer to the corners.
Files are written and read back; "plain" is the same codec without a mask, at the same permitted bytes, by the same decoder. --sheet FILE
puts original, plain and focused picture of each row side by side.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from diffusers_compress import contract, images
from diffusers_compress.files import find_files

SHARE = 0.1
PLACES = [(0.5, 0.5), (0.25, 0.25), (0.75, 0.75), (0.25, 0.75), (0.75, 0.25)]


def mask_of(size, number):
    """Truth values [H, W]."""
    width, height = (round(side * SHARE**0.5) for side in size)
    left, top = (round((side - own) * place) for side, own, place in zip(size, (width, height), PLACES[number % len(PLACES)]))
    mask = np.zeros(size[::-1], bool)
    mask[top : top + height, left : left + width] = True
    return mask


def decibels(image, decoded, mask):
    """PSNR (within, outside of) the mask."""
    squared = np.square(np.asarray(image, float) - np.asarray(decoded, float)).mean(2)
    return tuple(10 * np.log10(255**2 / squared[part].mean()) for part in (mask, ~mask))


def coded(pipe, image, bpp, folder, **options):
    """(bytes, the picture), both through a file."""
    file, target = Path(folder) / "picture.dfc", Path(folder) / "picture.png"
    file.write_bytes(pipe.compress(image, target_bpp=bpp, **options).bitstreams[0])
    pipe.decompress(file.read_bytes()).images[0].save(target)
    return file.stat().st_size, Image.open(target).convert("RGB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--codecs", nargs="+", default=["diffc"])
    parser.add_argument("--bpp", type=float, nargs="+", default=[0.05])
    parser.add_argument("--every", type=int, default=6)
    parser.add_argument("--sheet", type=Path)
    args = parser.parse_args()

    print(
        "| codec | bpp | picture | bytes plain, focused | within: plain | focused | gain, dB | outside: plain | focused | loss, dB |"
    )
    print("|--|--|--|--|--|--|--|--|--|--|")
    sheet = []
    for name in args.codecs:
        codec = contract.CODECS[name]
        pipe = codec.pipeline_class().from_pretrained(codec.embedded_model())
        pipe.set_progress_bar_config(disable=True)
        for bpp in args.bpp:
            rows = []
            for number, path in enumerate(list(find_files(args.folder).files.values())[:: args.every]):
                image = images.open_image(path).convert("RGB")
                mask = mask_of(image.size, number)
                with tempfile.TemporaryDirectory() as folder:
                    plain, before = coded(pipe, image, bpp, folder)
                    focused, after = coded(pipe, image, bpp, folder, importance=mask)
                within, outside = zip(decibels(image, before, mask), decibels(image, after, mask))
                rows.append((plain, focused, *within, within[1] - within[0], *outside, outside[0] - outside[1]))
                show(name, bpp, Path(path).name, rows[-1])
                sheet.append([image, before, after])
            show(name, bpp, "mean", np.mean(rows, 0))
    if args.sheet:
        width, height = sheet[0][0].size
        canvas = Image.new("RGB", (3 * width, len(sheet) * height), "white")
        for i, row in enumerate(sheet):
            for j, picture in enumerate(row):
                canvas.paste(picture, (j * width, i * height))
        canvas.save(args.sheet)


def show(name, bpp, picture, row):
    plain, focused, *figures = row
    cells = " | ".join(f"{figure:.2f}" for figure in figures)
    print(f"| {name} | {bpp:g} | {picture} | {plain:.0f}, {focused:.0f} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
