"""The command `diffusers-compress`: encode, decode, extract, refine, info, demo, batch, eval, calibrate, push, app. What loads torch is imported
inside the functions that need it, so that help and usage errors come at once."""

import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Annotated

import typer

from diffusers_compress import __version__
from diffusers_compress.cli.app import app_command
from diffusers_compress.cli.batch import batch_command
from diffusers_compress.cli.calibrate import calibrate_command
from diffusers_compress.cli.decode import decode_command
from diffusers_compress.cli.demo import demo_command
from diffusers_compress.cli.encode import encode_command
from diffusers_compress.cli.eval import eval_command
from diffusers_compress.cli.extract import extract_command
from diffusers_compress.cli.info import info_command
from diffusers_compress.cli.push import push_command
from diffusers_compress.cli.refine import refine_command
from diffusers_compress.cli.terminal import INTERRUPTED, complain, explain, hold_closed_streams, let_go_of_stdout, status_of, tell

app = typer.Typer(help="Photos to small files and back with diffusion models.")
COMMANDS = {
    "encode": encode_command,
    "decode": decode_command,
    "extract": extract_command,
    "refine": refine_command,
    "info": info_command,
    "demo": demo_command,
    "batch": batch_command,
    "eval": eval_command,
    "calibrate": calibrate_command,
    "push": push_command,
    "app": app_command,
}
for name, command in COMMANDS.items():
    app.command(name)(command)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show warnings, and the traceback of an error. Goes anywhere.")] = False,
):
    if version:
        tell(f"diffusers-compress {__version__}")
        raise typer.Exit


def main(arguments: list[str] | None = None, interrupted: Callable[[], bool] = lambda: False) -> int:
    """Run the command line; the exit status. A failure prints one line to stderr.  interrupted(): whether Ctrl-C was pressed."""
    if arguments is None:  # a process of its own: when it is told to end, it removes what it was about to write
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        hold_closed_streams()
        for stream in (sys.stdout, sys.stderr):  # for the lines of libraries
            if stream is not None:
                stream.reconfigure(errors="backslashreplace")
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    debug = "--debug" in arguments
    arguments = [word for word in arguments if word != "--debug"]
    try:
        with warnings.catch_warnings():
            if not debug:
                warnings.simplefilter("ignore")
            command = typer.main.get_command(app)
            status = command.main(arguments, prog_name="diffusers-compress", standalone_mode=False) or 0
        if status == INTERRUPTED:
            complain("error: interrupted")
        return status
    except SystemExit as ended:
        if isinstance(ended.__context__, BrokenPipeError):  # whoever reads what was asked for, such as help, has seen enough
            return 0
        raise
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - a user gets a line, never a traceback
        cause = KeyboardInterrupt() if interrupted() else error
        if debug:
            for line in "".join(traceback.format_exception(error)).splitlines():
                complain(line)
        complain(f"error: {explain(cause)}")
        return status_of(cause)
    finally:
        let_go_of_stdout()
