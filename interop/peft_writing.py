"""Tensors of a PEFT adapter from entries, and everything that keeps a plan from being written."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from interop.peft_config_writing import bias_of, biases, modules_to_save, trained_biases
from interop.peft_layout import (
    Base,
    adapted_settings,
    part,
    places,
    saved_module,
    settings_of,
)
from lora_jax.adapter import Adapter
from lora_jax.paths import nearest
from lora_jax.site import Plan, Site

_ROLES = {
    ("linear", True): ("stack", "in", "out"),
    ("linear", False): ("in", "out"),
    ("embedding", False): ("in", "out"),
}


def tensors_of(adapter: Adapter, plan: Plan, base: Base) -> dict[str, np.ndarray]:
    """Every tensor of the file, float32: views of the entries, each layer cut to its own rank."""
    adapted = adapted_settings(plan, base)
    return {
        place.name: part(_array(adapter[site.path], place.field), place)
        for site in plan.sites
        for place in places(site, base, adapted)
    }


def plan_problems(plan: Plan, base: Base) -> list[str]:
    """What of a plan PEFT can't hold."""
    if not plan.sites:
        return ["its plan has no sites"]
    found = ((site.path, _site_problem(site, base)) for site in plan.sites)
    problems = [f"{path!r} {problem}" for path, problem in found if problem]
    together = () if problems else _together_problems(plan, base)
    return [*problems, *_mixture_problems(plan), *together]


def serving_problems(plan: Plan, base: Base) -> Iterator[str]:
    """What of a plan that PEFT can hold servers can't."""
    for site in plan.sites:
        kind = site.variant if site.variant != "lora" else base.kind(site.path)
        if kind != "linear":
            yield f"{site.path!r} is {kind}: servers load plain pairs of linear layers alone"


def value_problems(adapter: Adapter, plan: Plan, base: Base) -> Iterator[str]:
    """Values that are not finite, or that a layer has beyond its rank, where PEFT holds none."""
    for site in plan.sites:
        arrays = {name: _array(adapter[site.path], name) for name in site.entry_shapes}
        if not all(np.isfinite(array).all() for array in arrays.values()):
            yield f"{site.path!r} holds values that are not finite"
        elif site.ranks and not _site_problem(site, base) and _is_filled(site, arrays, base):
            yield f"{site.path!r} holds values beyond its ranks {site.ranks}, expected zeros"


def _array(entry: Any, field: str) -> np.ndarray:
    return np.asarray(getattr(entry, field), np.float32)


def _is_filled(site: Site, arrays: dict[str, np.ndarray], base: Base) -> bool:
    rest = {name: np.array(array) for name, array in arrays.items() if name in ("a", "b")}
    for place in places(site, base, ()):
        if place.field in rest:
            part(rest[place.field], place)[...] = 0
    return any(array.any() for array in rest.values())


def _site_problem(site: Site, base: Base) -> str | None:
    rule = base.rules.get(site.path)
    if rule is None:
        near = nearest(site.path, base.rules) or "none"
        return f"belongs to no known torch module (nearest: {near})"
    return _PROBLEMS[site.variant](site, base)


def _pair_problem(site: Site, base: Base) -> str | None:
    kind, rule = base.kind(site.path), base.rules[site.path]
    if kind is None:
        return "is not the weight of a linear layer or an embedding: train it whole, or exclude it"
    expected = _ROLES.get((kind, bool(rule.stack)))
    if site.roles != expected:
        return f"has axis roles {site.roles}, the {kind} weight here has {expected}"
    if not all(0 < scale < math.inf for _, scale in settings_of(site, base).values()):
        return f"has scale {site.scale}, expected positive finite numbers"
    if kind == "embedding" and not base.known:
        return _UNKNOWN_BASE
    return None


def _dora_problem(site: Site, base: Base) -> str | None:
    if problem := _pair_problem(site, base):
        return problem
    if 0 in site.ranks:
        return "has a DoRA magnitude in layers of rank 0, where PEFT has no adapter"
    if tied := base.tied_modules(site.path):
        return f"is tied to {', '.join(tied)}, which has a DoRA magnitude of its own in PEFT"
    return None


def _full_problem(site: Site, base: Base) -> str | None:
    return None if base.known else _UNKNOWN_BASE


def _rows_problem(site: Site, base: Base) -> str | None:
    if base.kind(site.path) != "embedding" or base.rules[site.path].stack:
        return "is not an embedding table: PEFT trains rows of these alone"
    return None


_UNKNOWN_BASE = (
    "is stored according to what else the model has: give params, the base's parameters or shapes"
)

_PROBLEMS: dict[str, Callable[[Site, Base], str | None]] = {
    "lora": _pair_problem,
    "dora": _dora_problem,
    "full": _full_problem,
    "rows": _rows_problem,
}


def _mixture_problems(plan: Plan) -> Iterator[str]:
    lora, dora = (
        ", ".join(repr(site.path) for site in plan.sites if site.variant == variant)
        for variant in ("lora", "dora")
    )
    if not lora and not dora:
        yield "it has no low-rank pair, and PEFT loads none without: adapt a linear layer as well"
    if lora and dora:
        yield f"variant 'dora' of {dora} beside 'lora' of {lora}, of which PEFT has one for all"


def _together_problems(plan: Plan, base: Base) -> Iterator[str]:
    """What no site is to blame for alone."""
    if missing := _untrained_beside(plan, base):
        yield f"PEFT trains modules whole, with {', '.join(sorted(missing))}: train these too"
    if bias_of(plan, base) is None:
        words = {word: sorted(names) for word, names in biases(plan, base).items() if names}
        yield (
            f"it trains the biases {sorted(trained_biases(plan, base))}, and PEFT can train "
            f"{' or '.join(f'{names} ({word!r})' for word, names in words.items())}"
        )


def _untrained_beside(plan: Plan, base: Base) -> set[str]:
    saved = modules_to_save(plan, base)
    trained = {site.path for site in plan.sites if site.variant == "full"}
    return {
        name
        for name, (path, _) in base.tensors.items()
        if saved_module(name) in saved and path not in trained
    }
