"""A plan as a table that a person reads."""

from pathlib import PurePath

from lora_jax.site import Plan, Site, Use


def explain(plan: Plan, *, width: int = 120, color: bool = False) -> str:
    """The plan as a table: per weight its shape by roles, rank, scale, size, and how it is used.

    Args:
      plan: what to print.
      width: columns of the terminal.
      color: with ANSI colours.

    >>> from lora_jax.site import Site, Use
    >>> use = Use("dot_general", "/home/me/model.py:7:11 (mlp)")
    >>> site = Site("mlp/kernel", (30, 4, 6), "float32", ("stack", "in", "out"), 2, 1.0, uses=(use,))
    >>> print(explain(Plan((site,), base_parameters=720), width=100))  # doctest: +SKIP
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    for heading in ("leaf", "shape by role", "rank", "scale", "trainable", "used by", "as"):
        table.add_column(heading, justify="right" if heading in _NUMBERS else "left")
    for site in plan.sites:
        table.add_row(*_row(site))
    console = Console(width=width, force_terminal=color, no_color=not color)
    with console.capture() as capture:
        console.print(table)
    lines = [line.rstrip() for line in capture.get().strip("\n").splitlines()]
    return "\n".join([*lines, trainable_summary(plan)])


def trainable_summary(plan: Plan) -> str:
    """The totals, in PEFT's own format.

    >>> trainable_summary(Plan((Site("w", (64, 61), "float32", ("in", "out"), 8, 1.0),), 3904))
    'trainable params: 1,000 || all params: 4,904 || trainable%: 20.3915'
    """
    everything = plan.base_parameters + plan.trainable
    share = 100 * plan.trainable / everything
    return (
        f"trainable params: {plan.trainable:,d} || all params: {everything:,d} "
        f"|| trainable%: {share:.4f}"
    )


_NUMBERS = ("rank", "scale", "trainable")


def _row(site: Site) -> tuple[str, ...]:
    shape = " ".join(f"{role}:{size}" for role, size in zip(site.roles, site.shape, strict=True))
    used_by = "\n".join(f"{use.operation} {_short(use.where)}" for use in site.uses)
    how = "\n".join(_how(use) for use in site.uses)
    return site.path, shape, str(site.rank), f"{site.scale:g}", f"{site.trainable:,d}", used_by, how


def _how(use: Use) -> str:
    return f"merged: {use.merged_because}" if use.merged_because else "low rank"


def _short(where: str) -> str:
    place = where.split(" ")[0]
    name, *position = place.rsplit(":", 2)
    return ":".join([PurePath(name).name, *position[:1]])
