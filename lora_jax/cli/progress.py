"""What a person sees while a model trains: one line that moves, or a line now and then in a log."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from lora_jax.train.loop import StepReport

LOG_EVERY = 10.0
"""Seconds between lines where the output is not a terminal."""


class TrainingProgress:
    """Shows update, loss, learning rate, tokens per second and time left.

    Args:
      console: where to show it.
      steps: updates in the run.
      positions: positions computed in an update, padding included.
    """

    def __init__(self, console: Console, steps: int, positions: int) -> None:
        self._console, self._steps, self._positions = console, steps, positions
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

    def show(self, report: StepReport, learning_rate: float) -> None:
        """One update more."""
        rate = self._positions / report.seconds
        line = f"loss {report.loss:.3f} · lr {learning_rate:.1e} · {rate:,.0f} tok/s"
        self._bar.update(self._task, completed=report.step, description=line)
        if not self._console.is_terminal and self._is_due(report.step):
            left = (self._steps - report.step) * report.seconds
            self._console.print(f"update {report.step}/{self._steps} · {line} · {left:.0f} s left")

    def _is_due(self, step: int) -> bool:
        due = step == self._steps or time.monotonic() - self._logged > LOG_EVERY
        if due:
            self._logged = time.monotonic()
        return due
