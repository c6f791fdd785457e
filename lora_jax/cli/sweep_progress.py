"""What a person sees of a sweep: one line that moves, or a line now and then in a log."""

import time
from types import TracebackType
from typing import Self

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from lora_jax.cli.progress import LOG_EVERY
from lora_jax.train.step import StepMetrics


class SweepProgress:
    """Shows the update, the range of the losses and the time left.

    Args:
      console: where to show it.
      steps: updates in the sweep.
    """

    def __init__(self, console: Console, steps: int) -> None:
        self._console, self._steps = console, steps
        self._started = self._logged = time.monotonic()
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

    def show(self, update: int, metrics: StepMetrics) -> None:
        """One update more; ``metrics`` has an element an adapter."""
        if update == 1:
            took = time.monotonic() - self._started
            self._console.print(f"first update of {len(metrics.loss)} adapters after {took:.1f} s")
        finite = metrics.loss[np.isfinite(metrics.loss)]
        line = f"loss {finite.min():.3f} to {finite.max():.3f}" if len(finite) else "no finite loss"
        self._bar.update(self._task, completed=update, description=line)
        if not self._console.is_terminal and self._is_due(update):
            self._console.print(f"update {update}/{self._steps} · {line}")

    def _is_due(self, update: int) -> bool:
        due = update == self._steps or time.monotonic() - self._logged > LOG_EVERY
        if due:
            self._logged = time.monotonic()
        return due
