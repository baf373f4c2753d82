"""`python -m discovla` runs the `discovla` command."""

import sys

from discovla.cli import main

if __name__ == "__main__":
    sys.exit(main())
