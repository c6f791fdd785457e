"""On the way to the activation: operations that leave a weight symbolic.

Each rule takes the walk, the equation and its inputs (symbolic weights among plain values) and
returns the outputs, or raises `NotLowRank`. To add one: write it and give it a row in `VIEWS`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.rewrite.weight import Axis, NotLowRank, Weight, fresh_label


def same_axes(walk, eqn, *inputs):
    """Copies, names, casts between float dtypes: the factors are cast when they are used."""
    values = [walk.value(x) for x in inputs]
    results = walk.bind(eqn, *values)
    if not all(jnp.issubdtype(result.dtype, jnp.floating) for result in results):
        raise NotLowRank("casts the weight to a dtype that is not floating")
    return [
        x.viewed(result) if isinstance(x, Weight) else result
        for x, result in zip(inputs, results, strict=True)
    ]


def transpose(walk, eqn, weight):
    """Permute the view; the factors stay as they are."""
    [value] = walk.bind(eqn, weight.value)
    return [weight.viewed(value, [weight.axes[axis] for axis in eqn.params["permutation"]])]


def squeeze(walk, eqn, weight):
    """Drop axes of size 1 from the view and from the factors."""
    [value] = walk.bind(eqn, weight.value)
    dropped = {axis % len(weight.axes) for axis in eqn.params["dimensions"]}
    return [_drop_units(weight, dropped).viewed(value, _kept(weight.axes, dropped))]


def static_slice(walk, eqn, weight):
    """Slice each axis of the view, and the factor that carries it, by the same bounds."""
    [value] = walk.bind(eqn, weight.value)
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)

    def cut(axis: int) -> Callable[[jax.Array, int], jax.Array]:
        bounds = starts[axis], limits[axis], strides[axis]
        return lambda array, at: lax.slice_in_dim(array, *bounds, axis=at)

    return [_along_axes(weight, value, cut)]


def dynamic_slice(walk, eqn, weight, *starts):
    """As `static_slice`, with starts that are only known when the program runs."""
    if not isinstance(weight, Weight):
        raise NotLowRank("uses the weight as an index")
    [value] = walk.bind(eqn, weight.value, *starts)
    sizes = eqn.params["slice_sizes"]

    def cut(axis: int) -> Callable[[jax.Array, int], jax.Array]:
        return lambda array, at: lax.dynamic_slice_in_dim(array, starts[axis], sizes[axis], at)

    return [_along_axes(weight, value, cut)]


def reshape(walk, eqn, weight):
    """Split and merge axes, each group within one role; add and drop axes of size 1."""
    [value] = walk.bind(eqn, weight.value)
    order = eqn.params["dimensions"]
    if order is not None:
        axes = [weight.axes[axis] for axis in order]
        weight = weight.viewed(lax.transpose(weight.value, order), axes)
    units = {axis for axis, size in enumerate(weight.value.shape) if size == 1}
    old_sizes = [size for size in weight.value.shape if size != 1]
    new_sizes = [size for size in value.shape if size != 1]
    squeezed = weight.viewed(weight.value, _kept(weight.axes, units))
    regrouped = _drop_units(weight, units).viewed(weight.value, squeezed.axes)
    for old, new in _matching_groups(old_sizes, new_sizes):
        if len(old) != 1 or len(new) != 1:
            regrouped = _regroup(
                regrouped, [squeezed.axes[i] for i in old], [new_sizes[i] for i in new]
            )
    added = [axis for axis, size in enumerate(value.shape) if size == 1]
    return [_add_units(regrouped, added).viewed(value)]


def broadcast_in_dim(walk, eqn, weight, *dynamic_shape):
    """Repeat the weight along new axes, or axes of size 1; so are the factors that carry them."""
    [value] = walk.bind(eqn, weight.value, *dynamic_shape)
    added = [k for k in range(value.ndim) if k not in eqn.params["broadcast_dimensions"]]
    before = _add_units(weight, added)
    return [_repeated(before, value)]


VIEWS = {
    "convert_element_type": same_axes,
    "copy": same_axes,
    "copy_p": same_axes,
    "name": same_axes,
    "optimization_barrier": same_axes,
    "sharding_constraint": same_axes,
    "transpose": transpose,
    "squeeze": squeeze,
    "slice": static_slice,
    "dynamic_slice": dynamic_slice,
    "reshape": reshape,
    "broadcast_in_dim": broadcast_in_dim,
}


def _along_axes(weight: Weight, value: Any, cut: Callable) -> Weight:
    for axis, (before, after) in enumerate(zip(weight.value.shape, value.shape, strict=True)):
        if before != after:
            label, operation = weight.axes[axis].label, cut(axis)
            weight = weight.map_factors(lambda f, l=label, o=operation: f.along(l, o))
    return weight.viewed(value)


def _repeated(weight: Weight, value: Any) -> Weight:
    for axis, size in zip(weight.axes, value.shape, strict=True):

        def repeat(array: jax.Array, at: int, size: int = size) -> jax.Array:
            shape = (*array.shape[:at], size, *array.shape[at + 1 :])
            return lax.broadcast_in_dim(array, shape, range(array.ndim))

        weight = weight.map_factors(lambda f, l=axis.label, repeat=repeat: f.along(l, repeat))
    return weight.viewed(value)


def _kept(axes: tuple[Axis, ...], dropped: set[int]) -> list[Axis]:
    return [axis for index, axis in enumerate(axes) if index not in dropped]


def _drop_units(weight: Weight, dropped: set[int]) -> Weight:
    for index in dropped:
        label = weight.axes[index].label
        weight = weight.map_factors(lambda factor, label=label: factor.without(label))
    return weight


def _add_units(weight: Weight, positions: list[int]) -> Weight:
    axes = list(weight.axes)
    for position in positions:
        label = fresh_label(weight.viewed(weight.value, axes))
        axes.insert(position, Axis(label, frozenset()))
        weight = weight.map_factors(lambda factor, label=label: factor.with_unit(label))
    return weight.viewed(weight.value, axes)


def _regroup(weight: Weight, old: list[Axis], sizes: list[int]) -> Weight:
    labels = [axis.label for axis in old]
    _require_one_role(weight, labels)
    first = fresh_label(weight)
    new_labels = list(range(first, first + len(sizes)))
    base = frozenset().union(*(axis.base for axis in old))
    start = weight.axes.index(old[0])
    axes = list(weight.axes)
    axes[start : start + len(old)] = [Axis(label, base) for label in new_labels]
    regrouped = weight.map_factors(lambda factor: factor.regrouped(labels, new_labels, sizes))
    return regrouped.viewed(weight.value, axes)


def _require_one_role(weight: Weight, labels: list[int]) -> None:
    if weight.a is None or weight.b is None:
        return
    homes = {(label in weight.a.labels, label in weight.b.labels) for label in labels}
    if len(homes) > 1:
        raise NotLowRank("reshape merges axes of different roles")


def _matching_groups(old: list[int], new: list[int]) -> list[tuple[list[int], list[int]]]:
    """Pair up runs of old and new axes with equal products; sizes are all greater than 1."""
    groups, i, j = [], 0, 0
    while i < len(old):
        left, right = [i], [j]
        while (a := math.prod(old[k] for k in left)) != (b := math.prod(new[k] for k in right)):
            if a < b:
                left.append(left[-1] + 1)
            else:
                right.append(right[-1] + 1)
        groups.append((left, right))
        i, j = left[-1] + 1, right[-1] + 1
    return groups
