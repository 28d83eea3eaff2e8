"""Compress the pictures of a Hugging Face dataset, and train on the compressed one.

    pip install datasets
    python examples/hf_dataset.py PHOTOS OUT --bpp 0.1          # a folder of pictures, or --dataset NAME of the Hub

OUT is a dataset whose column "dfc" holds the files, to be loaded with `datasets.load_from_disk` or shared with `push_to_hub`. Read back,
`with_transform` decodes the pictures that are asked for.
"""

import argparse
from functools import partial
from pathlib import Path

import datasets
import torch

from diffusers_compress import DiffCPipeline, embedded_model


def compress(rows, pipe, bpp):
    """A batch of rows with the column "image" -> files and their bits per pixel."""
    out = pipe.compress(rows["image"], target_bpp=bpp)
    return {"dfc": out.bitstreams, "bpp": out.bpp}


def decompress(rows, pipe):
    """The batch with pictures in place of files."""
    files = rows.pop("dfc")
    return rows | {"image": pipe.decompress(files, realism=0.5).images}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, nargs="?")
    parser.add_argument("out", type=Path)
    parser.add_argument("--dataset", help="name on the Hub, in place of PHOTOS; its pictures in the column 'image'")
    parser.add_argument("--split", default="train")
    parser.add_argument("--model", default=embedded_model(), help="model folder or Hub id")
    parser.add_argument("--bpp", type=float, default=0.1)
    parser.add_argument("--batch-size", type=int, default=8)
    args = parser.parse_args()
    if bool(args.photos) == bool(args.dataset):
        parser.error("give PHOTOS or --dataset")

    pipe = DiffCPipeline.from_pretrained(args.model).to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    name = {"path": args.dataset} if args.dataset else {"path": "imagefolder", "data_dir": str(args.photos)}
    data = datasets.load_dataset(**name, split=args.split)
    coding = partial(compress, pipe=pipe, bpp=args.bpp)
    coded = data.map(coding, batched=True, batch_size=args.batch_size, remove_columns=["image"])
    coded.save_to_disk(str(args.out))
    print(
        f"{args.out}: {len(coded)} pictures, {sum(map(len, coded['dfc'])):,} bytes, {sum(coded['bpp']) / len(coded):.4f} bpp on average"
    )

    again = datasets.load_from_disk(str(args.out)).with_transform(partial(decompress, pipe=pipe))
    print(f"the first, decoded: {again[0]['image'].size}")


if __name__ == "__main__":
    main()
