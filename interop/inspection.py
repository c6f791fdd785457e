"""What is in an adapter, in numbers: ranks, scales, norms and spectra by module; NumPy alone."""

import math
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from interop.adapter_file import FileAdapter, ModuleAdapter
from interop.adapter_format import Given
from interop.any_adapter import open_adapter
from interop.spectra import effective_rank, finite, singular_values
from lora_jax.errors import listed

_LAYER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_USUAL_SCALES = (0.05, 16.0)
_OUTLIER = 10.0


class ModuleReport(NamedTuple):
    """One module. ‖·‖ is the Frobenius norm, σ are the singular values of ΔW, largest first."""

    name: str
    kind: str
    shape: tuple[int, ...]
    """Of ΔW: (out, in), before DoRA's magnitude."""
    rank: int
    scale: float
    dtype: str
    parameters: int
    norm_a: float
    norm_b: float
    norm_delta: float
    effective_rank: float
    singular_values: tuple[float, ...]
    extras: tuple[str, ...]
    """What there is beside A and B: ``magnitude``, ``bias``."""
    not_finite: int
    """Values that are NaN or infinite; norms and spectrum take them for 0."""


class Inspection(NamedTuple):
    """An adapter as it was found."""

    format: str
    base: str | None
    """The base model that it names."""
    modules: tuple[ModuleReport, ...]
    whole: Mapping[str, tuple[int, ...]]
    """Shapes of parameters that are stored whole."""
    rows: Mapping[str, int]
    """How many rows of an embedding table are trained."""
    parameters: int
    notes: tuple[str, ...]
    """About the file and its format."""
    warnings: tuple[str, ...]
    """About its values."""


def inspect(
    path: str | os.PathLike, given: Given | None = None, *, format: str | None = None
) -> Inspection:
    """Look at an adapter of any format.

    Args:
      path: a run directory, a PEFT directory, or an adapter file.
      given: what its format leaves out, such as alpha.
      format: of the file; told from the content by default.

    Raises:
      InputError: there is none, or none that is whole.
    """
    given = (given or Given())._replace(any_order=True)
    file, config, base = open_adapter(path, given, format=format)
    spectra = singular_values(file.modules)
    modules = tuple(_report(name, m, spectra[name]) for name, m in file.modules.items())
    arrays = [*file.whole.values(), *(found.rows for found in file.rows.values())]
    named = base.get("model") or config.get("base_model_name_or_path")
    return Inspection(
        file.format,
        named if isinstance(named, str) else None,
        modules,
        {name: array.shape for name, array in file.whole.items()},
        {name: len(found.rows) for name, found in file.rows.items()},
        sum(m.parameters for m in modules) + sum(array.size for array in arrays),
        file.notes,
        tuple(_warnings(file, modules)),
    )


def layers_together(modules: tuple[ModuleReport, ...]) -> dict[str, list[ModuleReport]]:
    """Modules that differ in a layer's number alone, under one name.

    >>> [*layers_together(())]
    []
    """
    groups = defaultdict(list)
    for module in modules:
        groups[_LAYER.sub("*", module.name)].append(module)
    return dict(groups)


def _report(name: str, module: ModuleAdapter, values: np.ndarray) -> ModuleReport:
    extras = {"magnitude": module.magnitude, "bias": module.bias}
    present = {key: array for key, array in extras.items() if array is not None}
    arrays = [module.a, module.b, *present.values()]
    together = np.sort(values.ravel())[::-1]
    norm_a, norm_b = _norm(module.a), _norm(module.b)
    return ModuleReport(
        name,
        module.kind,
        _shape(module),
        module.rank,
        module.scale,
        "/".join(sorted({array.dtype.name for array in arrays})),
        sum(array.size for array in arrays),
        norm_a,
        norm_b,
        float(np.linalg.norm(together.astype(np.float64))),
        effective_rank(together),
        tuple(map(float, together)),
        tuple(present),
        sum(map(_not_finite, arrays)),
    )


def _shape(module: ModuleAdapter) -> tuple[int, ...]:
    a, b = module.a.shape, module.b.shape
    shapes = {
        "embedding": (a[-1], b[0]),
        "conv": (b[0], *a[1:]),
        "experts": (*b[:-1], a[-1]),
    }
    return shapes.get(module.kind, (b[0], a[-1]))


def _norm(array: np.ndarray) -> float:
    with np.errstate(over="ignore"):
        values = np.asarray(array, np.float32).ravel()
        square = float(np.dot(values, values))
        if math.isfinite(square):
            return math.sqrt(square)
        return float(np.linalg.norm(finite(array).astype(np.float64)))


def _warnings(file: FileAdapter, modules: tuple[ModuleReport, ...]) -> Iterator[str]:
    low, high = _USUAL_SCALES
    norms = [module.norm_delta for module in modules if module.norm_delta > 0]
    large = _OUTLIER * float(np.median(norms)) if norms else math.inf
    found = {
        "values that are not finite": lambda m: m.not_finite,
        f"a scale outside {low:g} to {high:g}": lambda m: not low <= abs(m.scale) <= high,
        "a B of zeros, so that ΔW is zero: fresh, or not trained": lambda m: not m.norm_b,
        "an A of zeros": lambda m: not m.norm_a,
        f"a ΔW over {_OUTLIER:g} times the median's norm": lambda m: m.norm_delta > large,
    }
    for what, holds in found.items():
        if names := [module.name for module in modules if holds(module)]:
            yield f"{what}: {listed(names)}"
    if weights := [n for n, array in file.whole.items() if n.endswith("weight") and array.ndim > 1]:
        yield f"whole weights, not factors (merged, or modules_to_save): {listed(weights)}"
    bad = [name for name, array in file.whole.items() if _not_finite(array)]
    if bad:
        yield f"values that are not finite in whole parameters: {listed(bad)}"


def _not_finite(array: np.ndarray) -> int:
    return int(array.size - np.isfinite(np.asarray(array, np.float64)).sum())
