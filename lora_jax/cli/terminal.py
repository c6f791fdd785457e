"""Where commands print."""

import sys

from rich.console import Console

LOG_WIDTH = 120
"""Columns of a file or a pipe, which has none of its own."""


def open_console() -> Console:
    """Standard output, as wide as the terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else LOG_WIDTH)
