"""Two adapters side by side, by what they compute: ΔW module by module, without forming it.

The difference of two updates has the factors of both::

    s₁ B₁ A₁ - s₂ B₂ A₂ = [s₁ B₁, -s₂ B₂] [A₁; A₂]

so that its norm comes from thin factors, and is exact where the two nearly agree. How an update
is split into A, B and scale makes no difference.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from interop.adapter_file import FileAdapter, ModuleAdapter
from interop.spectra import factors, finite, singular_values

_ENTRIES = 1 << 22
"""Of a ΔW that is formed, a block of rows at a time, for its largest entry."""
_BLOCK = 256


class Difference(NamedTuple):
    """How far one module's updates are apart; a module that one side lacks has ΔW = 0 there."""

    name: str
    only_in: str
    """``a``, ``b``, or nothing."""
    ranks: tuple[int, int]
    scales: tuple[float, float]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    """Of A on both sides."""
    norms: tuple[float, float]
    """‖ΔW‖ on both sides."""
    relative: float
    """‖ΔW₁ - ΔW₂‖ over the larger norm; infinite where one has values that are not finite, or
    where the updates have different shapes."""
    largest: float
    """The largest entry of |ΔW₁ - ΔW₂|; of large matrices its spectral norm, which is no less."""
    cosine: float
    """Of the angle between the updates; NaN where one is zero."""
    others: Mapping[str, float]
    """Relative differences of magnitude and bias, as far as there are any."""

    @property
    def worst(self) -> float:
        """The largest relative difference of anything in the module."""
        return max(self.relative, *self.others.values(), 0.0)


class Comparison(NamedTuple):
    """All modules of either adapter, and what they train whole."""

    modules: tuple[Difference, ...]
    whole: Mapping[str, float]
    """Relative differences of parameters that are stored whole, and of trained rows."""

    def beyond(self, tolerance: float) -> list[str]:
        """The names of all that differ by more than ``tolerance``."""
        modules = [module.name for module in self.modules if not module.worst <= tolerance]
        return [*modules, *(name for name, d in self.whole.items() if not d <= tolerance)]


def compare(first: FileAdapter, second: FileAdapter) -> Comparison:
    """Compare two adapters by torch module.

    >>> a, b = np.ones((2, 3)), np.ones((4, 2))
    >>> one = FileAdapter("x", {"q": ModuleAdapter(a, b, 1.0)})
    >>> other = FileAdapter("y", {"q": ModuleAdapter(2 * a, b / 4, 2.0)})
    >>> compare(one, other).beyond(1e-6)
    []
    >>> compare(one, FileAdapter("z", {})).beyond(1e-6)
    ['q']
    """
    names = [*dict.fromkeys((*first.modules, *second.modules))]
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is beyond any tolerance
        modules = tuple(_module(n, first.modules.get(n), second.modules.get(n)) for n in names)
    of_base = {f"{name} of the base": (first.of_base[name], second.of_base[name])
               for name in first.of_base if name in second.of_base}  # fmt: skip
    whole = _arrays(_whole(first), _whole(second))
    return Comparison(modules, whole | {name: _relative(*both) for name, both in of_base.items()})


def _module(name: str, first: ModuleAdapter | None, second: ModuleAdapter | None) -> Difference:
    only_in = "b" if first is None else "a" if second is None else ""
    one, two = _both(first, second)
    same_shape = _outer(one) == _outer(two)
    known = same_shape and all(np.isfinite(f).all() for m in (one, two) for f in (m.a, m.b))
    values = singular_values({"one": one, "two": two})
    norms = (float(np.linalg.norm(values["one"])), float(np.linalg.norm(values["two"])))
    relative, largest, cosine = (
        _distances(one, two, norms) if known else (math.inf, math.inf, math.nan)
    )
    extras = [{k: v for k, v in (("magnitude", m.magnitude), ("bias", m.bias)) if v is not None}
              for m in (one, two)]  # fmt: skip
    return Difference(
        name,
        only_in,
        (one.rank, two.rank),
        (one.scale, two.scale),
        (one.a.shape, two.a.shape),
        norms,
        relative,
        largest,
        cosine,
        _arrays(*extras),
    )


def _both(
    first: ModuleAdapter | None, second: ModuleAdapter | None
) -> tuple[ModuleAdapter, ModuleAdapter]:
    """Both, where the one that is absent has an update of zero and nothing beside it."""
    known = next(module for module in (first, second) if module is not None)
    zero = known._replace(
        a=np.zeros_like(known.a), b=np.zeros_like(known.b), magnitude=None, bias=None
    )
    return first or zero, second or zero


def _outer(module: ModuleAdapter) -> tuple:
    """The shape of an update, whatever its rank."""
    a, b = (factor.shape for factor in factors(module))
    return (*b[:-1], a[-1])


def _distances(
    one: ModuleAdapter, two: ModuleAdapter, norms: tuple[float, float]
) -> tuple[float, float, float]:
    (a1, b1), (a2, b2) = ((x.astype(np.float64) for x in factors(m)) for m in (one, two))
    a = np.concatenate([a1, a2], axis=-2)
    b = np.concatenate([one.scale * b1, -two.scale * b2], axis=-1)
    between = singular_values(
        {"d": ModuleAdapter(a, b, 1.0, "experts" if a.ndim > 2 else "linear")}
    )
    distance = float(np.linalg.norm(between["d"]))
    product = one.scale * two.scale * float(np.sum((b1.mT @ b2) * (a1 @ a2.mT)))
    cosine = product / math.prod(norms) if all(norms) else math.nan
    largest = _largest_entry(a, b) if a.shape[-1] * b.shape[-2] <= _ENTRIES else between["d"].max()
    return distance / max(*norms, 1e-300), float(largest), min(1.0, max(-1.0, cosine))


def _largest_entry(a: np.ndarray, b: np.ndarray) -> float:
    rows = range(0, b.shape[-2], _BLOCK)
    return max(float(np.abs(b[..., row : row + _BLOCK, :] @ a).max(initial=0)) for row in rows)


def _whole(file: FileAdapter) -> dict[str, np.ndarray]:
    rows = {
        f"row {index} of {name}": row
        for name, found in file.rows.items()
        for index, row in zip(found.indices, found.rows, strict=False)
    }
    return {**file.whole, **rows}


def _arrays(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> dict[str, float]:
    names = dict.fromkeys((*first, *second))
    return {name: _relative(first.get(name), second.get(name)) for name in names}


def _relative(one: np.ndarray | None, two: np.ndarray | None) -> float:
    """‖x - y‖ over the larger norm; infinite where one is absent, or not finite."""
    if one is None or two is None or one.shape != two.shape:
        return math.inf
    x, y = finite(one).astype(np.float64), finite(two).astype(np.float64)
    if not all(np.isfinite(np.asarray(each, np.float64)).all() for each in (one, two)):
        return math.inf
    return float(np.linalg.norm(x - y) / max(np.linalg.norm(x), np.linalg.norm(y), 1e-300))
