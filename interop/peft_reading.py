"""Sites from a PEFT config and tensors, and everything about them that doesn't fit the model."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from interop import torch_io
from interop.keymaps import Index, indices
from interop.peft_layout import (
    PREFIX,
    Base,
    Place,
    part,
    places,
    saved_module,
)
from interop.peft_matching import PeftConfig, Setting, adapted_modules, saved_tensors
from lora_jax.adapter import entry_of
from lora_jax.errors import InputError
from lora_jax.site import Site

_FLOATS = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)
_NAMED_AT_MOST = 5


def sites_and_entries(
    config: PeftConfig, tensors: torch_io.Tensors, base: Base, source: Any
) -> tuple[tuple[Site, ...], dict[str, Any]]:
    """The sites of an adapter in the order of the parameter tree, and their entries, float32.

    Raises:
      InputError: naming ``source`` and every module and tensor that doesn't fit.
    """
    settings = _without_tied(adapted_modules(config, [*base.modules]), config, base)
    saved = saved_tensors(config, [*base.tensors]) | _biases(config, settings, base)
    rows = _rows(config, base)
    problems = [
        *_target_problems(config, settings, base),
        *_row_problems(config, base),
    ]
    settings = {name: s for name, s in settings.items() if _is_adaptable(name, base)}
    by_leaf = {
        "pair": _by_leaf({base.modules[name]: setting for name, setting in settings.items()}),
        "full": _by_leaf({base.tensors[name]: None for name in saved}),
        "rows": {path: {(): tokens} for path, tokens in rows.items()},
    }
    problems += _claim_problems(by_leaf, base)
    problems += _tying_problems(config, by_leaf, base)
    problems += _dora_problems(config, by_leaf["pair"], base)
    sites = tuple(_sites(by_leaf, config, base))
    wanted = {site.path: places(site, base, settings) for site in sites}
    of_base = {name: f for name, f in _base_tensors(settings, base).items() if name in tensors}
    expected = {place.name: place.shape for found in wanted.values() for place in found}
    expected |= {name: _shape_in_torch(of_base[name], base) for name in of_base}
    tensor_problems = [*_tensor_problems(tensors, expected)]
    if not tensor_problems:
        tensor_problems += _base_problems(tensors, of_base, base)
        tensor_problems += _copy_problems(tensors, wanted)
    _raise_all(f"{source} does not fit the model", [*problems, *tensor_problems])
    return sites, {site.path: _entry(site, wanted[site.path], tensors) for site in sites}


def _by_leaf(found: Mapping[tuple[str, Index], Any]) -> dict[str, dict[Index, Any]]:
    grouped = defaultdict(dict)
    for (path, index), value in found.items():
        grouped[path][index] = value
    return grouped


def _without_tied(
    settings: Mapping[str, Setting], config: PeftConfig, base: Base
) -> dict[str, Setting]:
    """Without modules that only repeat an adapted table, as PEFT ties them."""
    tied = {
        copy
        for name in settings
        if config.ensure_weight_tying
        for copy in base.tied_modules(base.modules[name][0])
    }
    return {name: setting for name, setting in settings.items() if name not in tied}


def _biases(config: PeftConfig, settings: Mapping[str, Setting], base: Base) -> set[str]:
    biases = {name for name in base.tensors if name.endswith(".bias")}
    of_adapted = {name for name in biases if saved_module(name) in settings}
    return {"none": set(), "lora_only": of_adapted, "all": biases}[config.bias]


def _row_targets(config: PeftConfig, base: Base) -> dict[str, tuple[list[str], Sequence[int]]]:
    """By name in the config: the modules that it means, and their tokens."""
    tables = [name for name, (path, _) in base.modules.items() if base.kind(path) == "embedding"]
    indices = config.trainable_token_indices or {}
    named = indices if isinstance(indices, Mapping) else dict.fromkeys(tables[:1], indices)
    return {
        name: ([module for module in base.modules if module.endswith(name)], tokens)
        for name, tokens in named.items()
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
            rows = getattr(base.leaves.get(base.modules[module][0]), "shape", (0,))[0]
            if outside := [token for token in tokens if token >= rows]:
                yield f"trainable_token_indices {outside} are outside the {rows} rows of {module!r}"


def _target_problems(
    config: PeftConfig, settings: Mapping[str, Setting], base: Base
) -> Iterator[str]:
    if not settings:
        yield f"target_modules {config.target_modules!r} name no module of it"
    for name in settings:
        path, _ = base.modules[name]
        if path not in base.leaves:
            yield f"target {name!r} has no leaf {path!r} in this model"
        elif base.kind(path) is None:
            yield f"target {name!r} is not a linear layer or an embedding"


def _is_adaptable(name: str, base: Base) -> bool:
    path, _ = base.modules[name]
    return path in base.leaves and base.kind(path) is not None


def _claim_problems(
    by_leaf: Mapping[str, Mapping[str, Mapping[Index, Any]]], base: Base
) -> Iterator[str]:
    """Leaves with two kinds of entry, and entries that have to be whole but aren't."""
    words = {"pair": "adapted", "full": "trained whole", "rows": "trained in some rows"}
    for path in base.leaves:
        kinds = [words[kind] for kind, found in by_leaf.items() if path in found]
        if len(kinds) > 1:
            yield f"{path!r} is {' and '.join(kinds)}, expected one of them"
    for path, found in _in_some_layers(by_leaf["full"], base):
        yield f"{path!r} is trained whole in layers {found} alone, expected all or none"


def _dora_problems(
    config: PeftConfig, pairs: Mapping[str, Mapping[Index, Setting]], base: Base
) -> Iterator[str]:
    for path, found in _in_some_layers(pairs, base) if config.use_dora else ():
        yield (
            f"{path!r} has DoRA in layers {found} alone, and the others would have magnitudes "
            "here: expected all or none"
        )


def _in_some_layers(
    by_leaf: Mapping[str, Mapping[Index, Any]], base: Base
) -> Iterator[tuple[str, str]]:
    for path, found in by_leaf.items():
        if len(found) < len(indices(base.rules[path], base.leaves[path].shape)):
            yield path, ", ".join(".".join(map(str, index)) for index in sorted(found))


def _tying_problems(
    config: PeftConfig, by_leaf: Mapping[str, Mapping[str, Any]], base: Base
) -> Iterator[str]:
    for path in {**by_leaf["pair"], **by_leaf["full"]}:
        tied = base.tied_modules(path)
        if tied and not config.ensure_weight_tying:
            yield (
                f"{path!r} is also the weight of {', '.join(tied)}, which this adapter leaves as "
                "it was: train it with ensure_weight_tying=True, or untie the base's weights"
            )
        if tied and config.use_dora and path in by_leaf["pair"]:
            yield f"{path!r} is tied to {', '.join(tied)}, each with a DoRA magnitude of its own"


def _sites(
    by_leaf: Mapping[str, Mapping[str, Any]], config: PeftConfig, base: Base
) -> Iterator[Site]:
    for path, leaf in base.leaves.items():
        shape, dtype = tuple(leaf.shape), np.dtype(leaf.dtype).name
        if found := by_leaf["pair"].get(path):
            yield _pair_site(path, shape, dtype, found, config.use_dora)
        elif path in by_leaf["full"]:
            yield Site(path, shape, dtype, (), 0, 1.0, variant="full")
        elif found := by_leaf["rows"].get(path):
            rows = found[()]
            roles = ("in", "out")
            yield Site(path, shape, dtype, roles, len(rows), 1.0, variant="rows", rows=rows)


def _pair_site(
    path: str, shape: tuple[int, ...], dtype: str, found: Mapping[Index, Setting], dora: bool
) -> Site:
    """One site of all layers; those without an adapter have rank 0."""
    layers = [()] if () in found else np.ndindex(shape[:1])
    ranks, scales = zip(*(found.get(layer, Setting(0, 0.0)) for layer in layers), strict=True)
    distinct = {setting.scale for setting in found.values()}
    return Site(
        path,
        shape,
        dtype,
        ("stack", "in", "out")[-len(shape) :],
        max(ranks),
        distinct.pop() if len(distinct) == 1 else scales,
        ranks=ranks if len(set(ranks)) > 1 else (),
        variant="dora" if dora else "lora",
    )


def _base_tensors(settings: Iterable[str], base: Base) -> dict[str, tuple[str, Index, bool]]:
    """Copies of the base that PEFT may store beside an adapter: leaf, layer and orientation."""
    own = {name: (*base.modules[name], bool(base.rules[base.modules[name][0]].order))
           for name in settings}  # fmt: skip
    tied = {c: own[name] for name in own for c in base.tied_modules(own[name][0])}
    return {f"{PREFIX}{name}.base_layer.weight": found for name, found in {**own, **tied}.items()}


def _shape_in_torch(found: tuple[str, Index, bool], base: Base) -> tuple[int, ...]:
    path, index, transposed = found
    shape = base.leaves[path].shape[len(index) :]
    return tuple(shape[::-1] if transposed else shape)


def _base_problems(
    tensors: torch_io.Tensors, of_base: Mapping[str, tuple[str, Index, bool]], base: Base
) -> Iterator[str]:
    for name, (path, index, transposed) in of_base.items():
        leaf = base.leaves[path]
        if isinstance(leaf, jax.ShapeDtypeStruct):
            yield f"{name} holds weights of the base: give params, not shapes, to compare them"
            continue
        values = np.asarray(leaf[index] if index else leaf)
        if not np.array_equal(
            tensors[name].astype(values.dtype), values.T if transposed else values
        ):
            yield f"{name} differs from the base's {path!r}: the adapter belongs to another base"


def _copy_problems(
    tensors: torch_io.Tensors, wanted: Mapping[str, Sequence[Place]]
) -> Iterator[str]:
    for found in wanted.values():
        own = {(p.field, p.index): p for p in found if not p.is_copy}
        for copy in (place for place in found if place.is_copy):
            original = own[copy.field, copy.index]
            values = tensors[original.name]
            as_copy = values.T if original.transposed != copy.transposed else values
            if not np.array_equal(tensors[copy.name], as_copy):
                yield f"{copy.name} differs from {original.name}, to which it is tied"


def _tensor_problems(
    tensors: torch_io.Tensors, expected: Mapping[str, tuple[int, ...]]
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


def _entry(site: Site, found: Sequence[Place], tensors: torch_io.Tensors) -> Any:
    """Each tensor in its part of the arrays; what no tensor fills is zero."""
    arrays = {name: np.zeros(shape, np.float32) for name, shape in site.entry_shapes.items()}
    for place in found:
        part(arrays[place.field], place)[...] = _float32(tensors[place.name])
    return entry_of(site, {name: jnp.asarray(array) for name, array in arrays.items()})


def _float32(tensor: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.asarray(tensor, np.float32)


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - _NAMED_AT_MOST} more" if len(names) > _NAMED_AT_MOST else ""
    return ", ".join(names[:_NAMED_AT_MOST]) + more


def _raise_all(subject: str, problems: Iterable[str]) -> None:
    if problems := list(problems):
        raise InputError(f"{subject}: " + "; ".join(problems))
