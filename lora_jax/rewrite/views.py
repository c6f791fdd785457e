"""On the way to the activation: operations that leave a weight symbolic.

Each rule takes the walk, the equation and its inputs (symbolic weights among plain values) and
returns the outputs, or raises `NotLowRank`. To add one: write it and give it a row in `VIEWS`.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.rewrite.weight import Axis, Factor, NotLowRank, Weight, fresh_label


def same_axes(walk, eqn, *inputs):
    """Copies, names, casts between float dtypes: the factors are cast when they are used."""
    results = walk.bind(eqn, *(walk.value(x) for x in inputs))
    return [
        _floating(x, result) if isinstance(x, Weight) else result
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
    return [add_units(regrouped, added).viewed(value)]


def broadcast_in_dim(walk, eqn, weight, *dynamic_shape):
    """Repeat the weight along new axes, or axes of size 1; so are the factors that carry them."""
    [value] = walk.bind(eqn, weight.value, *dynamic_shape)
    added = [k for k in range(value.ndim) if k not in eqn.params["broadcast_dimensions"]]
    before = add_units(weight, added)
    return [_repeated(before, value)]


def split(walk, eqn, weight):
    """Each piece is the weight sliced along one axis."""
    label, start = weight.labels[eqn.params["axis"]], 0
    pieces = []
    for value, size in zip(walk.bind(eqn, weight.value), eqn.params["sizes"], strict=True):
        cut = partial(lax.slice_in_dim, start_index=start, limit_index=start + size)
        piece = _mapped_along(weight, label, lambda array, at, cut=cut: cut(array, axis=at))
        pieces.append(piece.viewed(value))
        start += size
    return pieces


def unstack(walk, eqn, weight):
    """Each entry along one axis, without that axis."""
    axis = eqn.params["axis"]
    label, rest = weight.labels[axis], _kept(weight.axes, {axis})

    def entry(number: int) -> Weight:
        cut = partial(lax.slice_in_dim, start_index=number, limit_index=number + 1)
        cut_out = _mapped_along(weight, label, lambda array, at: cut(array, axis=at))
        return _drop_units(cut_out, {axis})

    values = walk.bind(eqn, weight.value)
    return [entry(number).viewed(value, rest) for number, value in enumerate(values)]


def reverse(walk, eqn, weight):
    """Reverse axes of the view, and of the factors that carry them."""
    [value] = walk.bind(eqn, weight.value)
    for axis in eqn.params["dimensions"]:
        label = weight.labels[axis]
        weight = _mapped_along(weight, label, lambda array, at: lax.rev(array, (at,)))
    return [weight.viewed(value)]


def negate(walk, eqn, weight):
    """-(W + ΔW) = -W + A·(-B)."""
    [value] = walk.bind(eqn, weight.value)
    return [_rescaled(weight, value, jnp.array(-1), jnp.multiply)]


def multiply(walk, eqn, left, right):
    """The weight times a scalar, or an array that varies along the axes of one factor alone."""
    weight, by = (left, right) if isinstance(left, Weight) else (right, left)
    if isinstance(by, Weight):
        raise NotLowRank("is multiplied by an adapted weight")
    [value] = walk.bind(eqn, walk.value(left), walk.value(right))
    return [_rescaled(weight, value, jnp.asarray(by), jnp.multiply)]


def divide(walk, eqn, weight, by):
    """The weight divided as in `multiply`."""
    if isinstance(by, Weight):
        raise NotLowRank("is a divisor")
    [value] = walk.bind(eqn, weight.value, by)
    return [_rescaled(weight, value, jnp.asarray(by), jnp.divide)]


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
    "split": split,
    "unstack": unstack,
    "rev": reverse,
    "neg": negate,
    "mul": multiply,
    "div": divide,
}


def add_units(weight: Weight, positions: list[int]) -> Weight:
    """The weight with axes of size 1 at ``positions``, which every factor carries."""
    axes = list(weight.axes)
    for position in positions:
        label = fresh_label(weight.viewed(weight.value, axes))
        axes.insert(position, Axis(label, frozenset()))
        weight = weight.map_factors(lambda factor, label=label: factor.with_unit(label))
    return weight.viewed(weight.value, axes)


def _floating(weight: Weight, value: jax.Array) -> Weight:
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise NotLowRank("casts the weight to a dtype that is not floating")
    return weight.viewed(value)


def _mapped_along(weight: Weight, label: int, operation: Callable) -> Weight:
    return weight.map_factors(lambda factor: factor.along(label, operation))


def _rescaled(weight: Weight, value: jax.Array, by: jax.Array, operation: Callable) -> Weight:
    """The view after ``operation(weight, by)``, which one factor takes over."""
    if value.shape != weight.value.shape:
        raise NotLowRank("is repeated by what it is multiplied with")
    rescaled = weight.viewed(value)
    if weight.a is None or weight.b is None:
        return rescaled
    varying = [label for label, size in zip(weight.labels, by.shape, strict=False) if size != 1]
    multiplier = Factor(by.squeeze(), tuple(varying))

    def applied(factor: Factor) -> Factor:
        array = operation(factor.array, multiplier.over(factor.labels))
        return replace(factor, array=array)

    if set(varying) <= set(weight.b.labels):
        return replace(rescaled, b=applied(weight.b))
    if set(varying) <= set(weight.a.labels):
        return replace(rescaled, a=applied(weight.a))
    raise NotLowRank("is multiplied by an array along input and output axes")


def _along_axes(weight: Weight, value: Any, cut: Callable) -> Weight:
    for axis, (before, after) in enumerate(zip(weight.value.shape, value.shape, strict=True)):
        if before != after:
            weight = _mapped_along(weight, weight.labels[axis], cut(axis))
    return weight.viewed(value)


def _repeated(weight: Weight, value: Any) -> Weight:
    for axis, size in zip(weight.axes, value.shape, strict=True):

        def repeat(array: jax.Array, at: int, size: int = size) -> jax.Array:
            shape = (*array.shape[:at], size, *array.shape[at + 1 :])
            return lax.broadcast_in_dim(array, shape, range(array.ndim))

        weight = _mapped_along(weight, axis.label, repeat)
    return weight.viewed(value)


def _kept(axes: tuple[Axis, ...], dropped: set[int]) -> list[Axis]:
    return [axis for index, axis in enumerate(axes) if index not in dropped]


def _drop_units(weight: Weight, dropped: set[int]) -> Weight:
    for index in dropped:
        label = weight.axes[index].label
        weight = weight.map_factors(lambda factor, label=label: factor.without(label))
    return weight


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
