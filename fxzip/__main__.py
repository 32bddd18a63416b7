"""`python -m fxzip` is the command line `fxzip`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
