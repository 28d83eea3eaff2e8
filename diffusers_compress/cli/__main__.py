"""`python -m diffusers_compress.cli`."""

import sys

from diffusers_compress.cli import main

if __name__ == "__main__":
    sys.exit(main())
