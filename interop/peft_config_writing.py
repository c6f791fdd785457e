"""Writing adapter_config.json: a plan in PEFT's terms."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from interop.peft_layout import (
    Base,
    adapted_settings,
    is_pair,
    saved_module,
    settings_of,
    tensor_names,
)
from interop.peft_matching import Setting
from lora_jax.site import Plan


def config_of(
    plan: Plan, base: Base, base_model_name: str | None, revision: str | None
) -> dict[str, Any]:
    """The adapter_config.json of a plan that PEFT can hold.

    It has the keys that every PEFT since 0.5 knows, and of newer ones those that the plan needs,
    so that no release warns without cause. Modules whose rank or alpha differs from the most
    common one get an anchored pattern.
    """
    settings = adapted_settings(plan, base)
    rank = _most_common(setting.rank for setting in settings.values())
    alpha = _most_common(map(_alpha, settings.values()))
    return {
        "alpha_pattern": _patterns(plan, base, _alpha, alpha),
        "auto_mapping": None,
        "base_model_name_or_path": base_model_name,
        "bias": bias_of(plan, base),
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": sorted(modules_to_save(plan, base)) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": _patterns(plan, base, lambda setting: setting.rank, rank),
        "revision": revision,
        "target_modules": _target_modules(plan, base),
        "task_type": "CAUSAL_LM",
        **{key: value for key, value in _newer_keys(plan, base).items() if value},
    }


def modules_to_save(plan: Plan, base: Base) -> set[str]:
    """The modules whose weight is trained whole; by full name, since PEFT matches any ending."""
    return {
        saved_module(name)
        for site in plan.sites
        if site.variant == "full"
        for name in tensor_names(site, base)
        if not name.endswith(".bias")
    }


def bias_of(plan: Plan, base: Base) -> str | None:
    """PEFT's word for the biases that are trained without their weights, if it has one."""
    trained = trained_biases(plan, base)
    return next((word for word, names in biases(plan, base).items() if names == trained), None)


def biases(plan: Plan, base: Base) -> dict[str, set[str]]:
    """The biases that each of PEFT's words means."""
    saved, adapted = modules_to_save(plan, base), adapted_settings(plan, base)
    every = {name for name in base.tensors if name.endswith(".bias")}
    every = {name for name in every if saved_module(name) not in saved}
    of_adapted = {name for name in every if saved_module(name) in adapted}
    return {"none": set(), "lora_only": of_adapted, "all": every}


def trained_biases(plan: Plan, base: Base) -> set[str]:
    """The biases that are trained without their weights."""
    saved = modules_to_save(plan, base)
    full = (site for site in plan.sites if site.variant == "full")
    names = (name for site in full for name in tensor_names(site, base) if name.endswith(".bias"))
    return {name for name in names if saved_module(name) not in saved}


def _newer_keys(plan: Plan, base: Base) -> dict[str, Any]:
    rows = {
        saved_module(base.rules[site.path].name): list(site.rows)
        for site in plan.sites
        if site.variant == "rows"
    }
    tied = [s for s in plan.sites if s.variant != "rows" and base.tied_modules(s.path)]
    return {
        "ensure_weight_tying": bool(tied),
        "trainable_token_indices": rows,
        "use_dora": any(site.variant == "dora" for site in plan.sites),
    }


def _patterns(
    plan: Plan, base: Base, value_of: Callable[[Setting], Any], usual: Any
) -> dict[str, Any]:
    """One pattern for a leaf whose layers agree, else one a layer: no name matches two."""
    patterns = {}
    for site in filter(is_pair, plan.sites):
        values = {m: value_of(setting) for m, setting in settings_of(site, base).items()}
        agreed = len(set(values.values())) == 1
        by_pattern = {_any_layer(site.path, base) if agreed else _anchored(m): values[m]
                      for m in values}  # fmt: skip
        patterns |= {key: value for key, value in by_pattern.items() if value != usual}
    return patterns


def _anchored(module: str) -> str:
    return "^" + re.escape(module)


def _any_layer(path: str, base: Base) -> str:
    return _anchored(saved_module(base.rules[path].name)).replace(re.escape("{i}"), r"\d+")


def _alpha(setting: Setting) -> float:
    """The shortest alpha with alpha/rank == scale, where one exists, else the nearest."""
    rank, scale = setting
    product = scale * rank
    shortest = float(f"{product:.15g}")
    around = (product, math.nextafter(product, 0), math.nextafter(product, math.inf))
    alpha = next((x for x in (shortest, *around) if x / rank == scale), shortest)
    return int(alpha) if alpha.is_integer() else alpha


def _most_common(values: Iterable[Any]) -> Any:
    counts = Counter(values)
    return max(sorted(counts), key=counts.__getitem__)


def _target_modules(plan: Plan, base: Base) -> list[str]:
    """Last parts of names, as vLLM wants them, where they match nothing else; else full names."""
    templates = {path: saved_module(rule.name) for path, rule in base.rules.items()}
    pairs = [site for site in plan.sites if is_pair(site)]
    in_every_layer = {templates[site.path] for site in pairs if 0 not in site.ranks}
    taken = {module.split(".")[-1] for module in {*templates.values()} - in_every_layer}
    taken |= {parent for module in templates.values() for parent in module.split(".")[:-1]}
    suffixes = {templates[site.path].split(".")[-1] for site in pairs}
    return sorted(adapted_settings(plan, base) if suffixes & taken else suffixes)
