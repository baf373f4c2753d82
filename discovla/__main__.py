"""`python -m discovla` runs the `discovla` command."""

import sys

from discovla.cli import main

sys.exit(main())
