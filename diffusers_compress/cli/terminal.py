"""What the commands say: lines, bars, errors. Nothing raw reaches the terminal, and a broken terminal breaks no work."""

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import typer

DASH = Path("-")  # stdin or stdout
INTERRUPTED = 130  # exit status
INTERVAL = 10.0  # seconds between lines of progress where there is no terminal
OPTIONS = {  # what a message calls an argument of the pipelines -> what its user typed
    "target_bpp": "--bpp",
    "max_bytes": "--max-bytes",
    "target_psnr": "--psnr",
    "target_metric": "--metric",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "allow_other_model (--any-model)": "--any-model",
    "Limits.pixels": "--max-pixels",
}


class UsageError(ValueError):
    """A command line that asks for what cannot be."""

    exit_code = 2


# ------------------------------------------------------------------------------------------------------------------- lines


def printable(text: str) -> str:
    """The text with all that could steer a terminal, or is no character, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def write_line(stream: TextIO | None, line: str) -> None:
    """A line to a stream, whatever its encoding cannot show as escapes. OSError if it does not get there; None is a closed one."""
    if stream is None:
        raise OSError("stdout is closed")
    encoding = stream.encoding or "ascii"
    stream.write(printable(line).encode(encoding, "backslashreplace").decode(encoding) + "\n")
    stream.flush()


def tell(line: str) -> None:
    """A line that was asked for, to stdout. OSError if it does not get there, unless its reader has seen enough."""
    with suppress(BrokenPipeError):
        write_line(sys.stdout, line)


def complain(line: str) -> None:
    """A line to stderr, if that can be."""
    with suppress(OSError, ValueError):
        write_line(sys.stderr, line)


def say(target: Path, line: str) -> None:
    """What became of the work: to stdout, unless the result itself goes there. The work is done, whether this is read or not."""
    with suppress(OSError, ValueError):
        write_line(sys.stderr if target == DASH else sys.stdout, line)


# ---------------------------------------------------------------------------------------------------------------- progress


@contextmanager
def progress(label: str, total: int | None = None, unit: str = "") -> Iterator[Callable]:
    """Gives update(done, total). On a terminal a bar shows it, elsewhere a line every `INTERVAL` seconds."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console, state, start = Console(stderr=True), SimpleNamespace(done=0, total=total), time.monotonic()

    def line() -> str:
        seconds = time.monotonic() - start
        of_total = "" if state.total is None else f" of {state.total:,}"
        rate = state.done / max(seconds, 1e-3)
        left = f", {(state.total - state.done) / rate:.0f} s left" if state.total and state.done else ""
        return f"{state.done:,}{of_total}{unit}, {rate:.1f}/s{left}"

    columns = SpinnerColumn(), TextColumn(label), BarColumn(), TextColumn("{task.fields[line]}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total, line=line())

        def update(done: int, total: int | None = total) -> None:
            state.done, state.total = done, total
            bar.update(task, completed=done, total=total, line=line())

        ended = threading.Event()

        def tick() -> None:
            while not ended.wait(INTERVAL):
                complain(f"{label}: {line()}, {time.monotonic() - start:.0f} s")

        if not console.is_terminal:
            threading.Thread(target=tick, daemon=True).start()
        try:
            yield update
        finally:
            ended.set()


@contextmanager
def phase(label: str, pipe: Any = None) -> Iterator[SimpleNamespace]:
    """Progress of one piece of work, advanced by the pipeline's own steps. Afterwards `.seconds` tells how long it took."""
    clock, start = SimpleNamespace(seconds=0.0), time.perf_counter()
    with progress(label, unit=" steps") as update:
        if pipe is not None:
            done = iter(range(1, sys.maxsize))
            bar = SimpleNamespace(update=lambda n=1: update(next(done)))
            pipe.progress_bar = lambda iterable=None, total=None: nullcontext(bar)
        yield clock
    clock.seconds = time.perf_counter() - start


def quieten_libraries() -> None:
    """Keep the chatter of diffusers and transformers off the user's screen."""
    import diffusers
    import transformers

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


# ------------------------------------------------------------------------------------------------------------------ errors


def explain(error: BaseException) -> str:
    """An error in one line, in the words of the command line."""
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
    for argument, option in OPTIONS.items():
        first_line = first_line.replace(argument, option)
    return first_line if first_line and isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {first_line}"


def status_of(error: BaseException) -> int:
    """The exit status of a failure: docs/cli.md has the table."""
    return INTERRUPTED if isinstance(error, KeyboardInterrupt | typer.Abort) else getattr(error, "exit_code", 1)


def hold_closed_streams() -> None:
    """Put nothing where stdin, stdout or stderr were closed, or the next file to be opened would take their place."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)


def let_go_of_stdout() -> None:
    """If it is full or closed, Python would complain once more when it ends."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
