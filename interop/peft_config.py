"""Reading adapter_config.json: which values of which keys are understood."""

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from interop.peft_matching import PeftConfig, shown
from lora_jax.errors import InputError
from lora_jax.manifest import read_small_json


def read_config(path: Path) -> PeftConfig:
    """Read an adapter_config.json, from whomever it came.

    Raises:
      InputError: naming every key that is out of range, unknown, or changes the function in a
        way that is not represented here, with its value.
    """
    raw = read_small_json(path)
    if found := list(problems(raw)):
        raise InputError(f"{path} can't be used: " + "; ".join(found))
    return config_of(raw)


class _Field(NamedTuple):
    """A key that decides the function: PEFT's default, and which values are read here."""

    default: Any
    fits: Callable[[Any], bool]
    expected: str


def _is_index(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def is_rank(value: Any) -> bool:
    """Whether it is an integer that ranks can be."""
    return _is_index(value) and value > 0


def is_finite(value: Any) -> bool:
    """Whether it is a number that float64 holds, as not every integer is.

    >>> is_finite(-1), is_finite(10**400), is_finite(True)
    (True, False, False)
    """
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def is_alpha(value: Any) -> bool:
    """Whether it is a number that PEFT's alphas can be."""
    return is_finite(value) and value > 0


def _is_patterns(value: Any, fits: Callable[[Any], bool]) -> bool:
    return value is None or (isinstance(value, dict) and all(map(fits, value.values())))


def _is_list(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(fits, value))


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _is_names(value: Any) -> bool:
    return _is_name(value) or _is_list(value, _is_name)


def _is_rows(value: Any) -> bool:
    return _is_list(value, _is_index) and 0 < len(value) == len(set(value))


def _is_flag(value: Any) -> bool:
    return type(value) is bool


def initialiser(value: Any) -> Any:
    """What PEFT takes ``init_lora_weights`` for: some words in any case, nothing for false.

    >>> initialiser("OLoRA"), initialiser("PiSSA"), initialiser(None)
    ('olora', 'PiSSA', False)
    """
    word = str(value).lower()
    return word if word in _IN_ANY_CASE else value or False


_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
REBASED_INITS = ("pissa", "olora")
"""Initialisers that take their first update off the base, as can be done again from its values."""
_IN_ANY_CASE = ("gaussian", "olora", "mica")
_BIASES = ("none", "all", "lora_only")
_FLAG = _Field(False, _is_flag, "true or false")

_FIELDS = {
    "peft_type": _Field(None, lambda value: value == "LORA", "'LORA'"),
    "r": _Field(8, is_rank, "an integer of at least 1"),
    "lora_alpha": _Field(8, is_alpha, "a positive finite number"),
    "use_rslora": _FLAG,
    "use_dora": _FLAG,
    "ensure_weight_tying": _FLAG,
    "lora_bias": _FLAG,
    "peft_version": _Field(None, lambda value: value is None or _is_name(value), "a version"),
    "rank_pattern": _Field(
        None, lambda value: _is_patterns(value, is_rank), "{pattern: integer of at least 1}"
    ),
    "alpha_pattern": _Field(
        None, lambda value: _is_patterns(value, is_alpha), "{pattern: positive finite number}"
    ),
    "target_modules": _Field(
        None, lambda value: not value or _is_names(value), "module names or a pattern"
    ),
    "target_parameters": _Field(
        None, lambda value: not value or _is_list(value, _is_name), "a list of parameter names"
    ),
    "exclude_modules": _Field(
        None, lambda value: not value or _is_names(value), "module names or a pattern"
    ),
    "layers_to_transform": _Field(
        None,
        lambda value: value is None or _is_index(value) or _is_list(value, _is_index),
        "a layer or a list of layers",
    ),
    "layers_pattern": _Field(
        None, lambda value: not value or _is_names(value), "a name or a list of names"
    ),
    "modules_to_save": _Field(
        None, lambda value: not value or _is_list(value, _is_name), "a list of module names"
    ),
    "trainable_token_indices": _Field(
        None,
        lambda value: (
            not value
            or _is_rows(value)
            or (isinstance(value, dict) and all(map(_is_rows, value.values())))
        ),
        "a list of different tokens, or {module: such a list}",
    ),
    "bias": _Field("none", lambda value: value in _BIASES, f"one of {_BIASES}"),
    "init_lora_weights": _Field(
        True,
        lambda value: initialiser(value) in (*_PLAIN_INITS, *REBASED_INITS),
        f"one of {(*_PLAIN_INITS, *REBASED_INITS)}; others change the base in a way that its "
        "values don't tell: have PEFT convert it to a plain LoRA (save_pretrained with "
        "path_initial_model_for_weight_conversion)",
    ),
}

_HARMLESS = frozenset(
    (
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",  # as loftq_config
        "eva_config",  # the initial A only
        "fan_in_fan_out",  # PEFT corrects it by the type of each module
        "inference_mode",
        "loftq_config",  # used with init_lora_weights="loftq" only, which is refused
        "lora_dropout",  # training only
        "lora_ga_config",  # as loftq_config
        "megatron_core",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    )
)

_UNSUPPORTED = {
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA, which changes the base",
    "layer_replication": "a base with repeated layers",
    "megatron_config": "tensor-parallel layers",
    "monteclora_config": "MonteCLoRA",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
    "velora_config": "VeLoRA",
}


def problems(raw: Mapping[str, Any]) -> Iterator[str]:
    """What keeps a config from being used: a line for every key, with its value."""
    wrong = {
        key: field.expected
        for key, field in _FIELDS.items()
        if not field.fits(raw.get(key, field.default))
    }
    for key, expected in wrong.items():
        yield f"{key} is {shown(raw.get(key))}, expected {expected}"
    for key in sorted(key for key in set(raw) - set(_FIELDS) - _HARMLESS if raw[key]):
        kind = _UNSUPPORTED.get(key)
        reason = f"not supported: {kind}" if kind else "a key that is not known here"
        yield f"{shown(key)[1:-1]} is {shown(raw[key])}, {reason}"
    if not wrong:
        yield from _contradictions(config_of(raw))


def _contradictions(config: PeftConfig) -> Iterator[str]:
    """What PEFT itself refuses, or has no meaning."""
    if not config.target_modules and not config.target_parameters:
        yield "target_modules is empty, expected module names or a pattern"
    if config.lora_bias and config.use_dora:
        yield "lora_bias and use_dora are both true, of which PEFT has one"
    if config.lora_bias and config.init_lora_weights not in (True, False):
        yield f"lora_bias is true with init_lora_weights {config.init_lora_weights!r}"
    for key in ("layers_to_transform", "layers_pattern"):
        if getattr(config, key) is not None and isinstance(config.target_modules, str):
            yield f"{key} is given, but target_modules is a pattern: name the modules in a list"
    if config.layers_pattern and config.layers_to_transform is None:
        yield f"layers_pattern is {shown(config.layers_pattern)} without layers_to_transform"


def config_of(raw: Mapping[str, Any]) -> PeftConfig:
    """A config without `problems`, PEFT's defaults for what it leaves out."""
    said = {key: raw.get(key, _FIELDS[key].default) for key in PeftConfig._fields}
    return PeftConfig(**{**said, "init_lora_weights": initialiser(said["init_lora_weights"])})
