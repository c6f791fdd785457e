"""Comparisons with torch as rich tables, and as plain text for a failing test."""

import io
from collections.abc import Iterable

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from interop.differences import Difference, furthest
from interop.module_comparison import ModuleComparison
from interop.side_by_side import TrainingComparison

_MEASURES = "largest |JAX - torch|; ‖JAX - torch‖ / ‖torch‖; smallest cosine of any vector"
_ROWS = 12


def differences_table(title: str, rows: Iterable[Difference], rtol: float) -> Table:
    """A row for each array; the first that is further apart than ``rtol`` is marked."""
    table = _table(title, "name", "shape", "largest", "relative", "cosine", "")
    table.caption = f"{_MEASURES}; relative up to {rtol:g} agrees"
    first = True
    for row in rows:
        agrees = row.within(rtol)
        words = "" if agrees else "◀ the first that disagrees" if first else "disagrees"
        first &= agrees
        numbers = f"{row.max_abs:.1e}", f"{row.relative:.1e}", f"{row.cosine:.7f}"
        table.add_row(row.name, str(row.shape), *numbers, words, style=None if agrees else "red")
    return table


def module_tables(found: ModuleComparison, rtol: float, gradient_rtol: float) -> RenderableType:
    """Layers with the output, then the gradients, then what the adapter does."""
    effect = f"the adapter moves the output by {found.effect or 0:.1e} of its norm"
    gradients = differences_table("Gradients of A and B", found.gradients, gradient_rtol)
    return Group(
        differences_table("Layers and output", (*found.layers, found.output), rtol),
        *([gradients, Text(effect)] if found.gradients else []),
    )


def training_table(title: str, found: TrainingComparison, rows: int = _ROWS) -> Table:
    """Some updates, evenly chosen, with the first and the last; loss, gradient norm, parameters."""
    headings = "update", "loss", "loss apart", "gradient norm", "norm apart", "parameters apart"
    table = _table(title, *headings)
    worst = furthest(found.final)
    table.caption = (
        f"apart: |JAX - torch|, for norms and parameters over torch's; parameters: the furthest "
        f"tensor.\nAfter the last update the furthest is {worst.name}, {worst.relative:.1e}; "
        f"training moved the adapter by {found.moved:.2g} of its norm"
    )
    count = len(found.updates)
    chosen = sorted({round(i * (count - 1) / max(rows - 1, 1)) for i in range(rows)})
    for number in chosen:
        update = found.updates[number]
        table.add_row(
            str(number + 1),
            f"{update.loss:.6f}",
            f"{update.loss_gap:.1e}",
            f"{update.grad_norm:.5f}",
            f"{update.grad_norm_gap:.1e}",
            f"{update.parameter_gap:.1e}",
        )
    return table


def as_text(renderable: RenderableType, width: int = 110) -> str:
    """What a console of that width would show, without colours."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_jupyter=False)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    table.caption_justify = "left"
    table.add_column(first, justify="left", overflow="fold")
    for heading in others:
        table.add_column(heading, justify="right")
    return table
