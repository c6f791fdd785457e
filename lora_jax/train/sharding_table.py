"""Who holds what of the base, as a table that a person reads."""

from collections.abc import Iterable, Sequence
from typing import Any

from lora_jax.train.sharding_rules import AxisSizes, LeafSharding, Rule, leaf_shardings, names

_HEADINGS = {
    "leaf": "left",
    "shape": "left",
    "split": "left",
    "bytes": "right",
    "a device": "right",
    "because": "left",
}


def explain_sharding(
    params: Any, sizes: AxisSizes, rules: Sequence[Rule] = (), *, width: int = 120
) -> str:
    """Per leaf of the base: its shape, what splits each axis, its bytes in all and a device, why.

    Args:
      params: the base, as arrays or shapes.
      sizes: devices along each mesh axis, such as ``mesh.shape``.
      rules: the caller's own, as of `leaf_shardings`, which says what is raised.
      width: columns of the terminal.

    >>> import jax.numpy as jnp
    >>> params = {"w": jnp.zeros((6, 8)), "scale": jnp.zeros(3)}
    >>> print(explain_sharding(params, {"data": 2, "fsdp": 4}))
    leaf    shape   split    bytes   a device   because
    ───────────────────────────────────────────────────────────────────────────────────────
    scale   3       -           12         12   no rule, and no axis is divisible by fsdp=4
    w       6 8     - fsdp     192         48   the largest axis divisible by fsdp=4
    base: 204 bytes, 60 a device (29.4%)
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    leaves = leaf_shardings(params, sizes, rules)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for heading, justify in _HEADINGS.items():
        table.add_column(heading, justify=justify, no_wrap=heading != "because")  # type: ignore[arg-type]
    for path, leaf in leaves.items():
        table.add_row(path, *_row(leaf))
    console = Console(width=width, no_color=True, markup=False, force_jupyter=False)
    with console.capture() as capture:
        console.print(table)
    lines = [line.strip() for line in capture.get().splitlines()]
    return "\n".join([*filter(None, lines), _total(leaves.values())])


def _row(leaf: LeafSharding) -> tuple[str, ...]:
    shape = " ".join(map(str, leaf.shape))
    axes_by_axis = [*leaf.spec, *[None] * (len(leaf.shape) - len(leaf.spec))]
    split = " ".join("·".join(names(axes)) or "-" for axes in axes_by_axis)
    return shape, split, f"{leaf.bytes:,d}", f"{leaf.bytes_per_device:,d}", leaf.because


def _total(leaves: Iterable[LeafSharding]) -> str:
    sums = [(leaf.bytes, leaf.bytes_per_device) for leaf in leaves]
    whole, held = (sum(column) for column in zip(*sums, strict=True))
    return f"base: {whole:,d} bytes, {held:,d} a device ({held / whole:.1%})"
