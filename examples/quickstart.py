"""A photo to a file and back.

    python examples/quickstart.py [PHOTO]

Writes photo.dfc and decoded.png. Without PHOTO it takes one that comes with the package.
"""

import argparse
from pathlib import Path

from PIL import Image

from diffusers_compress import DiffCPipeline, embedded_model
from diffusers_compress.cli.demo import demo_photo


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", nargs="?", type=Path)
    parser.add_argument("--model", default=embedded_model(), help="model folder or Hub id")
    parser.add_argument("--bpp", type=float, default=0.1)
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_args()

    pipe = DiffCPipeline.from_pretrained(args.model)
    coded = pipe.compress(Image.open(args.photo or demo_photo()), target_bpp=args.bpp)
    (args.out / "photo.dfc").write_bytes(coded.bitstreams[0])
    print(f"photo.dfc: {len(coded.bitstreams[0])} bytes, {coded.bpp[0]:.4f} bpp")

    data = (args.out / "photo.dfc").read_bytes()
    pipe.decompress(data).images[0].save(args.out / "decoded.png")


if __name__ == "__main__":
    main()
