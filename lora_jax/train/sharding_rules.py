"""Which axes of the base are split over which axes of a device mesh: rules, defaults, and why.

The mesh has up to three axes. Devices along ``data`` see different rows and hold the same
weights. Devices along ``fsdp`` see different rows too and hold a part of each weight, which is
gathered where it is used. Devices along ``tensor`` see the same rows and compute a part of each
product.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec

from lora_jax.errors import InputError
from lora_jax.paths import named_leaves, nearest

DATA, FSDP, TENSOR = MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = (DATA, FSDP)
"""The mesh axes whose devices see different rows."""

Axes = str | tuple[str, ...] | None
"""The mesh axes over which one axis of an array is split."""

AxisSizes = Mapping[str, int]
"""Devices along each mesh axis, such as ``mesh.shape``."""


class Rule(NamedTuple):
    """Mesh axes for the leaves whose whole path matches ``pattern``.

    ``axes`` are those of a leaf's last axes, and the axes before them are not split: one rule
    serves a layer by itself and a stack of layers. No axes at all: replicated.
    """

    pattern: str
    axes: tuple[Axes, ...]


DECODER_RULES = (
    Rule(r"(.*/)?(q|k|v|qkv|gate|up|gate_up)_proj/kernel", (FSDP, TENSOR)),
    Rule(r"(.*/)?(q|k|v|qkv|gate|up|gate_up)_proj/bias", (TENSOR,)),
    Rule(r"(.*/)?(o|down)_proj/kernel", (TENSOR, FSDP)),
    Rule(r"(.*/)?(o|down)_proj/bias", ()),
    Rule(r"(.*/)?experts/gate_up_proj", (FSDP, TENSOR)),
    Rule(r"(.*/)?experts/down_proj", (TENSOR, FSDP)),
    Rule(r"(.*/)?gate/kernel", (FSDP, None)),
    # Were its features split over fsdp, so would be the residual stream's: XLA would then move
    # activations instead of weights, four times the bytes.
    Rule(r"(.*/)?embed_tokens/embedding", ((TENSOR, FSDP), None)),
    Rule(r"(.*/)?lm_head/kernel", (FSDP, TENSOR)),
    Rule(r"(.*/)?embed_positions/embedding", ()),
    Rule(r"(.*/)?\w*norm/(scale|bias)", ()),
)
"""Column-parallel q, k, v, gate and up, fused or not; row-parallel o and down, also of each expert;
the ends over the vocabulary.

Source of the tensor axis: Shoeybi et al., "Megatron-LM", arXiv:1909.08053.
"""


class LeafSharding(NamedTuple):
    """How one leaf is split, and why."""

    shape: tuple[int, ...]
    bytes: int
    """Of the whole leaf."""
    bytes_per_device: int
    spec: PartitionSpec
    because: str
    """The rule that decided, and what could not be split as it says."""


def leaf_shardings(
    params: Any, sizes: AxisSizes, rules: Sequence[Rule] = ()
) -> dict[str, LeafSharding]:
    """How every leaf of ``params`` is split, by its path.

    ``rules`` are asked first, then `DECODER_RULES`; the first that matches decides. A leaf that
    none matches has the largest of its axes that fsdp divides split over fsdp. An axis that its
    mesh axes do not divide is not split.

    Args:
      params: the base, as arrays or shapes.
      sizes: devices along each mesh axis.
      rules: the caller's own; each must match something.

    Raises:
      InputError: naming every rule of the caller's that matches no leaf, names a mesh axis that
        isn't there or names one twice, or has more axes than a leaf it matches.

    >>> leaves = leaf_shardings({"w": jax.numpy.zeros((6, 8))}, {"fsdp": 4})
    >>> tuple(leaves["w"].spec), leaves["w"].bytes, leaves["w"].bytes_per_device
    ((None, 'fsdp'), 192, 48)
    """
    leaves = named_leaves(jax.eval_shape(lambda tree: tree, params))
    if problems := [*_rule_problems(rules, leaves, sizes)]:
        raise InputError("sharding rules: " + "; ".join(problems))
    return {path: _leaf_sharding(path, leaf, sizes, rules) for path, leaf in leaves.items()}


def names(axes: Axes) -> tuple[str, ...]:
    """The mesh axes of one axis, none, one or several, as a tuple."""
    return (axes,) if isinstance(axes, str) else axes or ()


def trimmed(split: Sequence[Axes]) -> PartitionSpec:
    """A spec as JAX itself spells it, without None at the end: another spelling recompiles.

    >>> tuple(trimmed(["fsdp", None]))
    ('fsdp',)
    """
    last = max((axis for axis, axes in enumerate(split, start=1) if axes), default=0)
    return PartitionSpec(*split[:last])


def _rule_problems(
    rules: Sequence[Rule], leaves: Mapping[str, Any], sizes: AxisSizes
) -> Iterable[str]:
    for pattern, axes in rules:
        matched = [path for path in leaves if re.fullmatch(pattern, path)]
        if not matched:
            yield f"{pattern!r} matches no leaf (nearest: {nearest(pattern, leaves) or 'none'})"
        named = [name for each in axes for name in names(each)]
        for name in sorted(set(named) - set(sizes)):
            yield f"{pattern!r} names {name!r}, the mesh has {', '.join(sizes)}"
        if len(set(named)) < len(named):
            yield f"{pattern!r} splits two axes over one mesh axis: {axes}"
        for path in matched:
            if len(axes) > len(leaves[path].shape):
                yield f"{pattern!r} has {len(axes)} axes, {path!r} {len(leaves[path].shape)}"


def _leaf_sharding(path: str, leaf: Any, sizes: AxisSizes, rules: Sequence[Rule]) -> LeafSharding:
    rule = _first_match(path, leaf, (*rules, *DECODER_RULES))
    split, because = _by_rule(rule, leaf.shape, sizes) if rule else _by_size(leaf.shape, sizes)
    size = math.prod(leaf.shape) * leaf.dtype.itemsize
    parts = math.prod(_devices(axes, sizes) for axes in split)
    return LeafSharding(tuple(leaf.shape), size, size // parts, trimmed(split), because)


def _first_match(path: str, leaf: Any, rules: Iterable[Rule]) -> Rule | None:
    matching = (rule for rule in rules if re.fullmatch(rule.pattern, path))
    return next((rule for rule in matching if len(rule.axes) <= len(leaf.shape)), None)


def _by_rule(rule: Rule, shape: Sequence[int], sizes: AxisSizes) -> tuple[Sequence[Axes], str]:
    unnamed = (None,) * (len(shape) - len(rule.axes))
    wanted = [_present(axes, sizes) for axes in (*unnamed, *rule.axes)]
    fits = [size % _devices(axes, sizes) == 0 for size, axes in zip(shape, wanted, strict=True)]
    refused = [
        f"{size} not divisible by {_described(axes, sizes)}"
        for size, axes, fit in zip(shape, wanted, fits, strict=True)
        if not fit
    ]
    split = [axes if fit else None for axes, fit in zip(wanted, fits, strict=True)]
    return split, "; ".join([f"rule {rule.pattern}", *refused])


def _by_size(shape: Sequence[int], sizes: AxisSizes) -> tuple[Sequence[Axes], str]:
    fsdp, nothing = _present(FSDP, sizes), [None] * len(shape)
    if fsdp is None:
        return nothing, "no rule, and fsdp has one device"
    divisible = [axis for axis, size in enumerate(shape) if size and size % sizes[FSDP] == 0]
    if not divisible:
        return nothing, f"no rule, and no axis is divisible by {_described(fsdp, sizes)}"
    largest = max(divisible, key=lambda axis: shape[axis])
    split = [fsdp if axis == largest else None for axis in range(len(shape))]
    return split, f"the largest axis divisible by {_described(fsdp, sizes)}"


def _present(axes: Axes, sizes: AxisSizes) -> Axes:
    """Without the mesh axes that are not there or have one device."""
    present = tuple(name for name in names(axes) if sizes.get(name, 1) > 1)
    return present if len(present) > 1 else next(iter(present), None)


def _devices(axes: Axes, sizes: AxisSizes) -> int:
    return math.prod(sizes[name] for name in names(axes))


def _described(axes: Axes, sizes: AxisSizes) -> str:
    return " x ".join(f"{name}={sizes[name]}" for name in names(axes))
