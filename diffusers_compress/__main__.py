"""The command `diffusers-compress`, also as `python -m diffusers_compress`. Loading the commands takes a moment, in which Ctrl-C counts too."""

import sys


def main() -> int:
    """Run the command line; the exit status."""
    try:
        from diffusers_compress.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
