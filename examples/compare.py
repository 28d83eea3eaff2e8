"""One photo at the same number of bytes in AVIF, JPEG and DiffC, as one picture.

    python examples/compare.py --photo PHOTO --bpp 0.1 --out compare.jpg

Without --photo it takes the demo's. A format that cannot be so small gives its smallest file; the labels say how many bytes each has.
"""

import argparse
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from diffusers_compress import DiffCPipeline, embedded_model
from diffusers_compress.cli.demo import demo_photo


def smallest_within(image, format, max_bytes):
    """(decoded picture, bytes) of the best quality whose file is not larger, or of the smallest file."""
    for quality in range(100, -1, -1):
        file = BytesIO()
        image.save(file, format, quality=quality)
        if len(file.getvalue()) <= max_bytes:
            break
    return Image.open(file).convert("RGB"), len(file.getvalue())


def labelled(image, text):
    canvas = Image.new("RGB", (image.width, image.height + 26), "white")
    canvas.paste(image, (0, 26))
    ImageDraw.Draw(canvas).text((4, 4), text, "black", ImageFont.load_default(16))
    return canvas


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photo", type=Path)
    parser.add_argument("--bpp", type=float, default=0.1)
    parser.add_argument("--reconstruction", default="flow", choices=["flow", "ancestral", "denoised"])
    parser.add_argument("--model", default=embedded_model(), help="folder or Hub id")
    parser.add_argument("--out", type=Path, default=Path("compare.jpg"))
    args = parser.parse_args()

    pipe = DiffCPipeline.from_pretrained(args.model)
    image = Image.open(args.photo or demo_photo()).convert("RGB")
    data = pipe.compress(image, target_bpp=args.bpp).bitstreams[0]
    decoded = pipe.decompress(data, reconstruction=args.reconstruction).images[0]
    shown = [labelled(image, "original")]
    for format in ("AVIF", "JPEG"):
        picture, size = smallest_within(image, format, len(data))
        shown.append(labelled(picture, f"{format}, {size:,} bytes"))
    shown.insert(1, labelled(decoded, f"DiffC, {len(data):,} bytes"))

    width, height = shown[0].size
    sheet = Image.new("RGB", (2 * width + 8, 2 * height + 8), "white")
    for i, picture in enumerate(shown):
        sheet.paste(picture, ((i % 2) * (width + 8), (i // 2) * (height + 8)))
    sheet.save(args.out, quality=88)
    print(f"{args.out}: {len(data)} bytes, {8 * len(data) / image.width / image.height:.4f} bits per pixel")


if __name__ == "__main__":
    main()
