"""Where commands print."""

import io
import sys

from rich.console import Console

LOG_WIDTH = 120
"""Columns of a file or a pipe, which has none of its own."""


def open_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Standard output (or error), as wide as the terminal; quiet, it prints nothing."""
    stream = sys.stderr if stderr else sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")  # A locale without a letter ends no run.
    width = None if stream.isatty() else LOG_WIDTH
    return Console(highlight=False, stderr=stderr, quiet=quiet, width=width)
