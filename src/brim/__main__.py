"""`python -m brim`."""

from __future__ import annotations

import sys

from brim.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
