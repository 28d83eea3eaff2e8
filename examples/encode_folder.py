"""Every picture of a folder to a file beside it in another, several at a time.

    python examples/encode_folder.py FOLDER OUT

`diffusers-compress batch` does this for whole datasets, on many GPUs, and goes on where it was stopped.
"""

import argparse
from pathlib import Path

from diffusers_compress import DiffCPipeline, embedded_model, images

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default=embedded_model(), help="model folder or Hub id")
    parser.add_argument("--bpp", type=float, default=0.1)
    parser.add_argument("--at-once", type=int, default=8, help="pictures in memory")
    args = parser.parse_args()

    pipe = DiffCPipeline.from_pretrained(args.model)
    args.out.mkdir(parents=True, exist_ok=True)
    paths = sorted(path for path in args.folder.iterdir() if path.suffix.lower() in SUFFIXES)
    for start in range(0, len(paths), args.at_once):
        some = paths[start : start + args.at_once]
        coded = pipe.compress([images.open_image(path) for path in some], target_bpp=args.bpp)
        for path, data, bpp in zip(some, coded.bitstreams, coded.bpp):
            (args.out / f"{path.stem}.dfc").write_bytes(data)
            print(f"{path.stem}.dfc: {len(data)} bytes, {bpp:.4f} bpp")


if __name__ == "__main__":
    main()
