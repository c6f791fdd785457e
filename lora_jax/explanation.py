"""A plan as something that a person reads, as text or as a rich table, or a program, as JSON."""

import json
import re
from pathlib import PurePath
from typing import Any, Literal

from lora_jax.adapter import require_plan
from lora_jax.errors import InputError
from lora_jax.site import Plan, Site, Use

Form = Literal["text", "rich", "json"]

_CELL = re.compile(r"ipykernel_\d+[/\\]\d+\.py:")
"""What a notebook calls the file of a cell, which says nothing to its reader."""


def explain(plan: Plan, *, form: Form = "text", width: int = 120, color: bool = False) -> Any:
    """Per leaf: shape by axis role, rank, scale, trainable parameters, and every use of it.

    A use is the operation and the user's line that calls it; where it has no low-rank form, so
    that W + ΔW is formed there, the reason stands beside it. Below are the totals.

    Args:
      plan: what to explain.
      form: ``text``; ``rich``, for a rich console; ``json``, with every field of every site.
      width: columns of the text.
      color: with ANSI colours, in the text.

    Returns:
      A string, or a rich renderable.

    Raises:
      InputError: there is no such form.

    >>> use = Use("dot_general", "/home/me/model.py:7 (mlp)")
    >>> site = Site("kernel", (4, 6), "float32", ("in", "out"), 2, 1.0, uses=(use,))
    >>> print(explain(Plan((site,), base_parameters=24)))
    leaf     shape by role   rank   scale   trainable   used by
    ──────────────────────────────────────────────────────────────────────────
    kernel   in:4 out:6         2       1          20   dot_general model.py:7
    trainable params: 20 || all params: 44 || trainable%: 45.4545
    >>> json.loads(explain(Plan((site,), 24), form="json"))["sites"][0]["uses"][0]["low_rank"]
    True
    """
    require_plan(plan)
    if form == "json":
        return json.dumps(_values(plan), indent=2, ensure_ascii=False)
    if form == "rich":
        return _renderable(plan)
    if form == "text":
        return _text(plan, width, color)
    raise InputError(f"form {form!r} is not known: use 'text', 'rich' or 'json'")


def trainable_summary(plan: Plan) -> str:
    """The totals, in PEFT's own format.

    >>> trainable_summary(Plan((Site("w", (64, 61), "float32", ("in", "out"), 8, 1.0),), 3904))
    'trainable params: 1,000 || all params: 4,904 || trainable%: 20.3915'
    """
    return (
        f"trainable params: {plan.trainable:,d} || all params: {plan.all_parameters:,d} "
        f"|| trainable%: {_percent(plan):.4f}"
    )


def _percent(plan: Plan) -> float:
    return 100 * plan.trainable / max(plan.all_parameters, 1)


def _renderable(plan: Plan) -> Any:
    from rich.console import Group
    from rich.text import Text

    return Group(_table(plan), Text(trainable_summary(plan)))


def _table(plan: Plan) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for heading in ("leaf", "shape by role", "rank", "scale", "trainable", "used by"):
        number = heading in ("rank", "scale", "trainable")
        table.add_column(heading, justify="right" if number else "left", no_wrap=number)
    for site in plan.sites:
        *cells, uses = _row(site)
        table.add_row(*map(Text, cells), Text("\n").join(uses))
    table.columns[0].no_wrap = True
    return table


def _text(plan: Plan, width: int, color: bool) -> str:
    from rich.console import Console

    console = Console(  # In a notebook too the result is the string, not what is displayed.
        width=width, force_terminal=color, no_color=not color, force_jupyter=False
    )
    with console.capture() as capture:
        console.print(_table(plan))
    lines = [line.strip() for line in capture.get().splitlines()]
    return "\n".join([*filter(None, lines), trainable_summary(plan)])


def _row(site: Site) -> tuple[Any, ...]:
    uses = [_described(use) for use in site.uses]
    return site.path, _shape(site), _rank(site), _scale(site), f"{site.trainable:,d}", uses


def _shape(site: Site) -> str:
    if site.is_whole:
        return " ".join(map(str, site.shape))
    return " ".join(f"{role}:{size}" for role, size in zip(site.roles, site.shape, strict=True))


def _rank(site: Site) -> str:
    ranks = ",".join(map(str, site.ranks)) or str(site.rank)
    return {
        "lora": ranks,
        "dora": f"{ranks} dora",
        "full": "whole",
        "rows": f"{len(site.rows)} rows",
        "bias": "bias",
    }[site.variant]


def _scale(site: Site) -> str:
    if site.variant in ("full", "rows"):
        return ""
    scales = site.scale if isinstance(site.scale, tuple) else (site.scale,)
    return ",".join(f"{scale:g}" for scale in scales)


def _described(use: Use) -> Any:
    from rich.text import Text

    place = PurePath(_CELL.sub("cell:", use.where)).name.split(" ")[0]
    merged = f", merged there: it {use.merged_because}" if use.merged_because else ""
    return Text(f"{use.operation} {place}{merged}", style="yellow" if merged else "")


def _values(plan: Plan) -> dict[str, Any]:
    return {
        "sites": [_site_values(site) for site in plan.sites],
        "trainable": plan.trainable,
        "all": plan.all_parameters,
        "trainable_percent": _percent(plan),
    }


def _site_values(site: Site) -> dict[str, Any]:
    uses = [{**use._asdict(), "low_rank": not use.merged_because} for use in site.uses]
    return {**vars(site), "trainable": site.trainable, "uses": uses}
