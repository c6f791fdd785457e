"""Singular values of ΔW = scale · B A from its thin factors, without ΔW.

With B = Q_b R_b and Aᵀ = Q_a R_a they are those of scale · R_b R_aᵀ, a matrix of rank × rank.
"""

from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from interop.adapter_file import ModuleAdapter


def singular_values(modules: Mapping[str, ModuleAdapter]) -> dict[str, np.ndarray]:
    """The singular values of each module's ΔW, largest first, (rank,), in float32 or wider.

    A convolution's ΔW is taken as a matrix (out, in · kernel); stacked experts have one spectrum
    each, (experts, rank). Modules of equal shapes are decomposed together.

    >>> module = ModuleAdapter(np.array([[3.0, 4.0]]), np.array([[2.0], [0.0]]), 0.5)
    >>> singular_values({"q": module})["q"].tolist()
    [5.0]
    """
    alike = defaultdict(list)
    for name, module in modules.items():
        alike[module.a.shape, module.b.shape].append(name)
    found = {}
    for names in alike.values():
        values = _of_stack(*(np.stack(each) for each in zip(*(factors(modules[n]) for n in names),
                                                            strict=True)))  # fmt: skip
        found |= {n: abs(modules[n].scale) * v for n, v in zip(names, values, strict=True)}
    return {name: found[name] for name in modules}


def factors(module: ModuleAdapter) -> tuple[np.ndarray, np.ndarray]:
    """A as (..., rank, in) and B as (..., out, rank), float32 or wider; 0 what isn't finite."""
    a = module.a.reshape(module.a.shape[0], -1) if module.kind == "conv" else module.a
    return finite(a), finite(module.b)


def _of_stack(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    (a, largest_a), (b, largest_b) = _normalised(a), _normalised(b)
    r_a, r_b = (np.asarray(np.linalg.qr(each, mode="r")) for each in (a.swapaxes(-1, -2), b))
    values = np.linalg.svd(r_b @ r_a.swapaxes(-1, -2), compute_uv=False)
    with np.errstate(over="ignore"):
        return values * largest_a[..., 0] * largest_b[..., 0]


def _normalised(stack: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each matrix over its largest entry, so that no product overflows, and that entry."""
    largest = np.maximum(stack.max((-2, -1), keepdims=True), -stack.min((-2, -1), keepdims=True))
    largest = np.where(largest > 0, largest, 1)
    return stack / largest, largest.astype(np.float64)


def effective_rank(values: np.ndarray) -> float:
    """exp of the entropy of the singular values: 1 if one has all, their number if all are equal.

    Source: Roy and Vetterli, "The effective rank", 2007.

    >>> effective_rank(np.array([3.0, 3.0, 0.0])), effective_rank(np.zeros(4))
    (2.0, 0.0)
    """
    shares = values[values > 0] / values.sum() if values.sum() > 0 else np.zeros(0)
    return round(float(np.exp(-(shares * np.log(shares)).sum())), 6) if shares.size else 0.0


def finite(array: np.ndarray) -> np.ndarray:
    """The values in float32, or in float64 where they are so, 0 for those that aren't finite."""
    wide = np.asarray(array, np.promote_types(array.dtype, np.float32))
    known = np.isfinite(wide)
    return wide if known.all() else np.where(known, wide, 0.0)
