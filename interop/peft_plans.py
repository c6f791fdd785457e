"""What of a plan PEFT has no form for, and what of the rest servers don't load."""

import math
from collections.abc import Callable, Iterator

from interop.keymaps import indices, tensor_name
from interop.peft_config_writing import (
    bias_of,
    biases,
    modules_to_save,
    saved_by_modules,
    target_parameters,
    trained_biases,
)
from interop.peft_layout import adapted_settings, setting_of, settings_of
from interop.peft_modules import PARAMETERS, Base, roles_of, saved_module
from lora_jax.paths import nearest
from lora_jax.site import Plan, Site


def plan_problems(plan: Plan, base: Base) -> list[str]:
    """What of a plan PEFT can't hold."""
    if not plan.sites:
        return ["its plan has no sites"]
    found = ((site.path, site_problem(site, base)) for site in plan.sites)
    problems = [f"{path!r} {problem}" for path, problem in found if problem]
    together = () if problems else _together_problems(plan, base)
    return [*problems, *_mixture_problems(plan), *together]


def serving_problems(plan: Plan, base: Base) -> Iterator[str]:
    """What of a plan that PEFT can hold servers can't."""
    for site in plan.sites:
        of_attention = _is_of_attention(site, base) and "a weight of MultiheadAttention"
        kind = site.variant if site.variant != "lora" else of_attention or base.kind(site.path)
        if kind not in ("linear", "linear_in_out"):
            yield f"{site.path!r} is {kind}: servers load plain pairs of linear layers alone"


def site_problem(site: Site, base: Base) -> str | None:
    """Why PEFT has no form for a site, whatever the others are."""
    if site.path not in base.rules:
        near = nearest(site.path, base.rules) or "none"
        return f"belongs to no known torch module (nearest: {near})"
    return _PROBLEMS[site.variant](site, base)


def _pair_problem(site: Site, base: Base) -> str | None:
    kind, rule = base.kind(site.path), base.rules[site.path]
    if len(base.parts[site.path]) > 1:
        names = ", ".join(part.name for part in base.parts[site.path])
        return f"holds {names}, each of which has an adapter of its own in PEFT: train it whole"
    if kind is None:
        return "is not the weight of a linear layer or an embedding: train it whole, or exclude it"
    if site.roles != (expected := roles_of(rule, site.shape)):
        return f"has axis roles {site.roles}, the {kind} weight here has {expected}"
    if not rule.stack and (site.ranks or isinstance(site.scale, tuple)):
        return f"has ranks or scales that differ along its {site.shape[0]} experts, PEFT has one"
    if problem := _sharing_problem(site, base):
        return problem
    if not all(0 < scale < math.inf for _, scale in settings_of(site, base).values()):
        return f"has scale {site.scale}, expected positive finite numbers"
    return _UNKNOWN_BASE if kind in _KINDS_AMONG_OTHERS and not base.known else None


def _dora_problem(site: Site, base: Base) -> str | None:
    if problem := _pair_problem(site, base):
        return problem
    if 0 in site.ranks:
        return "has a DoRA magnitude in layers of rank 0, where PEFT has no adapter"
    if tied := base.tied_modules(site.path):
        return f"is tied to {', '.join(tied)}, which has a DoRA magnitude of its own in PEFT"
    if base.kind(site.path) in PARAMETERS or _is_of_attention(site, base):
        return "has a DoRA magnitude, which PEFT has not for a weight without a layer of its own"
    return None


def _is_of_attention(site: Site, base: Base) -> bool:
    """Whether its input projection is the leaf, which has no module of its own."""
    rule = base.rules[site.path]
    names = {base.target(site.path, index) for index in indices(rule, site.shape)}
    return not names.isdisjoint(base.attentions)


def _full_problem(site: Site, base: Base) -> str | None:
    if not all("." in rule.name for rule in base.parts[site.path]):
        return "is a parameter outside of any module, which PEFT can't train: exclude it"
    return _sharing_problem(site, base) or (None if base.known else _UNKNOWN_BASE)


def _sharing_problem(site: Site, base: Base) -> str | None:
    """PEFT ties modules to an embedding alone; biases it trains in place."""
    tied = base.tied_modules(site.path)
    in_place = base.rules[site.path].name.endswith(".bias")
    if not tied or in_place or base.kind(site.path) == "embedding":
        return None
    return f"is also the weight of {', '.join(tied)}, which PEFT would leave as it was: exclude it"


def _rows_problem(site: Site, base: Base) -> str | None:
    rule = base.rules[site.path]
    if base.kind(site.path) != "embedding" or rule.stack or rule.order not in ((), (0, 1)):
        return "is not an embedding table: PEFT trains rows of these alone"
    return None


def _bias_problem(site: Site, base: Base) -> str | None:
    if not base.rules[site.path].name.endswith(".bias"):
        return "is not the bias of a layer, to which alone PEFT's lora_bias adds"
    return None


_KINDS_AMONG_OTHERS = ("embedding", *PARAMETERS)

_UNKNOWN_BASE = (
    "is stored according to what else the model has: give params, the base's parameters or shapes"
)

_PROBLEMS: dict[str, Callable[[Site, Base], str | None]] = {
    "lora": _pair_problem,
    "dora": _dora_problem,
    "full": _full_problem,
    "rows": _rows_problem,
    "bias": _bias_problem,
}


def _mixture_problems(plan: Plan) -> Iterator[str]:
    lora, dora, bias = (
        ", ".join(repr(site.path) for site in plan.sites if site.variant == variant)
        for variant in ("lora", "dora", "bias")
    )
    if not lora and not dora:
        yield "it has no low-rank pair, and PEFT loads none without: adapt a linear layer as well"
    if lora and dora:
        yield f"variant 'dora' of {dora} beside 'lora' of {lora}, of which PEFT has one for all"
    if bias and dora:
        yield f"variant 'bias' of {bias} beside 'dora' of {dora}, of which PEFT has one"


def _together_problems(plan: Plan, base: Base) -> Iterator[str]:
    """What no site is to blame for alone."""
    trained = {site.path for site in plan.sites if site.variant == "full"}
    saved = saved_by_modules(plan, base)
    if missing := sorted(name for name in saved if base.tensors[name][0] not in trained):
        yield (
            f"PEFT trains modules whole, and with {', '.join(sorted(modules_to_save(plan, base)))} "
            f"also {', '.join(missing)}: train these too"
        )
    if bias_of(plan, base) is None:
        words = {word: sorted(names) for word, names in biases(plan, base).items() if names}
        yield (
            f"it trains the biases {sorted(trained_biases(plan, base))}, and PEFT can train "
            f"{' or '.join(f'{names} ({word!r})' for word, names in words.items())}"
        )
    yield from _attention_problems(plan, base)
    yield from _lora_bias_problems(plan, base)
    yield from _parameter_problems(plan, base)


def _attention_problems(plan: Plan, base: Base) -> Iterator[str]:
    settings = adapted_settings(plan, base)
    for name in sorted(base.attentions):
        own, projection = settings.get(name), settings.get(f"{name}.out_proj")
        if own != projection:
            yield (
                f"{name!r} has {own or 'no adapter'} and its out_proj {projection or 'none'}: PEFT "
                "adapts both alike"
            )


def _lora_bias_problems(plan: Plan, base: Base) -> Iterator[str]:
    """PEFT gives every adapted layer a bias on B, or none, and it has the layer's scale."""
    sites = [site for site in plan.sites if site.variant == "bias"]
    if not sites:
        return
    settings = adapted_settings(plan, base)
    given = {
        saved_module(tensor_name(base.rules[site.path], index)): setting_of(site, index).scale
        for site in sites
        for index in indices(base.rules[site.path], site.shape)
    }
    for name in settings:
        if name not in base.modules or name in base.attentions or base.is_nested(name, settings):
            yield f"variant 'bias' beside an adapter of {name!r}, which has no bias on B in PEFT"
        elif base.kind(base.modules[name][0]) == "embedding":
            yield f"variant 'bias' beside an adapter of {name!r}, an embedding"
        elif not given.get(name):
            yield f"{name!r} has a pair and no update of its bias: PEFT gives all of them one"
    for name, scale in given.items():
        expected = settings[name].scale if name in settings else 0.0
        if scale != expected and (scale or name not in settings):
            yield f"the bias of {name!r} has scale {scale}, its pair has {expected}: PEFT has one"


def _parameter_problems(plan: Plan, base: Base) -> Iterator[str]:
    """PEFT goes by the end of a parameter's name."""
    settings = adapted_settings(plan, base)
    for name in target_parameters(settings, base):
        if others := [p for p in base.parameters if p.endswith(f".{name}") and p not in settings]:
            yield f"to adapt {name!r} PEFT would adapt {', '.join(others)} too"
