"""Where commands print."""

import sys

from rich.console import Console

LOG_WIDTH = 120
"""Columns of a file or a pipe, which has none of its own."""


def open_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Standard output (or error), as wide as the terminal; quiet, it prints nothing."""
    width = None if (sys.stderr if stderr else sys.stdout).isatty() else LOG_WIDTH
    return Console(highlight=False, stderr=stderr, quiet=quiet, width=width)
