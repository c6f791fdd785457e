"""Stacked experts in a PEFT file without its model: which tensors are which parameter's.

Of several adapted parameters of a module each has a layer around those before it, and their own
names are in the config alone::

    mlp.experts.base_layer.lora_A.weight    the first, gate_up_proj
    mlp.experts.lora_A.weight               the last, down_proj
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import permutations

import numpy as np

from interop.peft_matching import PeftConfig, Setting, adapted_modules, settings_by_patterns
from interop.peft_patterns import endings, is_named

WRAPPED = ".base_layer"
_NESTED_AT_MOST = 4
"""Parameters of one module, which transformers' experts have two of."""


def experts_of(config: PeftConfig, names: Iterable[str]) -> Iterator[str]:
    """The modules that hold a parameter which ``target_parameters`` name.

    Without its module's name in front a parameter can be any module's that is no target itself.
    """
    plain = {name: name.replace(WRAPPED, "") for name in names}
    holders = {parameter.rpartition(".")[0] for parameter in config.target_parameters or ()}
    targets = adapted_modules(config, [*plain.values()]) if "" in holders else {}
    for name, module in plain.items():
        if is_named(module, holders) or ("" in holders and module not in targets):
            yield name


def file_settings(
    config: PeftConfig, pairs: Mapping[str, Mapping[str, np.ndarray]], experts: Collection[str]
) -> dict[str, Setting]:
    """Rank and scale that the config gives each module, whether it is a target or not.

    Of parameters by their own names, which patterns go by.
    """
    plain = {name: name.replace(WRAPPED, "") for name in pairs}
    inside_out: dict[str, list[str]] = defaultdict(list)
    for name in sorted(experts, key=len, reverse=True):
        inside_out[plain[name]].append(name)
    parameters = _parameters(config, inside_out)
    of_parameters = (own for each in parameters.values() for own in each)
    found = settings_by_patterns(config, [*plain.values(), *of_parameters])
    settings = {name: found[module] for name, module in plain.items()}
    for module, own in parameters.items():
        rows = {name: _rows(pairs[name]) for name in inside_out[module]}
        settings |= _shared_out(rows, [found[name] for name in own])
    return settings


def _rows(found: Mapping[str, np.ndarray]) -> int:
    return next(iter(found["a"].shape), 0) if "a" in found else 0


def _parameters(config: PeftConfig, modules: Iterable[str]) -> dict[str, list[str]]:
    """The parameters of each module that ``target_parameters`` name, the last letters first.

    Their order in the module is not in the file; this is that of ``gate_up_proj``, ``down_proj``.
    """
    by_holder: dict[str, set[str]] = defaultdict(set)
    for name in config.target_parameters or ():
        holder, _, own = name.rpartition(".")
        by_holder[holder].add(own)
    found = {}
    for module in modules:
        named = [by_holder[end] for end in ("", *endings(module)) if end in by_holder]
        few = named if sum(map(len, named)) <= _NESTED_AT_MOST else []
        found[module] = [f"{module}.{own}" for own in sorted(set().union(*few), reverse=True)]
    return found


def _shared_out(rows: Mapping[str, int], settings: Sequence[Setting]) -> dict[str, Setting]:
    """Which setting is whose, by the rows of A: all parameters have as many experts.

    >>> narrow, wide = Setting(2, 1.5), Setting(4, 1.5)
    >>> _shared_out({"experts.base_layer": 12, "experts": 6}, [narrow, wide])
    {'experts.base_layer': Setting(rank=4, scale=1.5), 'experts': Setting(rank=2, scale=1.5)}
    """
    if len(rows) != len(settings):
        return {}
    for order in permutations(settings):
        counts = {divmod(count, its.rank) for count, its in zip(rows.values(), order, strict=True)}
        if len(counts) == 1 and not next(iter(counts))[1]:
            return dict(zip(rows, order, strict=True))
    return {}


def untold_scales(config: PeftConfig, experts: Iterable[str]) -> Iterator[str]:
    """Parameters that the file's shapes don't tell apart, though their scales differ."""
    modules = sorted({name.replace(WRAPPED, "") for name in experts})
    own = _parameters(config, modules)
    found = settings_by_patterns(config, [name for names in own.values() for name in names])
    for module, names in own.items():
        scales = {found[name].scale for name in names}
        if len({found[name].rank for name in names}) == 1 < len(scales):
            yield f"{module}: taken to have {', '.join(names)} in this order, by which scales go"
