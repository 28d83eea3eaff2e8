"""Photos at the same number of bytes in JPEG, AVIF and DiffC, as one picture: a row for each photo.

    python examples/compare.py [PHOTO ...] --bpp 0.15 --out compare.jpg

Shows the middle of each photo, pixel by pixel, after the whole photo went through files. A format that cannot be so small gives its
smallest file; the labels say how many bytes each has. Without PHOTO it takes the demo's, and two that scikit-image ships.
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from diffusers_compress import DiffCPipeline, embedded_model, images
from diffusers_compress.cli.demo import demo_photo
from diffusers_compress.images.formats import FORMATS, largest_that_fits

GAP, LABEL, FONT = 8, 34, 24  # pixels; the font can be read on a phone


def default_photos():
    """All given to the public: a cup (Rachel Michetti, CC0), a cat (Stéfan van der Walt, CC0), an astronaut (NASA, public domain)."""
    import skimage

    shipped = Path(skimage.__file__).parent / "data"
    return [demo_photo(), shipped / "chelsea.png", shipped / "astronaut.png"]


def row(pipe, photo, bpp, realism, side):
    """(label, crop) of the original and of each codec's picture."""
    image = images.to_output(images.to_tensor(images.open_image(photo))[0][None])[
        0
    ]  # without metadata, which would count as bytes
    data = pipe.compress(image, target_bpp=bpp).bitstreams[0]
    found = {"original": image}
    for name in ("jpeg", "avif"):
        file, _ = largest_that_fits(FORMATS[name], image, len(data))
        found[f"{name.upper()} {len(file):,} B"] = FORMATS[name].decode(file)
    found[f"DiffC {len(data):,} B"] = pipe.decompress(data, realism=realism).images[0]
    left, top = max(0, (image.width - side) // 2), max(0, (image.height - side) // 4)  # faces are above the middle
    box = left, top, min(image.width, left + side), min(image.height, top + side)
    return [(label, picture.crop(box)) for label, picture in found.items()]


def sheet(rows):
    """The rows below each other, each picture under its label."""
    width = max(crop.width for row in rows for _, crop in row) + GAP
    heights = [LABEL + max(crop.height for _, crop in row) + GAP for row in rows]
    canvas = Image.new("RGB", (len(rows[0]) * width - GAP, sum(heights) - GAP), "white")
    for i, row in enumerate(rows):
        for k, (label, crop) in enumerate(row):
            ImageDraw.Draw(canvas).text((k * width + 2, sum(heights[:i]) + 3), label, "black", ImageFont.load_default(FONT))
            canvas.paste(crop, (k * width, sum(heights[:i]) + LABEL))
    return canvas


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, nargs="*")
    parser.add_argument("--bpp", type=float, default=0.15)
    parser.add_argument("--realism", type=float, default=1.0, help="from 0, least error, to 1, natural texture")
    parser.add_argument("--side", type=int, default=248, help="of the middle that is shown, in pixels")
    parser.add_argument("--model", default=embedded_model(), help="folder or Hub id")
    parser.add_argument("--out", type=Path, default=Path("compare.jpg"))
    args = parser.parse_args()

    pipe = DiffCPipeline.from_pretrained(args.model)
    rows = [row(pipe, photo, args.bpp, args.realism, args.side) for photo in args.photos or default_photos()]
    sheet(rows).save(args.out, quality=90)
    for labels in rows:
        print("; ".join(label for label, _ in labels))


if __name__ == "__main__":
    main()
