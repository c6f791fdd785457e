"""A plan as a table that a person reads."""

from pathlib import PurePath

from lora_jax.site import Plan, Site, Use


def explain(plan: Plan, *, width: int = 120, color: bool = False) -> str:
    """The plan as a table: per weight its shape by roles, rank, scale, size, and how it is used.

    Args:
      plan: what to print.
      width: columns of the terminal.
      color: with ANSI colours.

    >>> use = Use("dot_general", "/home/me/model.py:7 (mlp)")
    >>> site = Site("kernel", (4, 6), "float32", ("in", "out"), 2, 1.0, uses=(use,))
    >>> print(explain(Plan((site,), base_parameters=24)))
    leaf     shape by role   rank   scale   trainable   used by
    ──────────────────────────────────────────────────────────────────────────
    kernel   in:4 out:6         2       1          20   dot_general model.py:7
    trainable params: 20 || all params: 44 || trainable%: 45.4545
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for heading in ("leaf", "shape by role", "rank", "scale", "trainable", "used by"):
        number = heading in ("rank", "scale", "trainable")
        table.add_column(heading, justify="right" if number else "left", no_wrap=number)
    for site in plan.sites:
        table.add_row(*_row(site))
    table.columns[0].no_wrap = True
    console = Console(width=width, force_terminal=color, no_color=not color)
    with console.capture() as capture:
        console.print(table)
    lines = [line.strip() for line in capture.get().splitlines()]
    return "\n".join([*filter(None, lines), trainable_summary(plan)])


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


def _row(site: Site) -> tuple[str, ...]:
    shape = " ".join(f"{role}:{size}" for role, size in zip(site.roles, site.shape, strict=True))
    used_by = "\n".join(map(_described, site.uses))
    return site.path, shape, str(site.rank), f"{site.scale:g}", f"{site.trainable:,d}", used_by


def _described(use: Use) -> str:
    place = PurePath(use.where).name.split(" ")[0]
    merged = f", merged there: it {use.merged_because}" if use.merged_because else ""
    return f"{use.operation} {place}{merged}"
