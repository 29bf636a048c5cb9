"""A command-line parser whose errors are one line."""

import argparse
from typing import NoReturn

__all__ = ["OneLineParser"]


class OneLineParser(argparse.ArgumentParser):
    """Parses a command line. An error is one line on stderr and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Exits with one line instead of a usage notice."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")
