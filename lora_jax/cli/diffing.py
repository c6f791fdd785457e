"""Two adapters compared, printed."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from lora_jax.cli.adapter_bases import given_of, load_adapter_base, read_for
from lora_jax.cli.diff import DIFFERS, Options
from lora_jax.cli.inspecting import cell, finite
from lora_jax.cli.terminal import open_console
from lora_jax.errors import InputError, printable

if TYPE_CHECKING:
    from interop.adapter_file import FileAdapter
    from interop.adapter_format import Given
    from interop.comparison import Comparison, Difference
    from lora_jax.cli.adapter_bases import AdapterBase

_SHOWN_AT_MOST = 20


def show(options: Options) -> int:
    """Run `lora-jax diff`."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # Threads cost more than thin factors do.
    from interop.adapter_format import Given
    from interop.adapter_formats import require_asked
    from interop.comparison import compare

    base = load_adapter_base(options.model) if options.model else None
    given = given_of(base, alpha=options.alpha) if base else Given(alpha=options.alpha)
    files = [_opened(path, given, base) for path in (options.first, options.second)]
    formats = [file.format for file in files]
    require_asked(given, formats)
    _require_same_rows(options, formats)
    found = compare(*files)
    beyond = found.beyond(options.tolerance)
    verdict = _verdict(found, beyond, options.tolerance)
    if options.form == "json":
        print(_as_json(found, verdict, same=not beyond))
        return DIFFERS if beyond else 0
    console = open_console()
    if table := _table(found, beyond, every=options.every):
        console.print(table)
    for line in (*_settings(found), verdict):
        console.print(line, markup=False, soft_wrap=True)
    return DIFFERS if beyond else 0


def _opened(path: Path, given: "Given", base: "AdapterBase | None") -> "FileAdapter":
    """An adapter by the names of files; PEFT has others for experts, which only a base relates."""
    from interop.adapter_plan import from_plan
    from interop.any_adapter import open_adapter

    file = open_adapter(path, given).adapter
    if base is None or file.format != "peft" or base.file_keymap is base.keymap:
        return file
    adapter, plan, _ = read_for(base, path, given._replace(alpha=None), None)
    return from_plan(adapter, plan, base.file_keymap, params=base.params)._replace(format="peft")


def _require_same_rows(options: Options, formats: list[str]) -> None:
    """llama.cpp's q and k have their rows in an order of their own: two such files compare."""
    if formats.count("gguf") == 1 and options.model is None:
        raise InputError(
            "rows of q and k are in another order in .gguf files: give --model, so that they can "
            "be put back"
        )


def _verdict(found: "Comparison", beyond: list[str], tolerance: float) -> str:
    largest = max((module.worst for module in found.modules), default=0.0)
    if not beyond:
        return (
            f"same: {len(found.modules)} modules within {tolerance:g}, the largest relative "
            f"difference {largest:.2g}"
        )
    alone = {side: [m for m in found.modules if m.only_in == side] for side in "ab"}
    parts = [
        f"differ: {len(beyond)} of {len(found.modules) + len(found.whole)} beyond {tolerance:g}",
        f"the largest relative difference {largest:.2g}",
        f"{len(alone['a'])} modules only in the first" if alone["a"] else "",
        f"{len(alone['b'])} modules only in the second" if alone["b"] else "",
        "no module in common: are they of one model?" if _strangers(found) else "",
    ]
    return ", ".join(filter(None, parts))


def _strangers(found: "Comparison") -> bool:
    return bool(found.modules) and all(module.only_in for module in found.modules)


def _settings(found: "Comparison") -> list[str]:
    """Ranks and scales that differ, which need not change what is computed."""
    both = [module for module in found.modules if not module.only_in]
    differing = {
        "rank": [m for m in both if m.ranks[0] != m.ranks[1]],
        "scale": [m for m in both if m.scales[0] != m.scales[1]],
    }
    return [
        f"{word} differs in {len(modules)} modules, first {printable(modules[0].name)}: "
        f"{getattr(modules[0], word + 's')[0]:g} and {getattr(modules[0], word + 's')[1]:g}"
        for word, modules in differing.items()
        if modules
    ]


def _table(found: "Comparison", beyond: list[str], *, every: bool) -> Table | None:
    shown = [m for m in found.modules if every or m.name in set(beyond)]
    shown.sort(key=lambda module: -module.worst)
    cut = len(shown) if every else _SHOWN_AT_MOST
    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("module", no_wrap=True)
    for heading in ("rank", "scale", "‖ΔW‖", "relative", "largest", "cosine"):
        table.add_column(heading, justify="right", no_wrap=True)
    for module in shown[:cut]:
        table.add_row(*map(cell, _row(module)))
    for name, relative in found.whole.items():
        if every or name in set(beyond):
            table.add_row(cell(name), "", "", "whole", f"{relative:.2g}")
    if len(shown) > cut:
        table.add_row(f"and {len(shown) - cut} more: --every shows them")
    return table if table.row_count else None


def _row(module: "Difference") -> tuple[str, ...]:
    where = {"a": " (only in the first)", "b": " (only in the second)", "": ""}[module.only_in]
    pairs = (module.ranks, module.scales, tuple(round(norm, 4) for norm in module.norms))
    return (
        module.name + where,
        *(_pair(pair) for pair in pairs),
        f"{module.worst:.2g}",
        f"{module.largest:.2g}",
        f"{module.cosine:.6f}",
    )


def _pair(pair: tuple[float, ...]) -> str:
    return " / ".join(dict.fromkeys(f"{each:.4g}" for each in pair))


def _as_json(found: "Comparison", verdict: str, *, same: bool) -> str:
    modules: list[Any] = [{**m._asdict(), "worst": m.worst} for m in found.modules]
    content = {"same": same, "verdict": verdict, "modules": modules, "whole": found.whole}
    return json.dumps(finite(content), indent=2)
