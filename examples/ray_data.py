"""Compress a folder of pictures on a Ray cluster, into WebDataset shards of .dfc files.

    pip install "diffusers_compress[ray,batch]"
    python examples/ray_data.py PHOTOS SHARDS --bpp 0.05 --workers 8 --gpus 1

Each worker loads the model once; Ray Data reads, batches, retries and writes around it. A picture that fails leaves no sample, and
its reason is in SHARDS/errors.jsonl. Shards of a run that was killed are not taken up again: for that there is
`diffusers-compress batch`. `Compress` is a `map_batches` stage like any other and goes into pipelines of your own.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import ray
import torch

from diffusers_compress import DiffCPipeline, batch, embedded_model
from diffusers_compress.batch import work
from diffusers_compress.files import find_files


class Compress:
    """Rows {"path", "bytes"} of picture files to rows {"path", "dfc", "error"}: the file or, in words, why there is none."""

    def __init__(self, model: str, batch_size: int, options: dict):
        pipe = DiffCPipeline.from_pretrained(model).to("cuda" if torch.cuda.is_available() else "cpu")
        pipe.set_progress_bar_config(disable=True)
        self.codec = batch.encoder(pipe, batch_size, **options)

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        results = [work.attempt(self.codec.load, data) for data in rows["bytes"]]
        good = [i for i, result in enumerate(results) if not isinstance(result, Exception)]
        if good:
            for i, result in zip(good, work.code_all(self.codec.code, [results[i] for i in good])):
                results[i] = result if isinstance(result, Exception) else self.codec.dump(result[0])
        failed = [isinstance(result, Exception) for result in results]
        return {
            "path": rows["path"],
            "dfc": np.array([b"" if bad else result for bad, result in zip(failed, results)], dtype=object),
            "error": np.array([work.describe(result) if bad else "" for bad, result in zip(failed, results)], dtype=object),
        }


def sample(row: dict, folder: str) -> dict:
    """A WebDataset sample: the key is the picture's place in the folder, with dots, which would end the key, as underscores."""
    name = Path(row["path"]).resolve().relative_to(folder)
    return {"__key__": name.as_posix().replace(".", "_"), "dfc": row["dfc"]}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="folder of pictures")
    parser.add_argument("shards", type=Path, help="new folder")
    parser.add_argument("--bpp", type=float, default=0.05)
    parser.add_argument("--model", default=embedded_model())
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=1, help="processes that hold the model")
    parser.add_argument("--gpus", type=float, default=0, help="of each worker")
    parser.add_argument("--shard-size", type=int, default=1000, help="pictures of a shard at least, where there are so many")
    return parser.parse_args()


def main():
    args = parse_args()
    args.shards.mkdir(parents=True)
    found = find_files(args.photos).files.values()
    paths = [path for path in found if os.path.isfile(path)]  # reading a named pipe might never end
    coded = (
        ray.data.read_binary_files(paths, include_paths=True)
        .map_batches(
            Compress,
            fn_constructor_args=[args.model, args.batch_size, {"target_bpp": args.bpp}],
            batch_size=args.batch_size,
            concurrency=args.workers,
            num_gpus=args.gpus,
        )
        .materialize()  # the files are small: a million of two kilobytes take two gigabytes of the cluster's object store
    )
    good = coded.filter(lambda row: row["error"] == "").map(sample, fn_args=[str(args.photos.resolve())])
    good.write_webdataset(str(args.shards), min_rows_per_file=args.shard_size)
    failed = coded.filter(lambda row: row["error"] != "").drop_columns(["dfc"]).take_all()
    failed += [{"path": path, "error": "not a regular file"} for path in found if path not in paths]
    (args.shards / "errors.jsonl").write_text("".join(json.dumps(row) + "\n" for row in failed))
    print(f"{args.shards}: {good.count():,} pictures; {len(failed):,} failed, see errors.jsonl")


if __name__ == "__main__":
    main()
