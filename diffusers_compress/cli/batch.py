"""The command `batch`."""

import time
from collections.abc import Iterable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import typer

from diffusers_compress.cli import loading
from diffusers_compress.cli.options import (
    RATES,
    Anew,
    BatchSize,
    Bpp,
    CodecName,
    Decode,
    Device,
    Dtype,
    Fidelity,
    Inputs,
    Lossless,
    MaxBytes,
    Model,
    Options,
    Preset,
    Psnr,
    TargetMetric,
    Tree,
    check_known,
    check_preset,
    given_rates,
    named_value,
)
from diffusers_compress.cli.terminal import complain, progress, say
from diffusers_compress.contract import DEFAULT
from diffusers_compress.files import skip_notes

SOME_FAILED = 3  # exit status of a batch that was coded but for some pictures


def batch_command(
    source: Inputs,
    output: Tree,
    decode: Decode = False,
    codec: CodecName = DEFAULT,
    bpp: Bpp = None,
    max_bytes: MaxBytes = None,
    fidelity: Fidelity = None,
    psnr: Psnr = None,
    metric: TargetMetric = None,
    lossless: Lossless = False,
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
    options = dict(map(named_value, option or [])) | ({"lossless": True} if lossless else {})
    rates = zip(RATES, (bpp, max_bytes, fidelity, psnr, metric))
    rates = (
        dict(rate for rate in rates if rate[1] is not None)
        if decode
        else given_rates(codec, bpp, max_bytes, fidelity, psnr, metric)
    )
    check_preset(codec, preset)
    typed = {"--lossless" if name == "lossless" else f"--option {name}": name for name in options}
    typed |= {rate: RATES[rate] for rate in rates}
    check_known(codec, "decompress" if decode else "compress", typed)
    options |= {RATES[rate]: value for rate, value in rates.items()}
    settings = {"input": source, "decode": decode, "codec": codec, "model": model, "dtype": dtype, "batch_size": batch_size}
    settings |= {"preset": preset} if preset else {}

    from accelerate import PartialState

    from diffusers_compress import batch

    # Processes wait for the slowest of them at the end, however long it takes.
    state = PartialState(cpu=loading.device_of(device) == "cpu", timeout=timedelta(days=365))
    pipe = loading.load(model, device or str(state.device), dtype, codec, preset or bpp)
    pipe.set_progress_bar_config(disable=True)
    direction = (batch.decoder if decode else batch.encoder)(pipe, batch_size, **options)
    share = f"process 1 of {state.num_processes}" if state.num_processes > 1 else "coding"
    start = time.perf_counter()
    with progress(share) if state.is_main_process else nullcontext(lambda *_: None) as show:
        try:
            skipped = batch.run(direction, source, output, settings | options, state, force, show)
        except KeyboardInterrupt:
            done = {row["source"] for row in batch.picture_lines(output) if not row["error"]}
            complain(f"{output}: {len(done):,} pictures are done; the same command goes on from there")
            raise
    if not state.is_main_process:
        return
    for note in skip_notes(skipped):
        say(output, f"note: {note}")
    if report(output, batch.picture_lines(output), time.perf_counter() - start):
        raise typer.Exit(SOME_FAILED)


def report(output: Path, rows: Iterable[dict], seconds: float) -> int:
    """Say what a batch came to; the number of pictures that failed."""
    good = failed = size = bpp = 0
    noted = {}  # note -> the first of its pictures, and their number
    for row in rows:
        for note in row["notes"]:
            noted[note] = noted.get(note, (row["source"], 0))[0], noted.get(note, ("", 0))[1] + 1
        if row["error"]:
            failed += 1
            if failed <= 10:
                complain(f"failed: {row['source']}: {row['error']}")
        else:
            good, size, bpp = good + 1, size + row["bytes"], bpp + row["bpp"]
    if failed > 10:
        complain(f"and {failed - 10:,} more: see {output / 'manifest.jsonl'}")
    for note, (name, count) in list(noted.items())[:10]:
        say(output, f"note: {name}{f' and {count - 1:,} more' if count > 1 else ''}: {note}")
    if len(noted) > 10:
        say(output, f"and {len(noted) - 10:,} more notes: see {output / 'manifest.jsonl'}")
    mean = f"{bpp / max(1, good):.4f} bpp on average"
    say(output, f"{output}: {good:,} of {good + failed:,} pictures, {size:,} bytes, {mean}, {seconds:.1f} s")
    return failed
