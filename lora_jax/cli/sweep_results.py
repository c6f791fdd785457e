"""What came of a sweep, and its directory.

NAME/        a run directory for each adapter: adapter/, a PEFT directory, and config.yaml
sweep.json   settings and losses, best first
sweep.png    all losses over the updates
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from lora_jax.cli import runs
from lora_jax.cli.base import Base, write_adapter
from lora_jax.cli.history import finite
from lora_jax.cli.parsing import as_yaml
from lora_jax.cli.sweep import Options
from lora_jax.cli.sweep_grid import Setting, options_of
from lora_jax.cli.sweep_plot import plot_curves
from lora_jax.files import atomic_directory, write_text
from lora_jax.site import Plan
from lora_jax.train.many import Trained

REPORT, PLOT = "sweep.json", "sweep.png"


class Result(NamedTuple):
    """What came of one setting."""

    setting: Setting
    plan: Plan
    trained: Trained
    training_loss: float
    """Over the last epoch, nats a token."""
    heldout_loss: float | None
    """After the last update, where there are held-out rows."""

    @property
    def loss(self) -> float:
        """What adapters are ranked by: the held-out loss, or else the training loss."""
        return self.training_loss if self.heldout_loss is None else self.heldout_loss

    @property
    def is_finite(self) -> bool:
        """Whether there is a loss to rank it by."""
        return math.isfinite(self.loss)

    @property
    def left_out(self) -> int:
        """Updates that were not made because something was not finite."""
        return int(self.trained.skipped.sum())

    def order(self) -> tuple[bool, float]:
        """For sorting, best first: what is not finite comes last."""
        return (not self.is_finite, self.loss if self.is_finite else 0.0)


def write_results(options: Options, base: Base, results: list[Result]) -> None:
    """The directory of the sweep, which appears whole or not at all."""
    with atomic_directory(options.out) as directory:
        for result in results:
            run = directory / result.setting.name
            write_adapter(run / runs.ADAPTER, base, result.trained.adapter, result.plan)
            write_text(run / runs.CONFIG, as_yaml(options_of(options, result.setting)))
        _write_report(directory / REPORT, results)
        curves = {each.setting.name: each.trained.losses.tolist() for each in results}
        plot_curves(directory / PLOT, curves)


def print_results(console: Console, results: list[Result]) -> None:
    """A table of the settings, best first."""
    judged = results[0].heldout_loss is not None
    columns = ["learning rate", "rank", "alpha", "seed", "training loss"]
    columns += ["held-out loss"] * judged + ["left out"] * any(each.left_out for each in results)
    table = Table(*columns)
    for each in results:
        rate, rank, alpha, seed = each.setting
        cells = [f"{rate:g}", str(rank), f"{alpha:g}", str(seed), f"{each.training_loss:.4f}"]
        cells += [f"{each.loss:.4f}"] * judged
        cells += [str(each.left_out)] * (len(columns) - len(cells))
        table.add_row(*cells)
    console.print(table)
    best = results[0]
    if best.is_finite:
        console.print(f"best      {best.setting.name}", soft_wrap=True)


def _write_report(path: Path, results: list[Result]) -> None:
    content = {
        "ranked_by": "training_loss" if results[0].heldout_loss is None else "heldout_loss",
        "adapters": [_as_json(result) for result in results],
    }
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def _as_json(result: Result) -> dict[str, Any]:
    return {
        "name": result.setting.name,
        **result.setting._asdict(),
        "training_loss": finite(result.training_loss),
        "heldout_loss": finite(result.heldout_loss),
        "updates_left_out": result.left_out,
        "losses": [finite(loss) for loss in result.trained.losses.tolist()],
    }
