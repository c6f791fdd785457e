"""Which modules PEFT adapts, at which rank and scale, and which it trains whole."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lora_jax.errors import InputError


class PeftConfig(NamedTuple):
    """The part of an adapter_config.json that decides which function is computed."""

    r: int
    lora_alpha: float
    target_modules: str | Sequence[str]
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


class Setting(NamedTuple):
    """What an adapter is on one module: its rank, and alpha/rank or alpha/√rank."""

    rank: int
    scale: float


class Pattern(NamedTuple):
    """A regular expression of the config, matched with whole names or with their beginnings."""

    text: str
    whole: bool = False


def adapted_modules(config: PeftConfig, modules: Sequence[str]) -> dict[str, Setting]:
    """The modules on which PEFT puts an adapter, each with its rank and scale.

    A pattern of targets matches the whole name, an item of a list its last parts; of rank and
    alpha patterns the first in the order of the file decides. A list's items count in the layers
    of ``layers_to_transform`` alone, unless one is the whole name.

    Raises:
      InputError: patterns that can't be matched in bounded time.

    >>> config = PeftConfig(8, 16, ["k_proj", "v_proj"], alpha_pattern={"k_proj": 4})
    >>> adapted_modules(config, ["layers.0.k_proj", "layers.0.v_proj", "layers.0.o_proj"])
    {'layers.0.k_proj': Setting(rank=8, scale=0.5), 'layers.0.v_proj': Setting(rank=8, scale=2.0)}
    """
    matches = _matched(patterns_of(config), modules)

    def first(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
        values = (patterns or {}).items()
        return next((v for key, v in values if module in matches[_after_dot(key)]), default)

    def setting(module: str) -> Setting:
        rank = first(config.rank_pattern, module, config.r)
        alpha = first(config.alpha_pattern, module, config.lora_alpha)
        return Setting(rank, alpha / (math.sqrt(rank) if config.use_rslora else rank))

    def left_alone(module: str) -> bool:
        saved = config.modules_to_save or ()
        return _named(config.exclude_modules, module, matches) or any(
            module in matches[_at_or_below(name)] for name in saved
        )

    def targeted(module: str) -> bool:
        found = _named(config.target_modules, module, matches)
        return found and (module in config.target_modules or _in_layers(config, module, matches))

    return {m: setting(m) for m in modules if targeted(m) and not left_alone(m)}


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


def _named(names: Any, module: str, matches: Mapping[Pattern, Mapping[str, Any]]) -> bool:
    if isinstance(names, str):
        return bool(names) and module in matches[Pattern(names, whole=True)]
    return any(f".{module}".endswith(f".{name}") for name in names or ())


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


def pattern_problems(config: PeftConfig) -> Iterator[str]:
    """What is no regular expression where the config needs one."""
    for pattern in patterns_of(config):
        try:
            re.compile(pattern.text)
        except (re.error, RecursionError, OverflowError) as error:
            yield f"pattern {pattern.text[:80]!r} is not a regular expression: {error}"


def _after_dot(key: str) -> Pattern:
    return Pattern(rf"(.*\.)?({key})$")


def _at_or_below(module: str) -> Pattern:
    return Pattern(rf"(^|.*\.){module}($|\..*)")


_MATCH_ALL = """
import json, re, sys
patterns, names = json.load(sys.stdin)
def indices(pattern, whole):
    match = re.compile(pattern).fullmatch if whole else re.compile(pattern).match
    return {n: m.groupdict().get("idx") for n in names if (m := match(n))}
json.dump([indices(*pattern) for pattern in patterns], sys.stdout)
"""
_MATCHING_SECONDS = 5


def _matched(
    patterns: Sequence[Pattern], names: Sequence[str]
) -> dict[Pattern, dict[str, str | None]]:
    """The names that each pattern matches, with what its group ``idx`` found there.

    Patterns come from files of strangers, and some take exponential time, which Python can't
    interrupt from within: so they run in a process of their own.
    """
    if not patterns:
        return {}
    command = [sys.executable, "-I", "-S", "-c", _MATCH_ALL]
    question = json.dumps([patterns, names])
    try:
        done = subprocess.run(
            command,
            input=question,
            capture_output=True,
            text=True,
            timeout=_MATCHING_SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(
            f"patterns that take over {_MATCHING_SECONDS} s to match: "
            f"{', '.join(repr(pattern.text[:80]) for pattern in patterns)}; list the module names"
        ) from error
    return dict(zip(patterns, json.loads(done.stdout), strict=True))
