"""An adapter's inspection, printed."""

import json
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from lora_jax.cli.inspect_adapter import Options
from lora_jax.cli.terminal import open_console
from lora_jax.errors import printable

if TYPE_CHECKING:
    from interop.inspection import Inspection, ModuleReport

_BARS = "▁▂▃▄▅▆▇█"
_BAR_WIDTH = 16
_CAPTION = (
    "(n): so many layers; norms and effective rank are their median, σ₁ the largest, the "
    "spectrum that of the largest ‖ΔW‖"
)


def show(options: Options) -> int:
    """Run `lora-jax inspect`."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # Threads cost more than thin factors do.
    from interop.adapter_format import Given
    from interop.adapter_formats import require_asked
    from interop.inspection import inspect

    given = Given(alpha=options.alpha)
    found = inspect(options.adapter, given, format=options.format)
    require_asked(given, [found.format])
    if options.form == "json":
        print(as_json(found))
        return 0
    console = open_console()
    console.print(f"{options.adapter}: {_summary(found)}", markup=False, soft_wrap=True)
    console.print(_table(found, every=options.every))
    for word, lines in (("note", found.notes), ("warning", found.warnings)):
        for line in lines:
            console.print(f"{word}: {line}", markup=False, soft_wrap=True)
    return 0


def as_json(found: "Inspection") -> str:
    """All of it, numbers in full; what isn't finite is null, as JSON has no such numbers."""
    modules = [module._asdict() for module in found.modules]
    return json.dumps(finite({**found._asdict(), "modules": modules}), indent=2)


def bar(values: Sequence[float], width: int = _BAR_WIDTH) -> str:
    """Singular values as a row of bars, the largest full; several share a bar if there are many.

    >>> bar([4.0, 2.0, 0.0])
    '█▅▁'
    """
    top = max(values, default=0.0)
    step = max(1, math.ceil(len(values) / width))
    heights = (
        max(values[at : at + step]) / top if top else 0.0 for at in range(0, len(values), step)
    )
    return "".join(_BARS[round(height * (len(_BARS) - 1))] for height in heights)


def _summary(found: "Inspection") -> str:
    parts = [
        f"{found.format} adapter",
        f"base {printable(found.base)}" if found.base else "names no base",
        f"{len(found.modules)} modules",
        f"rank {_span({m.rank for m in found.modules})}" if found.modules else "",
        f"scale {_span({m.scale for m in found.modules})}" if found.modules else "",
        f"{len(found.whole)} whole parameters" if found.whole else "",
        f"{sum(found.rows.values())} trained rows" if found.rows else "",
        f"{found.parameters:,} parameters",
    ]
    return ", ".join(filter(None, parts))


def _table(found: "Inspection", *, every: bool) -> Table:
    from interop.inspection import layers_together

    table = Table(
        caption=None if every else _CAPTION,
        caption_justify="left",
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    for heading in ("module", "ΔW"):
        table.add_column(heading, no_wrap=True)
    for heading in ("rank", "scale", "‖A‖", "‖B‖", "‖ΔW‖", "σ₁", "eff. rank"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("spectrum", no_wrap=True)
    alone = {module.name: [module] for module in found.modules}
    for name, modules in (alone if every else layers_together(found.modules)).items():
        table.add_row(*map(cell, _row(name, modules)))
    for name, shape in found.whole.items():
        table.add_row(cell(name), _shape(shape), "whole")
    for name, count in found.rows.items():
        table.add_row(cell(name), f"{count} rows", "rows")
    return table


def _row(name: str, modules: Sequence["ModuleReport"]) -> tuple[str, ...]:
    title = name if len(modules) == 1 else f"{name} ({len(modules)})"
    extras = dict.fromkeys(extra for module in modules for extra in module.extras)
    widest = max(modules, key=lambda module: module.norm_delta)
    return (
        " + ".join((title, *extras)),
        " / ".join(dict.fromkeys(_shape(module.shape) for module in modules)),
        _span({module.rank for module in modules}),
        _span({module.scale for module in modules}),
        *(
            f"{statistics.median(getattr(module, field) for module in modules):.3g}"
            for field in ("norm_a", "norm_b", "norm_delta")
        ),
        f"{max(max(module.singular_values, default=0.0) for module in modules):.3g}",
        f"{statistics.median(module.effective_rank for module in modules):.1f}",
        bar(widest.singular_values),
    )


def _shape(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape))


def _span(values: set[Any]) -> str:
    """One value, or the least and the greatest."""
    ends = dict.fromkeys(f"{value:.4g}" for value in (min(values), max(values)))
    return " … ".join(ends)


def cell(text: str) -> Text:
    """Text of a table that is taken as it is: names come from strangers' files."""
    return Text(printable(text))


def finite(value: Any) -> Any:
    """The value for JSON, which has no NaN and no infinity: they are null."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
