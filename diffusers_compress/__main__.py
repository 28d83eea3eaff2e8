"""The command `diffusers-compress`, also as `python -m diffusers_compress`. Loading the commands takes a moment, in which Ctrl-C counts too."""

import signal
import sys
import threading


def main() -> int:
    """Run the command line; the exit status."""
    interrupted = threading.Event()

    def interrupt(*_):
        interrupted.set()  # a library that is being imported may make another error of what is raised here
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else a shell has it ignored
        signal.signal(signal.SIGINT, interrupt)
    try:
        from diffusers_compress.cli import main as run

        return run(interrupted=interrupted.is_set)
    except (Exception, KeyboardInterrupt) as error:
        if not interrupted.is_set() and not isinstance(error, KeyboardInterrupt):
            raise
        print("error: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
