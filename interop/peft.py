"""PEFT adapter directories <-> (adapter, plan), for linear layers.

A stacked leaf is split into one pair of tensors per layer, and joined again::

    layers/self_attn/q_proj/kernel          base_model.model.model.layers.{i}.self_attn.q_proj
      a (layers, in, rank)             <->    .lora_A.weight (rank, in)
      b (layers, rank, out)                   .lora_B.weight (out, rank)

A directory holds ``adapter_config.json`` and ``adapter_model.safetensors``, as PEFT writes them,
and ``manifest.json`` with the digest of both, which PEFT does not look at and `read` checks.

Source: the format and the matching of https://github.com/huggingface/peft, release 0.21.2.
"""

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from interop import torch_io
from interop.keymaps import Keymap, Rule, module_name
from interop.peft_config import (
    PeftConfig,
    Setting,
    adapted_modules,
    config_of,
    module_names,
    read_config,
)
from lora_jax.adapter import Adapter, LoraPair, check
from lora_jax.errors import InputError
from lora_jax.files import write_text
from lora_jax.manifest import MANIFEST, checked_base, new_or_replaced, to_json, write_manifest
from lora_jax.paths import named_leaves, nearest
from lora_jax.site import Plan, Site

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"

_FILES = (CONFIG, WEIGHTS)
_FLOATS = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)
_NAMED_AT_MOST = 5


class _Module(NamedTuple):
    """Where the weight of a torch module is in the parameter tree."""

    rule: Rule
    layer: int | None


def write(
    directory: str | os.PathLike,
    adapter: Adapter,
    plan: Plan,
    *,
    keymap: Keymap,
    base_model_name: str | None = None,
    revision: str | None = None,
    base: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write an adapter as a directory that PEFT loads; it appears whole or not at all.

    Values are float32. Equal input gives equal bytes.

    Args:
      directory: absent or empty; its parents are made.
      adapter: ``{path: LoraPair(a, b)}``.
      plan: the plan that the adapter was made from.
      keymap: which torch module holds which leaf.
      base_model_name: hub id or directory of the base, for PEFT's auto classes.
      revision: of ``base_model_name``.
      base: JSON values about the base, such as name and digest, for the manifest; `base_of`
        gives them back.
      overwrite: replace a directory in which there is nothing but an adapter from here.

    Raises:
      InputError: naming every site that is not a linear layer of ``keymap`` and every one whose
        values are not finite; or the directory can't be written or holds something.

    >>> import jax, tempfile
    >>> import lora_jax as lora
    >>> from interop.keymaps import LLAMA
    >>> params = {"lm_head": {"kernel": jnp.ones((4, 6))}}
    >>> config = lora.LoraConfig(rank=2, alpha=3, targets="lm_head/kernel")
    >>> plan = lora.plan_from_axes(params, config, {".*": "in out"})
    >>> adapter = lora.init(jax.random.key(0), params, plan)
    >>> directory = Path(tempfile.mkdtemp()) / "adapter"
    >>> write(directory, adapter, plan, keymap=LLAMA)
    >>> sorted(file.name for file in directory.iterdir())
    ['adapter_config.json', 'adapter_model.safetensors', 'manifest.json']
    >>> read(directory, params, keymap=LLAMA)[1]["lm_head/kernel"].scale
    1.5
    """
    check(adapter, plan)
    problems = (*_site_problems(plan, keymap), *_not_finite(adapter))
    _raise_all("this adapter can't be written for PEFT", problems)
    config = config_of(plan, keymap, base_model_name, revision)
    replaceable = (*_FILES, MANIFEST) if overwrite else ()
    with new_or_replaced(Path(directory).absolute(), replaceable) as folder:
        write_text(folder / CONFIG, to_json(config))
        torch_io.write(folder / WEIGHTS, _tensors(adapter, plan, keymap))
        write_manifest(folder, _FILES, base or {})


def require_writable(plan: Plan, *, keymap: Keymap) -> None:
    """Raise one InputError that names every site which PEFT's linear form can't hold.

    It needs no adapter: ask before training rather than after.
    """
    _raise_all("this plan can't be written for PEFT", _site_problems(plan, keymap))


def read(directory: str | os.PathLike, params: Any, *, keymap: Keymap) -> tuple[Adapter, Plan]:
    """Read a PEFT directory for the model whose parameter tree is ``params``.

    ``r``, ``lora_alpha``, ``rank_pattern``, ``alpha_pattern`` and ``use_rslora`` are honoured
    with PEFT's own matching. float16, bfloat16 and float64 tensors become float32, as in PEFT.

    Args:
      directory: holds adapter_config.json and adapter_model.safetensors (or .bin). Where there
        is a manifest.json its digests must hold.
      params: the base parameter tree, arrays or shapes.
      keymap: which torch module holds which leaf.

    Returns:
      The adapter, float32, and its plan, for `lora_jax.adapt` and `lora_jax.merge`.

    Raises:
      InputError: a file that is absent or differs from the manifest; every config key that
        changes the function in a way that is not represented here; or every targeted module and
        every tensor (missing, unexpected, mis-shaped, not floating, not finite) that doesn't fit.
    """
    directory = Path(directory)
    base_of(directory)
    config, tensors = read_config(directory / CONFIG), _read_tensors(directory)
    leaves = named_leaves(params)
    modules = _modules(keymap, leaves)
    settings = adapted_modules(config, [*modules])
    linear = {
        name: modules[name]
        for name in settings
        if modules[name].rule.transposed and modules[name].rule.path in leaves
    }
    _raise_all(
        f"{directory} does not fit the model",
        (
            *_target_problems(config, settings, modules, leaves),
            *_stack_problems(settings, linear, leaves),
            *_tensor_problems(tensors, _expected_shapes(settings, linear, leaves)),
        ),
    )
    names = _by_leaf(linear, leaves)
    sites = tuple(_site(path, leaves[path], settings[names[path][0]]) for path in names)
    adapter = {site.path: _joined(tensors, names[site.path], site) for site in sites}
    return adapter, Plan(sites, sum(math.prod(leaf.shape) for leaf in leaves.values()))


def base_of(directory: str | os.PathLike) -> dict[str, Any]:
    """What `write` was told about the base, from a manifest whose digests hold.

    Returns:
      The dict given as ``base``; empty where there is no manifest, as in PEFT's own directories.

    Raises:
      InputError: the directory or one of its files isn't there, or a file differs from the
        manifest.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory")
    return checked_base(directory, _FILES) if (directory / MANIFEST).exists() else {}


def _site_problems(plan: Plan, keymap: Keymap) -> Iterator[str]:
    if not plan.sites:
        yield "its plan has no sites"
    rules = {rule.path: rule for rule in keymap.rules}
    for site in plan.sites:
        if problem := _site_problem(site, rules):
            yield f"{site.path!r} {problem}"


def _not_finite(adapter: Adapter) -> Iterator[str]:
    for path, pair in adapter.items():
        if not all(np.isfinite(factor).all() for factor in pair):
            yield f"{path!r} holds values that are not finite"


def _site_problem(site: Site, rules: Mapping[str, Rule]) -> str | None:
    rule = rules.get(site.path)
    if rule is None:
        return f"belongs to no known torch module (nearest: {nearest(site.path, rules) or 'none'})"
    if site.variant != "lora" or site.ranks or isinstance(site.scale, tuple):
        kind = f"variant {site.variant!r}" if site.variant != "lora" else "unequal layers"
        return f"has {kind}, which can't be written yet: plan with one rank and scale, or merge"
    if not rule.transposed:
        return "is not the weight of a linear layer; embeddings are not supported yet: exclude it"
    expected = ("stack", "in", "out") if rule.stacked else ("in", "out")
    if site.roles != expected:
        return f"has axis roles {site.roles}, a linear layer here has {expected}"
    if isinstance(site.scale, tuple) or not 0 < site.scale < math.inf:
        return f"has scale {site.scale}, expected a positive finite number"
    return None


def _tensors(adapter: Adapter, plan: Plan, keymap: Keymap) -> dict[str, np.ndarray]:
    tensors = {}
    for site in plan.sites:
        a, b = (_per_layer(factor) for factor in adapter[site.path])
        for layer, module in enumerate(module_names(site, keymap)):
            key_a, key_b = _keys(module)
            tensors |= {key_a: a[layer].T, key_b: b[layer].T}
    return tensors


def _per_layer(factor: Any) -> np.ndarray:
    array = np.asarray(factor, np.float32)
    return array.reshape(-1, *array.shape[-2:])


def _keys(module: str) -> tuple[str, str]:
    prefix = f"base_model.model.{module}"
    return f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"


def _read_tensors(directory: Path) -> torch_io.Tensors:
    """The file that PEFT would take: safetensors before the pickle."""
    pickled = directory / PICKLED_WEIGHTS
    use_pickle = pickled.is_file() and not (directory / WEIGHTS).is_file()
    return torch_io.read(pickled if use_pickle else directory / WEIGHTS)


def _modules(keymap: Keymap, leaves: Mapping[str, Any]) -> dict[str, _Module]:
    """Every module of the torch model that has a weight, layer after layer."""
    stacked = [rule.path for rule in keymap.rules if rule.stacked and rule.path in leaves]
    layers = range(max((leaves[path].shape[0] for path in stacked), default=0))
    return {
        module_name(rule.path, keymap, layer): _Module(rule, layer)
        for rule in keymap.rules
        if rule.name.endswith(".weight")
        for layer in (layers if rule.stacked else [None])
    }


def _by_leaf(modules: Mapping[str, _Module], leaves: Mapping[str, Any]) -> dict[str, list[str]]:
    """The modules of each leaf that has any, in the order of the parameter tree."""
    names = defaultdict(list)
    for name, module in modules.items():
        names[module.rule.path].append(name)
    return {path: names[path] for path in leaves if path in names}


def _target_problems(
    config: PeftConfig,
    settings: Mapping[str, Setting],
    modules: Mapping[str, _Module],
    leaves: Mapping[str, Any],
) -> Iterator[str]:
    if not settings:
        yield f"target_modules {config.target_modules!r} name no module of it"
    for name in settings:
        rule = modules[name].rule
        if rule.path not in leaves:
            yield f"target {name!r} has no leaf {rule.path!r} in this model"
        elif not rule.transposed:
            yield f"target {name!r} is not a linear layer: adapters on it are not supported yet"


def _stack_problems(
    settings: Mapping[str, Setting], linear: Mapping[str, _Module], leaves: Mapping[str, Any]
) -> Iterator[str]:
    for path, names in _by_leaf(linear, leaves).items():
        found = {linear[name].layer: _described(settings[name]) for name in names}
        layers = range(leaves[path].shape[0]) if linear[names[0]].rule.stacked else [None]
        by_setting = defaultdict(list)
        for layer in layers:
            by_setting[found.get(layer, "no adapter")].append(str(layer))
        if len(by_setting) > 1:
            kinds = (f"{kind} in layers {', '.join(by_setting[kind])}" for kind in by_setting)
            yield f"{path!r} needs one rank and scale for all layers, it has {'; '.join(kinds)}"


def _described(setting: Setting) -> str:
    return f"rank {setting.rank} and scale {setting.scale:g}"


def _expected_shapes(
    settings: Mapping[str, Setting], linear: Mapping[str, _Module], leaves: Mapping[str, Any]
) -> dict[str, tuple[int, int]]:
    shapes = {}
    for name, module in linear.items():
        rank = settings[name].rank
        fan_in, fan_out = leaves[module.rule.path].shape[-2:]
        key_a, key_b = _keys(name)
        shapes |= {key_a: (rank, fan_in), key_b: (fan_out, rank)}
    return shapes


def _tensor_problems(
    tensors: torch_io.Tensors, expected: Mapping[str, tuple[int, int]]
) -> Iterator[str]:
    known = {name: tensor for name, tensor in tensors.items() if name in expected}
    floating = {name: tensor for name, tensor in known.items() if tensor.dtype in _FLOATS}
    found = {
        "missing": expected.keys() - tensors.keys(),
        "unexpected": tensors.keys() - expected.keys(),
        "wrong shape": [
            f"{name} is {tensor.shape}, expected {expected[name]}"
            for name, tensor in known.items()
            if tensor.shape != expected[name]
        ],
        "not floating point": [
            f"{name} is {known[name].dtype}" for name in known.keys() - floating.keys()
        ],
        "not finite": [
            name for name, tensor in floating.items() if not np.isfinite(_float32(tensor)).all()
        ],
    }
    for kind, names in found.items():
        if names:
            yield f"{kind}: {_listed(names)}"


def _float32(tensor: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.asarray(tensor, np.float32)


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - _NAMED_AT_MOST} more" if len(names) > _NAMED_AT_MOST else ""
    return ", ".join(names[:_NAMED_AT_MOST]) + more


def _site(path: str, leaf: Any, setting: Setting) -> Site:
    shape = tuple(leaf.shape)
    roles = ("stack", "in", "out")[-len(shape) :]
    return Site(path, shape, np.dtype(leaf.dtype).name, roles, setting.rank, setting.scale)


def _joined(tensors: torch_io.Tensors, modules: list[str], site: Site) -> LoraPair:
    keys_a, keys_b = zip(*map(_keys, modules), strict=True)

    def stack(keys: Iterable[str], shape: tuple[int, ...]) -> Any:
        return jnp.asarray(np.stack([_float32(tensors[key]).T for key in keys]).reshape(shape))

    return LoraPair(stack(keys_a, site.a_shape), stack(keys_b, site.b_shape))


def _raise_all(subject: str, problems: Iterable[str]) -> None:
    if problems := list(problems):
        raise InputError(f"{subject}: " + "; ".join(problems))
