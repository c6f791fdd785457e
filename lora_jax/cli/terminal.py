"""Where commands print."""

import sys

from rich.console import Console

LOG_WIDTH = 120
"""Columns of a file or a pipe, which has none of its own."""


def open_console(stderr: bool = False) -> Console:
    """Standard output (or error), as wide as the terminal."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(highlight=False, stderr=stderr, width=None if stream.isatty() else LOG_WIDTH)
