"""`python -m opencloc` (and `torchrun -m opencloc`) is the `opencloc` command."""

import sys

from opencloc.cli import main

sys.exit(main())
