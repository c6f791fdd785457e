"""Writing adapter_config.json: a plan in PEFT's terms."""

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

from interop.adapter_folding import alpha
from interop.peft_layout import adapted_settings, is_pair, settings_of, tensor_names
from interop.peft_matching import PeftConfig, Setting, saved_tensors
from interop.peft_modules import PARAMETERS, Base, saved_module
from interop.peft_patterns import is_named
from interop.peft_versions import WRITTEN_AS
from lora_jax.site import Plan, Site


def config_of(
    plan: Plan,
    base: Base,
    base_model_name: str | None,
    revision: str | None,
    task_type: str | None = None,
    may_use_rslora: bool = True,
) -> dict[str, Any]:
    """The adapter_config.json of a plan that PEFT can hold.

    It has the keys that every PEFT since 0.5 knows, and of newer ones those that the plan needs,
    so that no release warns without cause. Modules whose rank or alpha differs from the most
    common one get an anchored pattern. ``use_rslora`` is for scales that no alpha divided by the
    rank gives to the last bit; servers may not know it.
    """
    settings = named_settings(plan, base)
    use_rslora = may_use_rslora and _needs_rslora({*settings.values()})
    alpha_of = partial(_alpha, use_rslora=use_rslora)
    rank = _usual({name: setting.rank for name, setting in settings.items()}, base)
    usual_alpha = _usual({name: alpha_of(setting) for name, setting in settings.items()}, base)
    return {
        "alpha_pattern": _patterns(plan, base, alpha_of, usual_alpha),
        "auto_mapping": None,
        "base_model_name_or_path": base_model_name,
        "bias": bias_of(plan, base),
        "fan_in_fan_out": any(map(partial(_is_in_out, base), settings)),
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": usual_alpha,
        "lora_dropout": 0.0,
        "modules_to_save": sorted(modules_to_save(plan, base)) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": _patterns(plan, base, lambda setting: setting.rank, rank),
        "revision": revision,
        "target_modules": _target_modules(_modules(plan, settings, base), base),
        "task_type": task_type,
        **({"use_rslora": True} if use_rslora else {}),
        **{key: value for key, value in _newer_keys(plan, base).items() if value},
    }


def named_settings(plan: Plan, base: Base) -> dict[str, Setting]:
    """The settings of what the config names: the output projection of an attention is not."""
    settings = adapted_settings(plan, base)
    return {name: s for name, s in settings.items() if not base.is_nested(name, settings)}


def target_parameters(settings: Iterable[str], base: Base) -> list[str]:
    """The targets that have no module of their own."""
    return sorted(name for name in settings if _is_bare(name, base))


def modules_to_save(plan: Plan, base: Base) -> set[str]:
    """The modules whose weight is trained whole; by full name, since PEFT matches any ending."""
    full = [site for site in plan.sites if site.variant == "full"]
    names = {n for site in full for n in tensor_names(site, base) if not n.endswith(".bias")}
    modules = {saved_module(name) for name in names}
    outermost = {m for m in modules if not any(m.startswith(f"{other}.") for other in modules)}
    return outermost | {name for site in full for name in _unseen_copies(site, base)}


def saved_by_modules(plan: Plan, base: Base) -> set[str]:
    """Every parameter that PEFT trains whole with these modules."""
    names = sorted(modules_to_save(plan, base))
    return saved_tensors(PeftConfig(1, 1, None, modules_to_save=names), [*base.tensors])


def bias_of(plan: Plan, base: Base) -> str | None:
    """PEFT's word for the biases that are trained without their weights, if it has one."""
    trained = trained_biases(plan, base)
    return next((word for word, names in biases(plan, base).items() if names == trained), None)


def biases(plan: Plan, base: Base) -> dict[str, set[str]]:
    """The biases that each of PEFT's words means."""
    saved, adapted = saved_by_modules(plan, base), adapted_settings(plan, base)
    every = {name for name in base.tensors if name.endswith(".bias") and name not in saved}
    of_adapted = {name for name in every if saved_module(name) in adapted}
    return {"none": set(), "lora_only": of_adapted, "all": every}


def trained_biases(plan: Plan, base: Base) -> set[str]:
    """The biases that are trained without their weights."""
    return _trained_whole(plan, base) - saved_by_modules(plan, base)


def _trained_whole(plan: Plan, base: Base) -> set[str]:
    full = (site for site in plan.sites if site.variant == "full")
    return {name for site in full for name in tensor_names(site, base)}


def _is_bare(name: str, base: Base) -> bool:
    return name not in base.modules and name in base.parameters


def _is_in_out(base: Base, name: str) -> bool:
    return name in base.modules and base.kind(base.modules[name][0]) == "linear_in_out"


def _modules(plan: Plan, settings: Iterable[str], base: Base) -> set[str]:
    modules = {name for name in settings if not _is_bare(name, base)}
    return modules | {n for site in plan.sites if is_pair(site) for n in _unseen_copies(site, base)}


def _unseen_copies(site: Site, base: Base) -> list[str]:
    """The modules tied to a table that PEFT doesn't know for one by its name, as GPT-2's ``wte``.

    It ties nothing then, unless the config names one of these.
    """
    last = saved_module(base.rules[site.path].name).rpartition(".")[2]
    return [] if last == "embed_tokens" else base.tied_modules(site.path)


def _usual(values: Mapping[str, Any], base: Base) -> Any:
    """The most common value, and among bare parameters' where there are any: PEFT warns of a
    pattern that matches no module, so it is one that leaves the others values of some module."""
    bare = [value for name, value in values.items() if _is_bare(name, base)]
    of_modules = {value for name, value in values.items() if not _is_bare(name, base)}
    fitting = [value for value in bare if {*bare} - {value} <= of_modules]
    return _most_common(fitting or bare or values.values())


def _newer_keys(plan: Plan, base: Base) -> dict[str, Any]:
    rows = {
        saved_module(base.rules[site.path].name): list(site.rows)
        for site in plan.sites
        if site.variant == "rows"
    }
    tied = [s for s in plan.sites if s.variant != "rows" and base.tied_modules(s.path)]
    parameters = target_parameters(adapted_settings(plan, base), base)
    return {
        "ensure_weight_tying": bool(tied),
        "lora_bias": any(site.variant == "bias" for site in plan.sites),
        "peft_version": WRITTEN_AS if parameters else None,
        "target_parameters": parameters,
        "trainable_token_indices": rows,
        "use_dora": any(site.variant == "dora" for site in plan.sites),
    }


def _patterns(
    plan: Plan, base: Base, value_of: Callable[[Setting], Any], usual: Any
) -> dict[str, Any]:
    """One pattern for a leaf whose layers agree, else one a layer: no name matches two."""
    named, of_modules, bare = named_settings(plan, base), {}, {}
    for site in filter(is_pair, plan.sites):
        values = {m: value_of(s) for m, s in settings_of(site, base).items() if m in named}
        agreed = len(set(values.values())) == 1
        by_pattern = {_any_layer(site, base) if agreed else _anchored(m): values[m]
                      for m in values}  # fmt: skip
        # PEFT gives a module that is tied to a table the scale of its own name.
        by_pattern |= {_anchored(m): value for value in values.values()
                       for m in base.tied_modules(site.path)}  # fmt: skip
        (bare if base.rules[site.path].kind in PARAMETERS else of_modules).update(by_pattern)
    return _joined(of_modules, bare, usual)


def _joined(of_modules: Mapping[str, Any], bare: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """The patterns of values that aren't the usual one; each matches a module if there is any.

    PEFT warns of others. A pattern for bare parameters is that of modules of the same value too.
    Where there is none it begins with another pattern, which comes first in the alphabet and so
    decides for its modules.

    >>> _joined({"^a": 2, "^c": 3}, {"^b": 2, "^d": 1}, 1)
    {'^a|^b': 2, '^c': 3}
    >>> _joined({"^a": 2, "^c": 3}, {"^b": 4, "^d": 5}, 3)
    {'^a': 2, '^a|^b': 4, '^a|^d': 5}
    >>> _joined({"^a": 2}, {"^b": 4}, 2)
    {'^a': 2, '^a|^b': 4}
    """
    rest = {key: value for key, value in {**of_modules, **bare}.items() if value != usual}
    keys = {value: "|".join(key for key, its in rest.items() if its == value)
            for value in bare.values()}  # fmt: skip
    patterns = {keys.get(value, key): value for key, value in rest.items()}
    lone = {*keys} - {*of_modules.values()}
    if not of_modules or not lone & {*patterns.values()}:
        return patterns
    others = {key: value for key, value in patterns.items() if value not in lone}
    first = min(others or of_modules)
    return {first: usual, **others} | {
        f"{first}|{key}": value for key, value in patterns.items() if value in lone
    }


def _anchored(module: str) -> str:
    return "^" + re.escape(module)


def _any_layer(site: Site, base: Base) -> str:
    rule = base.rules[site.path]
    name = rule.name if rule.kind in PARAMETERS else saved_module(rule.name)
    return re.sub(r"\\{\w\\}", r"\\d+", _anchored(name))


def _alpha(setting: Setting, use_rslora: bool) -> float:
    found = alpha(setting.scale, _divisor(setting, use_rslora))
    return int(found) if found.is_integer() else found


def _divisor(setting: Setting, use_rslora: bool) -> float:
    return math.sqrt(setting.rank) if use_rslora else setting.rank


def _needs_rslora(settings: Collection[Setting]) -> bool:
    """Whether alpha/√rank gives every scale to the last bit, and alpha/rank doesn't.

    >>> _needs_rslora([Setting(5, 2 / math.sqrt(5))]), _needs_rslora([Setting(4, 2 / math.sqrt(4))])
    (True, False)
    """
    exact = {
        flag: all(_alpha(s, flag) / _divisor(s, flag) == s.scale for s in settings)
        for flag in (False, True)
    }
    return exact[True] and not exact[False]


def _most_common(values: Iterable[Any]) -> Any:
    counts = Counter(values)
    return max(sorted(counts), key=counts.__getitem__)


def _target_modules(wanted: set[str], base: Base) -> list[str] | str:
    """Last parts of names, as vLLM wants them, where they match nothing else; else full names.

    Where a full name is the end of another's too, a pattern of them all.
    """
    modules = {*base.modules, *wanted}
    parents = {".".join(m.split(".")[:k]) for m in modules for k in range(1, m.count(".") + 1)}
    endings = {module.split(".")[-1] for module in wanted}
    for names in (endings, wanted) if not any(map(str.isdigit, endings)) else (wanted,):
        if {m for m in modules | parents if is_named(m, names)} == wanted:
            return sorted(names)
    return "|".join(map(re.escape, sorted(wanted)))
