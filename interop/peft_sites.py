"""What a PEFT config means on a model: which leaves are adapted, which trained whole, and how."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from interop.keymaps import Index, indices
from interop.peft_claims import Claims, claim_problems
from interop.peft_config import REBASED_INITS
from interop.peft_matching import (
    PeftConfig,
    Setting,
    adapted_modules,
    saved_tensors,
    shown,
)
from interop.peft_modules import PARAMETERS, Base, roles_of, saved_module, smaller_side
from lora_jax.site import Site


def claims_of(config: PeftConfig, base: Base) -> tuple[Claims, list[str]]:
    """What a config means on a model, by PEFT's own matching, and all of it that doesn't fit."""
    found = adapted_modules(config, [*base.modules], [*base.parameters])
    found = _without_tied(_with_projections(_by_target(found, base), base), config, base)
    where = {**base.parameters, **base.modules}
    settings = {name: s for name, s in found.items() if _is_adaptable(where[name][0], base)}
    if config.init_lora_weights in REBASED_INITS:
        settings = {name: _bounded(s, where[name][0], base) for name, s in settings.items()}
    saved = saved_tensors(config, [*base.tensors]) | _biases(config, settings, base)
    claims = Claims(
        settings,
        _by_leaf({where[name]: setting for name, setting in settings.items()}),
        _by_leaf({base.tensors[name]: None for name in saved}),
        {path: {(): tokens} for path, tokens in _rows(config, base).items()},
        _by_leaf({base.tensors[n]: s for n, s in _lora_biases(config, settings, base).items()}),
    )
    problems = [
        *_target_problems(config, found, where, base),
        *_row_problems(config, base),
        *_part_problems(saved, base),
        *claim_problems(config, claims, base),
        *_bias_problems(config, settings, base),
    ]
    return claims, problems


def sites_of(claims: Claims, use_dora: bool, base: Base) -> tuple[Site, ...]:
    """The sites of an adapter, in the order of the parameter tree."""
    return tuple(site for path in base.leaves for site in _sites(path, claims, use_dora, base))


def _sites(path: str, claims: Claims, use_dora: bool, base: Base) -> Iterator[Site]:
    leaf = base.leaves[path]
    site = Site(path, tuple(leaf.shape), np.dtype(leaf.dtype).name, (), 0, 1.0, variant="full")
    if found := claims.pair.get(path):
        yield _pair_site(site, found, "dora" if use_dora else "lora", base)
    elif path in claims.full:
        yield site
    elif found := claims.rows.get(path):
        rows, roles = found[()], ("in", "out")
        yield replace(site, roles=roles, rank=len(rows), variant="rows", rows=rows)
    elif found := claims.bias.get(path):
        scales = [found.get(index, 0.0) for index in indices(base.rules[path], site.shape)]
        scale = tuple(scales) if len(set(scales)) > 1 else scales[0]
        yield replace(site, scale=scale, variant="bias")


def _pair_site(site: Site, found: Mapping[Index, Setting], variant: str, base: Base) -> Site:
    """One site of all layers; those without an adapter have rank 0."""
    rule = base.rules[site.path]
    by_layer = {index[:1]: setting for index, setting in found.items()}
    layers = [*np.ndindex(site.shape[: min(rule.stack, 1)])]
    each = [by_layer.get(layer, Setting(0, 0.0)) for layer in layers]
    ranks, scales = zip(*each, strict=True)
    distinct = {setting.scale for setting in found.values()}
    return replace(
        site,
        roles=roles_of(rule, site.shape),
        rank=max(ranks),
        scale=distinct.pop() if len(distinct) == 1 else scales,
        ranks=ranks if len(set(ranks)) > 1 else (),
        variant=variant,
    )


def _by_leaf(found: Mapping[tuple[str, Index], Any]) -> dict[str, dict[Index, Any]]:
    grouped: dict[str, dict[Index, Any]] = defaultdict(dict)
    for (path, index), value in found.items():
        grouped[path][index] = value
    return dict(grouped)


def _by_target(found: Mapping[str, Setting], base: Base) -> dict[str, Setting]:
    """A linear layer's weight that was named as a parameter is that layer's, by its keys too."""
    return {
        saved_module(name) if name in base.parameters and _is_module(name, base) else name: setting
        for name, setting in found.items()
    }


def _is_module(parameter: str, base: Base) -> bool:
    return base.rules[base.parameters[parameter][0]].kind not in PARAMETERS


def _with_projections(found: Mapping[str, Setting], base: Base) -> dict[str, Setting]:
    """With the output projection of every attention, which PEFT adapts at the attention's rank."""
    attentions = ((name, s) for name, s in found.items() if name in base.attentions)
    return {**found, **{f"{name}.out_proj": setting for name, setting in attentions}}


def _without_tied(
    settings: Mapping[str, Setting], config: PeftConfig, base: Base
) -> dict[str, Setting]:
    """Without modules that only repeat an adapted table, as PEFT ties them."""
    tied = {
        copy
        for name in settings
        if config.ensure_weight_tying and name in base.modules
        for copy in base.tied_modules(base.modules[name][0])
    }
    return {name: setting for name, setting in settings.items() if name not in tied}


def _biases(config: PeftConfig, settings: Mapping[str, Setting], base: Base) -> set[str]:
    biases = {name for name in base.tensors if name.endswith(".bias")}
    of_adapted = {name for name in biases if saved_module(name) in settings}
    return {"none": set(), "lora_only": of_adapted, "all": biases}[config.bias]


def _lora_biases(
    config: PeftConfig, settings: Mapping[str, Setting], base: Base
) -> dict[str, float]:
    """By bias of the base: the scale of what the bias on B adds to it."""
    named = ((f"{name}.bias", s.scale) for name, s in settings.items() if config.lora_bias)
    return {bias: scale for bias, scale in named if bias in base.tensors}


def _bias_problems(
    config: PeftConfig, settings: Mapping[str, Setting], base: Base
) -> Iterator[str]:
    for name in settings if config.lora_bias else ():
        if name not in base.modules or base.kind(base.modules[name][0]) == "embedding":
            yield f"lora_bias is true, but {name!r} has no bias on B in PEFT"
        elif name in base.attentions or saved_module(name) in base.attentions:
            yield f"lora_bias is true, and PEFT leaves it out of the attention of {name!r}"
        elif f"{name}.bias" not in base.tensors:
            yield (
                f"lora_bias adds a bias to {name!r}, which has none here to add it to: give the "
                "base a bias of zeros there"
            )


def _row_targets(config: PeftConfig, base: Base) -> dict[str, tuple[list[str], Sequence[int]]]:
    """By name in the config: the modules that it means, and their tokens."""
    tables = [name for name, (path, _) in base.modules.items() if base.kind(path) == "embedding"]
    tokens = config.trainable_token_indices or {}
    named = tokens if isinstance(tokens, Mapping) else dict.fromkeys(tables[:1], tokens)
    return {
        name: ([module for module in base.modules if module.endswith(name)], rows)
        for name, rows in named.items()
    }


def _rows(config: PeftConfig, base: Base) -> dict[str, tuple[int, ...]]:
    found = (
        (base.modules[module][0], tuple(tokens))
        for modules, tokens in _row_targets(config, base).values()
        for module in modules
    )
    return {p: t for p, t in found if base.kind(p) == "embedding" and p in base.leaves}


def _row_problems(config: PeftConfig, base: Base) -> Iterator[str]:
    for name, (modules, tokens) in _row_targets(config, base).items():
        tables = [m for m in modules if base.kind(base.modules[m][0]) == "embedding"]
        if not modules or tables != modules:
            yield f"trainable_token_indices name {name!r}, which is no embedding table of it"
        for module in tables:
            path = base.modules[module][0]
            rows = getattr(base.leaves.get(path), "shape", (0,))[0]
            if outside := [token for token in tokens if token >= rows]:
                yield (
                    f"trainable_token_indices {shown(outside)} are outside the {rows} rows of "
                    f"{module!r}"
                )
            if base.rules[path].order not in ((), (0, 1)):
                yield f"trainable_token_indices name {module!r}, whose leaf has no row for a token"


def _target_problems(
    config: PeftConfig, found: Mapping[str, Setting], where: Mapping[str, Any], base: Base
) -> Iterator[str]:
    if not found:
        yield (
            f"target_modules {shown(config.target_modules)} name no module of it"
            if config.target_modules
            else f"target_parameters {shown(config.target_parameters)} name no parameter of it"
        )
    for name in found:
        path, _ = where[name]
        if path not in base.leaves:
            yield f"target {name!r} has no leaf {path!r} in this model"
        elif len(base.parts[path]) > 1:
            yield f"target {name!r} is one of several in the leaf {path!r}, which has one adapter"
        elif base.kind(path) is None:
            yield f"target {name!r} is not a linear layer or an embedding"


def _bounded(setting: Setting, path: str, base: Base) -> Setting:
    """With no more ranks than its weight has, which PiSSA and OLoRA start from; PEFT takes the
    scale from the rank of the config all the same."""
    if base.kind(path) not in ("linear", "linear_in_out"):
        return setting
    return setting._replace(
        rank=min(setting.rank, smaller_side(base.rules[path], base.leaves[path].shape))
    )


def _is_adaptable(path: str, base: Base) -> bool:
    return path in base.leaves and base.kind(path) is not None


def _part_problems(saved: Collection[str], base: Base) -> Iterator[str]:
    paths = {base.tensors[name][0] for name in saved}
    for path in sorted(path for path in paths if len(base.parts[path]) > 1):
        own = {name for name, (its, _) in base.tensors.items() if its == path}
        if left := sorted(own - {*saved}):
            yield f"{path!r} is trained whole but for {', '.join(left)}, expected all of it or none"
