"""What a person sees while a model trains: one line that moves, or a line now and then in a log."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

LOG_EVERY = 10.0
"""Seconds between lines where the output is not a terminal."""


class UpdateProgress:
    """Shows the update, a line about it and the time left.

    Args:
      console: where to show it.
      steps: updates in all.
    """

    def __init__(self, console: Console, steps: int) -> None:
        self._console, self._steps = console, steps
        self._logged = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} · left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=steps)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def show(self, update: int, line: str, in_a_log: str = "") -> None:
        """One update more; a log, which has no bar, gets ``in_a_log`` after the line."""
        self._bar.update(self._task, completed=update, description=line)
        if not self._console.is_terminal and self._is_due(update):
            self._console.print(f"update {update}/{self._steps} · {line}{in_a_log}")

    def _is_due(self, update: int) -> bool:
        due = update == self._steps or time.monotonic() - self._logged > LOG_EVERY
        if due:
            self._logged = time.monotonic()
        return due
