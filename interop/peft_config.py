"""adapter_config.json: what PEFT does with it, and how a plan is written as one."""

import json
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from interop.keymaps import Keymap, module_name
from lora_jax.errors import InputError
from lora_jax.manifest import read_small_json
from lora_jax.site import Plan, Site


class PeftConfig(NamedTuple):
    """The part of an adapter_config.json that decides which function is computed."""

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int] | None
    alpha_pattern: Mapping[str, float] | None
    target_modules: str | Sequence[str]
    exclude_modules: str | Sequence[str] | None


class Setting(NamedTuple):
    """What an adapter is on one module: its rank, and alpha/rank or alpha/√rank."""

    rank: int
    scale: float


def adapted_modules(config: PeftConfig, modules: Sequence[str]) -> dict[str, Setting]:
    """The modules on which PEFT puts an adapter, each with its rank and scale.

    A pattern of targets matches the whole name, an item of a list its last parts; of rank and
    alpha patterns the first in the order of the file decides.

    Raises:
      InputError: patterns that can't be matched in bounded time.

    >>> config = PeftConfig(8, 16, False, None, {"k_proj": 4}, ["k_proj", "v_proj"], None)
    >>> adapted_modules(config, ["layers.0.k_proj", "layers.0.v_proj", "layers.0.o_proj"])
    {'layers.0.k_proj': Setting(rank=8, scale=0.5), 'layers.0.v_proj': Setting(rank=8, scale=2.0)}
    """
    matches = _matched(_patterns(config), modules)

    def named(names: str | Sequence[str] | None, module: str) -> bool:
        if isinstance(names, str):
            return module in matches[names]
        return any(f".{module}".endswith(f".{name}") for name in names or ())

    def first(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
        values = (patterns or {}).items()
        return next((v for key, v in values if module in matches[_after_dot(key)]), default)

    def setting(module: str) -> Setting:
        rank = first(config.rank_pattern, module, config.r)
        alpha = first(config.alpha_pattern, module, config.lora_alpha)
        return Setting(rank, alpha / (math.sqrt(rank) if config.use_rslora else rank))

    targeted = (module for module in modules if named(config.target_modules, module))
    return {m: setting(m) for m in targeted if not named(config.exclude_modules, m)}


def read_config(path: Path) -> PeftConfig:
    """Read an adapter_config.json, from whomever it came.

    Raises:
      InputError: naming every key that is out of range, unknown, or changes the function in a
        way that is not represented here, with its value.
    """
    raw = read_small_json(path)
    if problems := list(_problems(raw)):
        raise InputError(f"{path} can't be used: " + "; ".join(problems))
    return _from(raw)


def config_of(
    plan: Plan, keymap: Keymap, base_model_name: str | None, revision: str | None
) -> dict[str, Any]:
    """The adapter_config.json of a plan whose sites are linear layers of ``keymap``.

    It holds only keys that every PEFT since 0.5 knows, so that none of them warns. Sites whose
    rank or alpha differs from the most common one get an anchored pattern.
    """
    ranks = {_anchored(site.path, keymap): site.rank for site in plan.sites}
    alphas = {_anchored(site.path, keymap): _alpha(site) for site in plan.sites}
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    return {
        "alpha_pattern": {key: value for key, value in alphas.items() if value != alpha},
        "auto_mapping": None,
        "base_model_name_or_path": base_model_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {key: value for key, value in ranks.items() if value != rank},
        "revision": revision,
        "target_modules": _target_modules(plan, keymap),
        "task_type": "CAUSAL_LM",
    }


def module_names(site: Site, keymap: Keymap) -> list[str]:
    """The torch modules of a site, in the order of its layers."""
    layers = range(site.shape[0]) if site.axes("stack") else [None]
    return [module_name(site.path, keymap, layer) for layer in layers]


class _Field(NamedTuple):
    """A key that decides the function: PEFT's default, and which values are read here."""

    default: Any
    fits: Callable[[Any], bool]
    expected: str


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= sys.float_info.max


def _is_patterns(value: Any, fits: Callable[[Any], bool]) -> bool:
    return value is None or (isinstance(value, dict) and all(map(fits, value.values())))


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and {*map(type, value)} <= {str})


_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")

_FIELDS = {
    "peft_type": _Field(None, lambda value: value == "LORA", "'LORA'"),
    "r": _Field(8, _is_rank, "an integer of at least 1"),
    "lora_alpha": _Field(8, _is_alpha, "a positive finite number"),
    "use_rslora": _Field(False, lambda value: type(value) is bool, "true or false"),
    "rank_pattern": _Field(
        None, lambda value: _is_patterns(value, _is_rank), "{pattern: integer of at least 1}"
    ),
    "alpha_pattern": _Field(
        None, lambda value: _is_patterns(value, _is_alpha), "{pattern: positive finite number}"
    ),
    "target_modules": _Field(
        None, lambda value: bool(value) and _is_names(value), "module names or a pattern"
    ),
    "exclude_modules": _Field(
        None, lambda value: not value or _is_names(value), "module names or a pattern"
    ),
    "bias": _Field("none", lambda value: value == "none", "'none': bias training isn't supported"),
    "init_lora_weights": _Field(
        True,
        lambda value: value in _PLAIN_INITS,
        f"one of {_PLAIN_INITS}; others change the base: have PEFT convert it to a plain LoRA "
        "(save_pretrained with path_initial_model_for_weight_conversion)",
    ),
}

_HARMLESS = frozenset(
    (
        "auto_mapping",
        "base_model_name_or_path",
        "eva_config",  # the initial A only
        "fan_in_fan_out",  # PEFT corrects it by the type of each module
        "inference_mode",
        "loftq_config",  # used with init_lora_weights="loftq" only, which is refused
        "lora_dropout",  # training only
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    )
)

_UNSUPPORTED = {
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "corda_config": "CorDA, which changes the base",
    "ensure_weight_tying": "adapters on tied embeddings",
    "kasa_config": "KaSA, which changes the base",
    "layer_replication": "a base with repeated layers",
    "layers_pattern": "adapters on some layers only",
    "layers_to_transform": "adapters on some layers only",
    "lora_bias": "a bias on B",
    "lora_ga_config": "LoRA-GA, which changes the base",
    "megatron_config": "tensor-parallel layers",
    "modules_to_save": "modules trained whole",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "adapters on bare parameters",
    "trainable_token_indices": "trained token rows",
    "use_bdlora": "block-diagonal LoRA",
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "velora_config": "VeLoRA",
}


def _problems(raw: Mapping[str, Any]) -> Iterator[str]:
    wrong = {
        key: field.expected
        for key, field in _FIELDS.items()
        if not field.fits(raw.get(key, field.default))
    }
    for key, expected in wrong.items():
        yield f"{key} is {raw.get(key)!r}, expected {expected}"
    for key in sorted(key for key in set(raw) - set(_FIELDS) - _HARMLESS if raw[key]):
        kind = _UNSUPPORTED.get(key)
        reason = f"not supported: {kind}" if kind else "a key that is not known here"
        yield f"{key} is {raw[key]!r}, {reason}"
    if not wrong:
        yield from filter(None, map(_pattern_problem, _patterns(_from(raw))))


def _from(raw: Mapping[str, Any]) -> PeftConfig:
    return PeftConfig(**{key: raw.get(key, _FIELDS[key].default) for key in PeftConfig._fields})


def _patterns(config: PeftConfig) -> list[str]:
    """Every regular expression of the config, such that PEFT matches whole names with it."""
    keys = (*(config.rank_pattern or ()), *(config.alpha_pattern or ()))
    names = (config.target_modules, config.exclude_modules)
    return [*map(_after_dot, keys), *(name for name in names if name and isinstance(name, str))]


def _after_dot(key: str) -> str:
    return rf"(.*\.)?({key})$"


def _pattern_problem(pattern: str) -> str | None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"pattern {pattern[:80]!r} is not a regular expression: {error}"
    return None


_MATCH_ALL = """
import json, re, sys
patterns, names = json.load(sys.stdin)
json.dump([[n for n in names if re.fullmatch(p, n)] for p in patterns], sys.stdout)
"""
_MATCHING_SECONDS = 5


def _matched(patterns: Sequence[str], names: Sequence[str]) -> dict[str, set[str]]:
    """The names that each pattern matches whole.

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
            f"{', '.join(repr(pattern[:80]) for pattern in patterns)}; list the module names"
        ) from error
    return dict(zip(patterns, map(set, json.loads(done.stdout)), strict=True))


def _anchored(path: str, keymap: Keymap) -> str:
    """A pattern for the modules of one leaf, which the order of patterns can't make ambiguous."""
    return "^" + re.escape(_template(path, keymap)).replace(re.escape("{i}"), r"\d+")


def _template(path: str, keymap: Keymap) -> str:
    name = next(rule.name for rule in keymap.rules if rule.path == path)
    return name.removesuffix(".weight")


def _alpha(site: Site) -> float:
    """The shortest alpha with alpha/rank == scale, where one exists, else the nearest."""
    product = site.scale * site.rank
    shortest = float(f"{product:.15g}")
    around = (product, math.nextafter(product, 0), math.nextafter(product, math.inf))
    alpha = next((x for x in (shortest, *around) if x / site.rank == site.scale), shortest)
    return int(alpha) if alpha.is_integer() else alpha


def _most_common(values: Iterable[Any]) -> Any:
    counts = Counter(values)
    return max(sorted(counts), key=counts.__getitem__)


def _target_modules(plan: Plan, keymap: Keymap) -> list[str]:
    """Last parts of names, as vLLM wants them, where they match nothing else; else full names."""
    modules = {rule.name.rpartition(".")[0] for rule in keymap.rules}
    adapted = {_template(path, keymap) for path in plan}
    taken = {module.split(".")[-1] for module in modules - adapted}
    taken |= {parent for module in modules for parent in module.split(".")[:-1]}
    suffixes = {module.split(".")[-1] for module in adapted}
    if suffixes & taken:
        return sorted(name for site in plan.sites for name in module_names(site, keymap))
    return sorted(suffixes)
