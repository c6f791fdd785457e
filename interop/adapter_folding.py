"""Adapters made to fit formats that have one scale, one rank or one set of modules for all layers.

Folding a scale into B, filling ranks up with zeros, and modules of zeros change no function.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from interop.adapter_file import ModuleAdapter
from lora_jax.errors import listed

Modules = Mapping[str, ModuleAdapter]


def with_scales(
    modules: Modules, scale_of: Callable[[str, ModuleAdapter], float]
) -> tuple[dict[str, ModuleAdapter], tuple[str, ...]]:
    """The modules with other scales, and a note of those whose B had to change for it.

    >>> module = ModuleAdapter(np.ones((1, 2)), np.ones((2, 1)), 3.0)
    >>> folded, notes = with_scales({"q": module}, lambda name, module: 1.0)
    >>> folded["q"].b.tolist(), notes
    ([[3.0], [3.0]], ("scale multiplied into B: 'q'",))
    """
    wanted = {name: scale_of(name, module) for name, module in modules.items()}
    changed = [name for name, module in modules.items() if not _close(module.scale, wanted[name])]
    folded = {
        name: module._replace(scale=wanted[name], b=_times(module, module.scale / wanted[name]))
        if name in changed
        else module._replace(scale=wanted[name])
        for name, module in modules.items()
    }
    note = f"scale multiplied into B: {listed(map(repr, changed))}"
    return folded, (note,) if changed else ()


def with_one_rank(modules: Modules) -> tuple[dict[str, ModuleAdapter], tuple[str, ...]]:
    """The modules filled up with zeros to the largest rank, and a note of which were."""
    rank = max(module.rank for module in modules.values())
    short = [name for name, module in modules.items() if module.rank < rank]
    filled = {name: _filled(module, rank - module.rank) for name, module in modules.items()}
    note = f"filled up with zeros to rank {rank}: {listed(map(repr, short))}"
    return filled, (note,) if short else ()


def with_zeros(
    modules: Modules, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, ModuleAdapter], tuple[str, ...]]:
    """The modules beside linear ones of zeros, whose weights (out, in) have these shapes.

    >>> module = ModuleAdapter(np.ones((1, 2)), np.ones((2, 1)), 3.0)
    >>> found, notes = with_zeros({"q": module}, {"k": (4, 2)})
    >>> found["k"].b.shape, notes
    ((4, 1), ("zeros for what its readers expect as well: 'k'",))
    """
    first = next(iter(modules.values()))
    zeros = {
        name: ModuleAdapter(
            np.zeros((first.rank, inputs), first.a.dtype),
            np.zeros((outputs, first.rank), first.b.dtype),
            first.scale,
        )
        for name, (outputs, inputs) in shapes.items()
    }
    note = f"zeros for what its readers expect as well: {listed(map(repr, zeros))}"
    return {**modules, **zeros}, (note,) if zeros else ()


def common_scale(modules: Modules) -> float:
    """The scale that most modules have, beside 0."""
    return _most_common(modules[name].scale for name in sorted(modules))


def common_alpha(modules: Modules, rank_of: Callable[[str, ModuleAdapter], float]) -> float:
    """The alpha = scale · rank that most modules have, without what a quotient left in it.

    >>> common_alpha({"q": ModuleAdapter(np.ones((3, 2)), np.ones((2, 3)), 16 / 3)},
    ...              lambda name, module: module.rank)
    16.0
    """
    ranks = ((modules[name].scale, rank_of(name, modules[name])) for name in sorted(modules))
    return _most_common(alpha(scale, rank) for scale, rank in ranks)


def alpha(scale: float, rank: float) -> float:
    """The alpha that divided by ``rank`` gives ``scale``, in the fewest digits; else the nearest.

    >>> alpha(2**0.5, 8), alpha(16 / 3, 3)
    (11.313708498984761, 16.0)
    """
    product = scale * rank
    short = float(f"{product:.15g}")
    around = (product, math.nextafter(product, 0), math.nextafter(product, math.inf))
    return next((each for each in (short, *around) if each / rank == scale), short)


def _most_common(numbers: Iterable[float]) -> float:
    return Counter([number for number in numbers if number] or [1.0]).most_common(1)[0][0]


def _close(found: float, wanted: float) -> bool:
    return abs(found - wanted) <= 1e-12 * abs(wanted)


def _times(module: ModuleAdapter, factor: float) -> np.ndarray:
    wide = np.promote_types(np.float32, module.b.dtype)
    with np.errstate(over="ignore"):
        return (np.asarray(module.b, np.float64) * factor).astype(wide)


def _filled(module: ModuleAdapter, more: int) -> ModuleAdapter:
    if not more:
        return module
    axis = 1 if module.kind == "experts" else 0
    a = np.pad(module.a, [(0, more if k == axis else 0) for k in range(module.a.ndim)])
    b = np.pad(module.b, [(0, 0)] * (module.b.ndim - 1) + [(0, more)])
    return module._replace(a=a, b=b)
