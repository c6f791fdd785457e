"""Tensors of a PEFT adapter from entries, and what of their values PEFT can't hold."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from interop.peft_layout import adapted_settings, places, put, taken
from interop.peft_modules import Base
from interop.peft_plans import site_problem
from lora_jax.adapter import Adapter
from lora_jax.site import Plan, Site


def tensors_of(adapter: Adapter, plan: Plan, base: Base) -> dict[str, np.ndarray]:
    """Every tensor of the file, float32: views of the entries, each layer cut to its own rank."""
    adapted = adapted_settings(plan, base)
    return {
        place.name: taken(_array(adapter[site.path], place.field), place)
        for site in plan.sites
        for place in places(site, base, adapted)
    }


def value_problems(adapter: Adapter, plan: Plan, base: Base) -> Iterator[str]:
    """Values that are not finite, or that a layer has beyond its rank, where PEFT holds none."""
    for site in plan.sites:
        arrays = {name: _array(adapter[site.path], name) for name in site.entry_shapes}
        if not all(np.isfinite(array).all() for array in arrays.values()):
            yield f"{site.path!r} holds values that are not finite"
        elif site.ranks and not site_problem(site, base) and _is_filled(site, arrays, base):
            yield f"{site.path!r} holds values beyond its ranks {site.ranks}, expected zeros"


def _array(entry: Any, field: str) -> np.ndarray:
    return np.asarray(getattr(entry, field), np.float32)


def _is_filled(site: Site, arrays: dict[str, np.ndarray], base: Base) -> bool:
    rest = {name: np.array(array) for name, array in arrays.items() if name in ("a", "b")}
    for place in places(site, base, ()):
        if place.field in rest:
            put(rest[place.field], place, np.zeros(place.shape, np.float32))
    return any(array.any() for array in rest.values())
