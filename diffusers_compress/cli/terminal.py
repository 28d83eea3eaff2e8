"""What the commands say: lines, bars, errors."""

import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from diffusers_compress.cli.options import DASH


def say(target: Path, line: str):
    """A line to the user: to stdout, unless the result itself goes there."""
    print(line, file=sys.stderr if target == DASH else sys.stdout)


@contextmanager
def phase(label: str, pipe=None) -> Iterator[SimpleNamespace]:
    """On a terminal, a bar while the block runs, advanced by the pipeline's own steps. Afterwards `.seconds` tells how long."""
    console, clock, start = Console(stderr=True), SimpleNamespace(seconds=0.0), time.perf_counter()
    columns = SpinnerColumn(), TextColumn(label), BarColumn(), TextColumn("{task.completed:.0f} steps"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=None)
        if pipe is not None:
            bar = SimpleNamespace(update=lambda n=1: progress.advance(task, n))
            pipe.progress_bar = lambda iterable=None, total=None: nullcontext(bar)
        yield clock
    clock.seconds = time.perf_counter() - start


def progress_of(work: Iterable[tuple[int, list]], total: int, label: str) -> Iterator[tuple[int, list]]:
    """The work as it is, with a bar on a terminal and otherwise a line a minute: done, rate, remaining time."""
    console = Console(stderr=True)
    rate = TextColumn("{task.fields[rate]:.1f}/s")
    columns = TextColumn(label), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn()
    start, said, done = time.monotonic(), time.monotonic(), 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=total, rate=0.0)
        for advance, rows in work:
            done, now = done + advance, time.monotonic()
            rate = done / max(now - start, 1e-3)
            progress.update(task, advance=advance, rate=rate)
            if not console.is_terminal and now - said > 60:
                said = now
                print(f"{label}: {done:,} of {total:,}, {rate:.1f}/s, {(total - done) / rate:.0f} s left", file=sys.stderr)
            yield advance, rows


def quieten_libraries():
    """Keep the chatter of diffusers and transformers off the user's screen."""
    import diffusers
    import transformers

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def explain(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return "interrupted"
    if hasattr(error, "format_message"):  # a wrong option or argument
        return " ".join(error.format_message().split())
    message = str(error).strip()
    if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", message, re.IGNORECASE):
        return "out of memory: take a smaller picture, --dtype float16 or another --device"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    first_line = message.partition("\n")[0]
    return first_line if first_line and isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {first_line}"


def let_go_of_stdout():
    """If it is full or closed, Python would complain once more when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
