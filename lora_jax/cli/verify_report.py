"""A verification report as tables and a verdict in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from interop.differences import Difference
    from interop.equivalence_report import Comparison, GreedyAnswer, Report

_WIDTH = 40
_GRADIENTS = 10
"""Rows of their table: an adapter has hundreds."""


def render(report: Report) -> RenderableType:
    """Everything a report says: layers, logits, greedy answers, effect, verdict."""
    return Group(
        _layers(report),
        _logits(report),
        _answers(report),
        *_flips(report),
        *_training(report),
        _verdict(report),
    )


def _layers(report: Report) -> Table:
    table = _table("Output of each layer, JAX against torch", "layer")
    for name in ("base", "adapted"):
        for measure in ("largest", "relative", "cosine"):
            table.add_column(f"{name}\n{measure}", justify="right")
    table.caption = (
        "largest |JAX - torch|; ‖JAX - torch‖ / ‖torch‖; smallest cosine of any position"
    )
    for base, adapted in zip(report.base.layers, report.adapted.layers, strict=True):
        table.add_row(base.name, *_measures(base), *_measures(adapted))
    return table


def _measures(difference: Difference) -> tuple[str, ...]:
    return (
        f"{difference.max_abs:.1e}",
        f"{difference.relative:.1e}",
        f"{difference.cosine:.7f}",
    )


def _logits(report: Report) -> Table:
    table = _table(f"Logits over {report.positions} positions", "")
    for heading in ("largest", "mean", "asked for"):
        table.add_column(heading, justify="right")
    limit = f"at most {report.criteria.max_logit_difference:g}"
    for name, comparison in _comparisons(report):
        largest, mean = comparison.max_logit_difference, comparison.mean_logit_difference
        table.add_row(f"{name}: JAX against torch", f"{largest:.1e}", f"{mean:.1e}", limit)
    effect, least = f"{report.effect:.2f}", f"above {report.criteria.min_effect:g}"
    table.add_row("adapted against base, torch", effect, "", least)
    return table


def _answers(report: Report) -> Table:
    table = _table("Greedy answers, tokens that agree", "prompt")
    table.add_column("base", justify="right")
    table.add_column("adapted", justify="right")
    table.add_column("the adapted model's answer")
    for base, adapted in zip(report.base.answers, report.adapted.answers, strict=True):
        prompt, answer = _end(base.prompt), _start(adapted.answer)
        table.add_row(prompt, _agreement(base), _agreement(adapted), answer)
    return table


def _agreement(answer: GreedyAnswer) -> Text:
    style = "green" if answer.agrees else "red"
    return Text(f"{answer.agreeing} of {answer.tokens}", style)


def _flips(report: Report) -> list[Text]:
    """One line for each answer that differs somewhere."""
    return [
        _flip(f"{name}, answer {number}", answer)
        for name, comparison in _comparisons(report)
        for number, answer in enumerate(comparison.answers, start=1)
        if answer.flip
    ]


def _flip(where: str, answer: GreedyAnswer) -> Text:
    flip = answer.flip
    if flip is None:
        return Text()
    verdict = "a tie within rounding" if flip.explained else "a disagreement"
    return Text(
        f"{where}: token {answer.agreeing + 1} is {flip.ours!r} in JAX and {flip.theirs!r} in "
        f"torch, whose two best logits are {flip.margin:.1e} apart where the two sides differ by "
        f"{flip.difference:.1e}: {verdict}",
        "yellow" if flip.explained else "red",
    )


def _training(report: Report) -> list[RenderableType]:
    """Gradients and the training side by side, where they were asked for."""
    from interop.comparison_tables import differences_table, training_table
    from interop.differences import distance

    limit = report.criteria.max_gradient_difference
    tables: list[RenderableType] = []
    if report.gradients:
        title = f"Gradients of A and B, the furthest of {len(report.gradients)}"
        furthest = sorted(report.gradients, key=distance)[-_GRADIENTS:]
        in_order = [each for each in report.gradients if each in furthest]
        tables.append(differences_table(title, in_order, limit))
    if report.training:
        title = "Training side by side, JAX and PEFT with torch's AdamW"
        tables.append(training_table(title, report.training))
    return tables


def _verdict(report: Report) -> Panel:
    if report.agrees:
        more = ", and so do the gradients of A and B" if report.gradients else ""
        if report.training:
            updates = len(report.training.updates)
            more += f", and so do {updates} updates of a training side by side"
        text = (
            "JAX and torch with PEFT compute the same function, with and without the adapter: "
            f"every logit and every greedy token agrees as closely as was asked for{more}. And the "
            f"adapter matters: it moves logits by up to {report.effect:.1f}."
        )
        return Panel(Text(text), title="verified", border_style="green")
    reasons = "\n".join(f"• {reason}" for reason in report.reasons)
    text = f"JAX and torch with PEFT were not shown to compute the same function:\n{reasons}"
    return Panel(Text(text), title="NOT verified", border_style="red")


def _comparisons(report: Report) -> tuple[tuple[str, Comparison], ...]:
    return ("base", report.base), ("adapted", report.adapted)


def _table(title: str, first: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    table.caption_justify = "left"
    table.add_column(first, justify="left")
    return table


def _start(text: str) -> Text:
    line = " ".join(text.split())
    return Text(line if len(line) <= _WIDTH else line[: _WIDTH - 1] + "…")


def _end(text: str) -> Text:
    """The end of a prompt: it holds the question, the start what all prompts have."""
    line = " ".join(text.split())
    return Text(line if len(line) <= _WIDTH else "…" + line[1 - _WIDTH :])
