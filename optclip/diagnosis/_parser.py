"""A command-line parser with one-line error messages."""

import argparse
from typing import NoReturn

__all__ = ["OneLineParser"]


class OneLineParser(argparse.ArgumentParser):
    """Parses a command line; errors print one line to stderr and exit with code 2."""

    def error(self, message: str) -> NoReturn:
        """Prints one line instead of the usage message, then exits."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")
