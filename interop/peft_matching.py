"""Which modules PEFT adapts, at which rank and scale, and which it trains whole."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from interop.peft_patterns import Pattern, is_named, matched


class PeftConfig(NamedTuple):
    """The part of an adapter_config.json that decides which function is computed."""

    r: int
    lora_alpha: float
    target_modules: str | Sequence[str] | None
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    bias: str = "none"
    use_dora: bool = False
    ensure_weight_tying: bool = False
    lora_bias: bool = False
    target_parameters: Sequence[str] | None = None
    init_lora_weights: bool | str = True
    peft_version: str | None = None


class Setting(NamedTuple):
    """What an adapter is on one module: its rank, and alpha/rank or alpha/√rank."""

    rank: int
    scale: float


def adapted_modules(
    config: PeftConfig, modules: Sequence[str], parameters: Sequence[str] = ()
) -> dict[str, Setting]:
    """The modules and parameters on which PEFT puts an adapter, each with its rank and scale.

    A pattern of targets matches the whole name, an item of a list its last parts; of rank and
    alpha patterns the first in the order of the file decides. A list's items count in the layers
    of ``layers_to_transform`` alone, unless one is the whole name.

    Raises:
      InputError: naming what is no regular expression, or what can't be matched in bounded time.

    >>> config = PeftConfig(8, 16, ["k_proj", "v_proj"], alpha_pattern={"k_proj": 4})
    >>> adapted_modules(config, ["layers.0.k_proj", "layers.0.v_proj", "layers.0.o_proj"])
    {'layers.0.k_proj': Setting(rank=8, scale=0.5), 'layers.0.v_proj': Setting(rank=8, scale=2.0)}
    """
    matches = matched(patterns_of(config), [*modules, *parameters])
    targets, excluded, bare = map(
        _ends, (config.target_modules, config.exclude_modules, config.target_parameters)
    )

    def first(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
        values = (patterns or {}).items()
        return next((v for key, v in values if module in matches[_after_dot(key)]), default)

    def setting(module: str) -> Setting:
        rank = first(config.rank_pattern, module, config.r)
        alpha = first(config.alpha_pattern, module, config.lora_alpha)
        return Setting(rank, alpha / (math.sqrt(rank) if config.use_rslora else rank))

    def left_alone(module: str) -> bool:
        saved = config.modules_to_save or ()
        return _named(excluded, module, matches) or any(
            module in matches[_at_or_below(name)] for name in saved
        )

    def targeted(module: str) -> bool:
        found = _named(targets, module, matches)
        return found and (module in (targets or ()) or _in_layers(config, module, matches))

    found = [m for m in modules if targeted(m) and not left_alone(m)]
    found += [p for p in parameters if _named(bare, p, matches)]
    return {name: setting(name) for name in found}


def settings_by_patterns(config: PeftConfig, names: Sequence[str]) -> dict[str, Setting]:
    """Rank and scale that the config gives each module, whether it is a target or not.

    >>> settings_by_patterns(PeftConfig(8, 16, ["k_proj"], alpha_pattern={"head": 4}), ["head"])
    {'head': Setting(rank=8, scale=0.5)}
    """
    by_patterns = PeftConfig(
        config.r,
        config.lora_alpha,
        [*names],
        config.use_rslora,
        config.rank_pattern,
        config.alpha_pattern,
    )
    return adapted_modules(by_patterns, [*dict.fromkeys(names)])


def ambiguous_patterns(
    config: PeftConfig, names: Sequence[str]
) -> list[tuple[str, str, list[Any]]]:
    """Where the order of patterns decides: the config's key, the module, the values at stake.

    >>> config = PeftConfig(8, 16, ["k_proj"], rank_pattern={"k_proj": 4, "0.k_proj": 2})
    >>> ambiguous_patterns(config, ["layers.0.k_proj", "layers.1.k_proj"])
    [('rank_pattern', 'layers.0.k_proj', [4, 2])]
    """
    matches = matched(patterns_of(config), names)
    keys = {"rank_pattern": config.rank_pattern or {}, "alpha_pattern": config.alpha_pattern or {}}
    found = [
        (key, name, [v for pattern, v in patterns.items() if name in matches[_after_dot(pattern)]])
        for key, patterns in {key: _unrepeated(its) for key, its in keys.items()}.items()
        for name in names
    ]
    return [each for each in found if len(set(each[2])) > 1]


def _unrepeated(patterns: Mapping[str, Any]) -> dict[str, Any]:
    """Without those that begin with another, anchored one, which comes first in any order.

    >>> _unrepeated({"^a": 2, "^a|^b": 3, "a": 4})
    {'^a': 2, 'a': 4}
    """
    found, anchor = set(), ""
    for key in sorted(patterns):
        if not (anchor and key.startswith(f"{anchor}|")):
            anchor = key if key.startswith("^") else ""
            found.add(key)
    return {key: value for key, value in patterns.items() if key in found}


def patterns_of_no_module(
    config: PeftConfig, modules: Sequence[str], parameters: Sequence[str]
) -> list[str]:
    """Entries of rank_pattern and alpha_pattern that match a parameter and no module.

    >>> config = PeftConfig(8, 16, ["k_proj"], rank_pattern={"up|k_proj": 4, "down": 2})
    >>> patterns_of_no_module(config, ["layers.0.k_proj"], ["experts.up", "experts.down"])
    ['down']
    """
    matches = matched(patterns_of(config), [*modules, *parameters])
    keys = dict.fromkeys((*(config.rank_pattern or ()), *(config.alpha_pattern or ())))
    found = {key: matches[_after_dot(key)] for key in keys}
    of_parameters = [key for key, names in found.items() if not {*parameters}.isdisjoint(names)]
    return [key for key in of_parameters if {*modules}.isdisjoint(found[key])]


def saved_tensors(config: PeftConfig, tensors: Sequence[str]) -> set[str]:
    """The parameters of the modules that PEFT copies and trains whole, by ``modules_to_save``.

    It goes by the end of a module's name, without regard to dots.

    >>> config = PeftConfig(8, 16, ["k_proj"], modules_to_save=["norm"])
    >>> sorted(saved_tensors(config, ["final.norm.weight", "0.input_norm.weight", "head.weight"]))
    ['0.input_norm.weight', 'final.norm.weight']
    """
    names = tuple(config.modules_to_save or ())
    return {t for t in tensors if any(module.endswith(names) for module in _above(t))}


def _above(tensor: str) -> list[str]:
    """Every module that holds the tensor, from the outermost in."""
    parts = tensor.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def shown(value: Any) -> str:
    """The value for a message, cut."""
    text = repr(value)
    return text if len(text) <= _LETTERS_AT_MOST else f"{text[:_LETTERS_AT_MOST]}…"


def _ends(names: Any) -> str | frozenset[str]:
    """A pattern as it is, the items of a list as a set."""
    return names if isinstance(names, str) else frozenset(names or ())


def _named(
    names: str | frozenset[str], module: str, matches: Mapping[Pattern, Mapping[str, Any]]
) -> bool:
    if isinstance(names, str):
        return bool(names) and module in matches[Pattern(names, whole=True)]
    return is_named(module, names)


def _in_layers(config: PeftConfig, module: str, matches: Mapping[Pattern, Any]) -> bool:
    if not (layers := _layers(config)):
        return True
    found = (matches[pattern].get(module) for pattern in _layer_patterns(config))
    index = next((index for index in found if index is not None), None)
    return index is not None and int(index) in layers


def _layers(config: PeftConfig) -> Sequence[int]:
    layers = config.layers_to_transform
    return [layers] if isinstance(layers, int) else layers or ()


def _layer_patterns(config: PeftConfig) -> list[Pattern]:
    names = config.layers_pattern
    if not names:
        return [Pattern(r".*?\.[^.]*\.(?P<idx>\d+)\.")]
    names = [names] if isinstance(names, str) else names
    return [Pattern(rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\.") for name in names]


def patterns_of(config: PeftConfig) -> list[Pattern]:
    """Every regular expression of the config, as PEFT matches module names with it."""
    keys = (*(config.rank_pattern or ()), *(config.alpha_pattern or ()))
    names = (config.target_modules, config.exclude_modules)
    return [
        *map(_after_dot, keys),
        *(Pattern(name, whole=True) for name in names if name and isinstance(name, str)),
        *map(_at_or_below, config.modules_to_save or ()),
        *(_layer_patterns(config) if _layers(config) else ()),
    ]


def _after_dot(key: str) -> Pattern:
    return Pattern(rf"(.*\.)?({key})$")


def _at_or_below(module: str) -> Pattern:
    return Pattern(rf"(^|.*\.){module}($|\..*)")


_LETTERS_AT_MOST = 200
