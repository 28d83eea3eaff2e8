"""Every picture of a folder's tree to a file of the same place and name in another, several at a time.

    python examples/encode_folder.py FOLDER OUT

`diffusers-compress batch` does this for whole datasets, on many GPUs, and goes on where it was stopped.
"""

import argparse
from pathlib import Path

from diffusers_compress import DiffCPipeline, embedded_model, images
from diffusers_compress.batch.walk import targets
from diffusers_compress.files import find_files, skip_notes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default=embedded_model(), help="model folder or Hub id")
    parser.add_argument("--bpp", type=float, default=0.1)
    parser.add_argument("--at-once", type=int, default=8, help="pictures in memory")
    args = parser.parse_args()

    pipe = DiffCPipeline.from_pretrained(args.model)
    found, skipped = find_files(args.folder)
    target = targets(found, ".dfc")  # photo.jpg.dfc and photo.png.dfc where photo.dfc would be both
    for start in range(0, len(found), args.at_once):
        pictures = {}
        for name in list(found)[start : start + args.at_once]:
            try:
                pictures[name] = images.open_image(found[name])
            except (OSError, ValueError) as error:
                skipped[name] = str(error)
        coded = pipe.compress(list(pictures.values()), target_bpp=args.bpp)
        for name, data, bpp in zip(pictures, coded.bitstreams, coded.bpp):
            path = args.out / target[name]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            print(f"{path}: {len(data)} bytes, {bpp:.4f} bpp")
    print("\n".join(skip_notes(skipped)))


if __name__ == "__main__":
    main()
