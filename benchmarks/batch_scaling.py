"""How `diffusers-compress batch` scales: time and peak memory against the number of pictures and of processes.

    python benchmarks/batch_scaling.py --counts 100 1000 10000 --processes 1 2

Small synthetic pictures are made in a temporary folder and coded by the command itself, each run from nothing. Prints Markdown
tables: the runs, batched against one by one, and what a picture costs by part, with what that predicts for `--predict` pictures on
`--predict-processes` processes of the same kind. Seconds are those of the whole batch but for the start of Python and loading the
model, which have a column of their own.
"""

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image

from diffusers_compress import DiffCPipeline, batch, embedded_model
from diffusers_compress.batch import work
from diffusers_compress.batch.codec import Codec, load_picture, picture_size
from diffusers_compress.coding.channels.trellis import Trellis
from diffusers_compress.files import PICTURE_SUFFIXES


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="*", default=[100, 1000, 10_000])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batching", type=int, default=64, help="pictures of the comparison with one by one; 0 leaves it out")
    parser.add_argument("--split", type=int, default=64, help="pictures of the costs by part; 0 leaves them out")
    parser.add_argument("--overhead", type=int, nargs="*", default=[], help="counts to measure everything but the codec at")
    parser.add_argument("--size", type=int, default=64, help="pixels of a side")
    parser.add_argument("--max-bytes", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--model", default=embedded_model())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--predict", type=int, default=1_000_000)
    parser.add_argument("--predict-processes", type=int, default=64)
    return parser.parse_args()


def make_pictures(folder, count, size):
    """Smooth colours and noise, a thousand to a folder."""
    for i in range(count):
        rng = np.random.default_rng(i)
        coarse = Image.fromarray(rng.integers(0, 256, (size // 16 + 1, size // 16 + 1, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
        path = folder / f"{i // 1000:03}" / f"{i % 1000:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)).save(path)


# --------------------------------------------------------------------------------------------------------------------- runs


def run(args, source, output, processes=1, batch_size=None):
    """(seconds of the batch, seconds before it, peak resident memory of one process in MB) of the command."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launch, "-m", "diffusers_compress.cli", "batch", source, output, "--max-bytes", args.max_bytes]
    command += ["--batch-size", batch_size or args.batch_size, "--model", args.model, "--device", args.device]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    start = time.perf_counter()
    process = subprocess.Popen(map(str, command), stdout=subprocess.PIPE, env=environment, text=True)
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)  # the largest of the process and of those that it waited for
    if status != 0:
        raise SystemExit(f"the command failed:\n{text}")
    seconds = float(re.search(r"([\d.]+) s$", text.strip())[1])
    return seconds, time.perf_counter() - start - seconds, usage.ru_maxrss / 1024


def digest(folder):
    """Of names and bytes of all files in a tree."""
    files = sorted(folder.rglob("*.dfc"))
    return hashlib.sha256(b"".join(str(p.relative_to(folder)).encode() + p.read_bytes() for p in files)).hexdigest()


def scaling(args, folder):
    print("| pictures | processes | seconds | pictures/s | ms a picture | start, s | peak MB a process | files |")
    print("|--|--|--|--|--|--|--|--|")
    for turn, count in enumerate(args.counts):  # the same count twice shows how steady the machine is
        source = folder / f"in {turn}"
        make_pictures(source, count, args.size)
        found = []
        for processes in args.processes:
            output = folder / f"out {turn} {processes}"
            seconds, start, memory = run(args, source, output, processes)
            found.append(digest(output))
            same = "" if len(found) == 1 else "the same" if found[-1] == found[0] else "DIFFERENT"
            values = f"{seconds:.1f} | {count / seconds:.1f} | {1000 * seconds / count:.1f} | {start:.1f} | {memory:.0f}"
            print(f"| {count:,} | {processes} | {values} | {same} |", flush=True)


def without_codec(args, folder):
    """CPU time of finding, reading, checksums, writing and manifest: the batch of a codec that does nothing."""
    nothing = Codec(
        PICTURE_SUFFIXES,
        ".dfc",
        picture_size,
        load_picture,
        lambda x: [(b"-", 1, [])] * len(x),
        bytes,
        args.batch_size,
        8,
    )
    print("\n| pictures | ms of CPU time a picture, without the codec |\n|--|--|")
    for turn, count in enumerate(args.overhead):
        make_pictures(folder / f"in nothing {turn}", count, args.size)
        start = time.process_time()
        batch.run(nothing, str(folder / f"in nothing {turn}"), folder / f"out nothing {turn}", {}, PartialState(cpu=True))
        print(f"| {count:,} | {1000 * (time.process_time() - start) / count:.2f} |", flush=True)


def batching(args, folder):
    source = folder / "in batching"
    make_pictures(source, args.batching, args.size)
    alone, _, _ = run(args, source, folder / "out alone", batch_size=1)
    together, _, _ = run(args, source, folder / "out together")
    print(f"\n{args.batching} pictures one by one: {alone:.1f} s; in batches of {args.batch_size}: {together:.1f} s; ", end="")
    print(f"{alone / together:.2f} times as fast ({args.threads} threads).")


# -------------------------------------------------------------------------------------------------------------------- costs


@contextmanager
def timed(functions, device):
    """Seconds by name while the block runs, of functions given as name -> (object, attribute)."""
    seconds = Counter()

    def watch(name, function):
        def watched(*arguments, **options):
            start = time.perf_counter()
            result = function(*arguments, **options)
            if device != "cpu":
                torch.cuda.synchronize()
            seconds[name] += time.perf_counter() - start
            return result

        return watched

    originals = {name: getattr(*place) for name, place in functions.items()}
    for name, (owner, attribute) in functions.items():
        setattr(owner, attribute, watch(name, originals[name]))
    try:
        yield seconds
    finally:
        for name, (owner, attribute) in functions.items():
            setattr(owner, attribute, originals[name])


def costs(args, folder):
    """Milliseconds a picture by part, in this process; the network's and the autoencoder's first calls are not counted."""
    torch.set_num_threads(args.threads)
    pipe = DiffCPipeline.from_pretrained(args.model).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    codec = batch.encoder(pipe, args.batch_size, max_bytes=args.max_bytes)
    state = PartialState(cpu=args.device == "cpu")
    parts = {
        "network": (pipe.unet, "forward"),
        "autoencoder": (pipe.vae, "encode"),
        "channel": (Trellis, "encode"),
        "reading": (work, "read_item"),
        "writing": (work, "write_file"),
    }
    make_pictures(folder / "in warm", args.batch_size, args.size)
    make_pictures(folder / "in split", args.split, args.size)
    batch.run(codec, str(folder / "in warm"), folder / "out warm", {}, state)
    with timed(parts, args.device) as seconds:
        start = time.perf_counter()
        batch.run(codec, str(folder / "in split"), folder / "out split", {}, state)
        whole = time.perf_counter() - start
    table = {name: 1000 * seconds[name] / args.split for name in parts}
    table["the rest"] = 1000 * whole / args.split - sum(table.values())
    return table


def predict(args, table):
    print(f"\n| part | ms a picture (batches of {args.batch_size}, {args.device}) |\n|--|--|")
    for name, cost in table.items():
        print(f"| {name} | {cost:.2f} |")
    transfer = table["reading"] + table["writing"]
    coding = sum(table.values()) - transfer
    hours = args.predict * max(coding, transfer) / args.predict_processes / 3.6e6
    print(f"\nReading and writing run beside the coding, so {args.predict:,} pictures on {args.predict_processes} processes take")
    print(
        f"{args.predict:,} x max({coding:.1f}, {transfer:.1f}) ms / {args.predict_processes} = {hours:.2f} hours on devices like this."
    )


def main():
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if args.counts:
            scaling(args, folder)
        if args.overhead:
            without_codec(args, folder)
        if args.batching:
            batching(args, folder)
        if args.split:
            predict(args, costs(args, folder))


if __name__ == "__main__":
    main()
