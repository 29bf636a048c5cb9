"""Entry point of ``python -m optclip.demo``."""

import sys

from optclip.demo.command import main

if __name__ == "__main__":
    sys.exit(main())
