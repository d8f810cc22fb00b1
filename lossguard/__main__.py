"""``python -m lossguard``."""

import sys

from lossguard.cli import main

if __name__ == "__main__":
    sys.exit(main())
