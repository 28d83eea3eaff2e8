"""The command `batch`."""

import sys
import time
from ast import literal_eval
from collections.abc import Iterable
from datetime import timedelta
from functools import partial
from pathlib import Path

import typer

from diffusers_compress.cli import loading
from diffusers_compress.cli.options import (
    Anew,
    BatchSize,
    Bpp,
    CodecName,
    Decode,
    Device,
    Dtype,
    Inputs,
    MaxBytes,
    Model,
    Options,
    Preset,
    Quality,
    Tree,
    chosen_rate,
)
from diffusers_compress.cli.terminal import progress_of

SOME_FAILED = 3  # exit status of a batch that was coded but for some pictures


def batch_command(
    source: Inputs,
    output: Tree,
    decode: Decode = False,
    codec: CodecName = "diffc",
    bpp: Bpp = None,
    max_bytes: MaxBytes = None,
    quality: Quality = None,
    option: Options = None,
    batch_size: BatchSize = 8,
    preset: Preset = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "float32",
    force: Anew = False,
):
    """Compress whole datasets, or decompress them. Started again it goes on where it was; exit status 3: some pictures failed.

    `accelerate launch -m diffusers_compress.cli batch ...` shares the work among GPUs and machines.
    """
    options = dict(map(named_value, option or [])) | ({} if decode else chosen_rate(bpp, max_bytes, quality, codec))
    settings = {"input": source, "decode": decode, "codec": codec, "model": model, "dtype": dtype, "batch_size": batch_size}
    settings |= {"preset": preset} if preset else {}

    import torch
    from accelerate import PartialState

    from diffusers_compress import batch

    # Processes wait for the slowest of them at the end, however long it takes.
    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=timedelta(days=365))
    pipe = loading.load(model, device or str(state.device), dtype, codec, preset or bpp)
    pipe.set_progress_bar_config(disable=True)
    direction = (batch.decoder if decode else batch.encoder)(pipe, batch_size, **options)
    share = f"process 1 of {state.num_processes}" if state.num_processes > 1 else "coding"
    track = partial(progress_of, label=share) if state.is_main_process else lambda work, total: work
    start = time.perf_counter()
    batch.run(direction, source, output, settings | options, state, force, track)
    if state.is_main_process and report(output, batch.picture_lines(output), time.perf_counter() - start):
        raise typer.Exit(SOME_FAILED)


def report(output: Path, rows: Iterable[dict], seconds: float) -> int:
    """Say what a batch came to; the number of pictures that failed."""
    good = failed = size = bpp = 0
    for row in rows:
        if row["error"]:
            failed += 1
            if failed <= 10:
                print(f"failed: {row['source']}: {row['error']}", file=sys.stderr)
        else:
            good, size, bpp = good + 1, size + row["bytes"], bpp + row["bpp"]
    if failed > 10:
        print(f"and {failed - 10:,} more: see {output / 'manifest.jsonl'}", file=sys.stderr)
    mean = f"{bpp / max(1, good):.4f} bpp on average"
    print(f"{output}: {good:,} of {good + failed:,} pictures, {size:,} bytes, {mean}, {seconds:.1f} s")
    return failed


def named_value(text: str) -> tuple[str, object]:
    """NAME=VALUE as a pair; the value a number or a truth value where it reads as one, otherwise text."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ValueError(f"--option {text}: give NAME=VALUE")
    try:
        return name, literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
