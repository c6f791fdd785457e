"""Where the weight meets an activation: the base operation as it was, plus the low-rank path.

A rule here emits the base equation unchanged and adds the product with the two factors, the one
that carries the contracted axes first. To add one: write it and give it a row in `PRODUCTS`.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.rewrite.weight import (
    RANK,
    Axis,
    Factor,
    NotLowRank,
    RolesContradict,
    Weight,
    contract,
    fresh_label,
)
from lora_jax.variants import at_least_float32, in_dtype

_TOKENS = -2
"""The label under which all token axes of an activation are one."""


class Meeting(NamedTuple):
    """Which axes of the *base* weight an operation contracts, runs over in batch, and leaves."""

    contracted: frozenset[Any]
    batch: frozenset[Any]
    free: frozenset[Any]


class _Operand(NamedTuple):
    """Axes of one operand of a dot_general."""

    contract: tuple[int, ...]
    batch: tuple[int, ...]
    free: tuple[int, ...]


class _Product(NamedTuple):
    """A product of an activation with an adapted weight, as functions of the activation."""

    base: Callable[[jax.Array], jax.Array]
    update: Callable[[jax.Array], jax.Array]
    """scale·(x·A)·B, in float32 or wider."""
    x_labels: tuple[int, ...]
    """The weight's labels on the activation's axes, and others."""
    y_labels: tuple[int, ...]
    """The same of the result's."""


def dot_general(walk, eqn, lhs: Any, rhs: Any):
    """x·W + scale·(x·A)·B, with the weight on either side."""
    if isinstance(rhs, Weight):
        lhs = walk.plain(lhs, eqn, NotLowRank("is contracted with another adapted weight"))
    weight_first = isinstance(lhs, Weight)
    weight: Weight = lhs if weight_first else rhs
    x: Any = rhs if weight_first else lhs
    operands = _operands(eqn.params["dimension_numbers"], lhs, rhs)
    of_weight, of_x = operands if weight_first else operands[::-1]
    walk.note(weight, eqn, meeting=_meeting(weight, of_weight))
    if weight.a is None:
        return walk.bind(eqn, walk.value(lhs), walk.value(rhs))
    contracted, batch, free = ([weight.labels[k] for k in axes] for axes in of_weight)
    if not set(batch) <= set(weight.stack_labels()):
        raise RolesContradict("runs in batch over an input or output axis")
    factors = _ordered_factors(weight, contracted)
    x_labels = _labels_of_activation(x.ndim, of_x, contracted, batch)
    tokens = [x_labels[axis] for axis in of_x.free]
    y_labels = (*batch, *free, *tokens) if weight_first else (*batch, *tokens, *free)

    def base(x: jax.Array) -> jax.Array:
        return walk.bind(eqn, *((weight.value, x) if weight_first else (x, weight.value)))[0]

    def update(x: jax.Array) -> jax.Array:
        _remember(walk, factors[1], weight, weight_first)
        return _low_rank_dot(
            factors,
            Factor(x, x_labels),
            sides=(tuple(contracted), tuple(batch), tuple(free)),
            weight_first=weight_first,
            dtype=weight.value.dtype,
            scale=weight.scale,
            precision=eqn.params["precision"],
        )

    return [_adapted_product(walk, weight, x, _Product(base, update, x_labels, y_labels))]


def row_gather(walk, eqn, weight, indices):
    """Row lookup, as of an embedding: W[ids] + scale·A[ids]·B; or entries picked from a stack."""
    if not isinstance(weight, Weight) or isinstance(indices, Weight):
        raise NotLowRank("uses the weight as indices")
    rows = _whole_rows(eqn.params, weight)
    if len(rows.free) > 1:
        return [_pick_from_stack(walk, eqn, weight, indices, rows)]
    walk.note(weight, eqn, meeting=_meeting(weight, rows))
    if weight.a is None:
        return walk.bind(eqn, weight.value, indices)
    [looked_up], [free] = ([weight.labels[k] for k in axes] for axes in (rows.contract, rows.free))
    ids = [_TOKENS - k for k in range(indices.ndim - 1)]

    def taken(factor: Factor) -> Factor:
        front = factor.leading(looked_up)
        return Factor(_take_leading(front.array, indices, eqn.params), (*ids, *front.labels[1:]))

    first, second = _ordered_factors(weight, [looked_up])
    hidden = _scaled(taken(first), weight)
    update = contract(hidden, _in_dtype(second, weight), [RANK], **_wide(weight))
    [base] = walk.bind(eqn, weight.value, indices)
    [offset] = eqn.params["dimension_numbers"].offset_dims
    order = [*ids[:offset], free, *ids[offset:]]
    total = _sum_in_float32(base, update.grouped(*([label] for label in order)))
    if (gain := weight.magnitude) is not None:
        total = total * (taken(gain) if looked_up in gain.labels else gain).over(order)
    return [in_dtype(total, base.dtype)]


def convolution(walk, eqn, x: Any, weight: Any):
    """conv(x, W) + scale·(conv(x, A) contracted with B over channels), as PEFT has it.

    A is a kernel of the same window with ``rank`` output channels, B mixes channels alone. Under
    feature groups every group has the same A and its own columns of B.
    """
    if not isinstance(weight, Weight) or isinstance(x, Weight):
        raise NotLowRank("convolves with the weight as the input")
    params = eqn.params
    out_axis, *window = params["dimension_numbers"].rhs_spec
    kernel_axes = _Operand(contract=tuple(window), batch=(), free=(out_axis,))
    walk.note(weight, eqn, meeting=_meeting(weight, kernel_axes))
    if weight.a is None:
        return walk.bind(eqn, x, weight.value)
    if params["batch_group_count"] != 1:
        raise NotLowRank("convolves in batch groups")
    first, second = _ordered_factors(weight, [weight.labels[k] for k in window])
    out = weight.labels[out_axis]
    order = [RANK if label == out else label for label in weight.labels]
    kernel = _in_dtype(first, weight).grouped(*([label] for label in order))
    y_labels = [_TOKENS - axis for axis in range(x.ndim)]
    y_labels[params["dimension_numbers"].out_spec[1]] = out

    def base(x: jax.Array) -> jax.Array:
        return walk.bind(eqn, x, weight.value)[0]

    def update(x: jax.Array) -> jax.Array:
        hidden = _convolved(x, kernel, out_axis, params)
        return _mixed_channels(hidden, second, weight, params)

    return [_adapted_product(walk, weight, x, _Product(base, update, (), tuple(y_labels)))]


def ragged_dot(walk, eqn, x: Any, weight: Any, group_sizes: Any):
    """Rows of x by groups, each with its own W, A and B: a mixture's experts."""
    if not isinstance(weight, Weight) or isinstance(x, Weight) or isinstance(group_sizes, Weight):
        raise NotLowRank("is ragged in the weight")
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (of_x, of_weight), batch = numbers.dot_dimension_numbers
    groups, contracted = tuple(numbers.rhs_group_dimensions), tuple(of_weight)
    plain = x.ndim == 2 and tuple(of_x) == (1,) and not any(batch) and len(groups) == 1
    if not plain or tuple(numbers.lhs_ragged_dimensions) != (0,):
        raise NotLowRank("is ragged otherwise than over the rows of a matrix")
    free = tuple(k for k in range(len(weight.axes)) if k not in (*groups, *contracted))
    walk.note(weight, eqn, meeting=_meeting(weight, _Operand(contracted, groups, free)))
    if weight.a is None:
        return walk.bind(eqn, x, weight.value, group_sizes)
    expert, inputs, outputs = ([weight.labels[k] for k in ks] for ks in (groups, contracted, free))
    if not set(expert) <= set(weight.stack_labels()):
        raise RolesContradict("has groups along an input or output axis")
    first, second = _ordered_factors(weight, inputs)
    options = {"precision": eqn.params["precision"], **_wide(weight)}
    down = _in_dtype(first, weight).grouped(expert, inputs, [RANK])
    up = _in_dtype(second, weight).grouped(expert, [RANK], outputs)

    def base(x: jax.Array) -> jax.Array:
        return walk.bind(eqn, x, weight.value, group_sizes)[0]

    def update(x: jax.Array) -> jax.Array:
        hidden = Factor(lax.ragged_dot(x, down, group_sizes, **options), (_TOKENS, RANK))
        return lax.ragged_dot(_scaled(hidden, weight).array, up, group_sizes, **options)

    of_rows = _by_row(weight, expert[0], group_sizes, x.shape[0])
    product = _Product(base, update, (_TOKENS, *inputs), (_TOKENS, *outputs))
    return [_adapted_product(walk, of_rows, x, product)]


PRODUCTS = {
    "dot_general": dot_general,
    "gather": row_gather,
    "conv_general_dilated": convolution,
    "ragged_dot_general": ragged_dot,
}


def _operands(dimension_numbers, lhs, rhs) -> tuple[_Operand, _Operand]:
    contract, batch = dimension_numbers
    left, right = (_operand(*axes) for axes in zip(contract, batch, (lhs, rhs), strict=True))
    return left, right


def _operand(contract, batch, x) -> _Operand:
    rank = len(x.axes) if isinstance(x, Weight) else x.ndim
    free = tuple(axis for axis in range(rank) if axis not in (*contract, *batch))
    return _Operand(tuple(contract), tuple(batch), free)


def _whole_rows(params, weight: Weight) -> _Operand:
    """Which axis a gather looks up; raises unless it takes whole rows along one axis."""
    numbers, shape = params["dimension_numbers"], weight.value.shape
    looked_up = tuple(numbers.start_index_map)
    free = tuple(k for k in range(len(shape)) if k not in looked_up)
    whole = all(params["slice_sizes"][k] == shape[k] for k in free)
    batched = bool(numbers.operand_batching_dims)
    if len(looked_up) != 1 or numbers.collapsed_slice_dims != looked_up or not whole or batched:
        raise NotLowRank("looks up something else than whole rows along one axis")
    return _Operand(contract=looked_up, batch=(), free=free)


def _pick_from_stack(walk, eqn, weight: Weight, indices, rows: _Operand) -> Weight:
    """The view after entries of one axis were picked; the picks are new axes in its role."""
    [value] = walk.bind(eqn, weight.value, indices)
    [picked] = (weight.axes[k] for k in rows.contract)
    first = fresh_label(weight)
    new = [Axis(first + k, picked.base) for k in range(indices.ndim - 1)]
    axes = iter(new)
    offsets = dict(zip(eqn.params["dimension_numbers"].offset_dims, rows.free, strict=True))
    view = [weight.axes[offsets[k]] if k in offsets else next(axes) for k in range(value.ndim)]

    def pick(factor: Factor) -> Factor:
        if picked.label not in factor.labels:
            return factor
        front = factor.leading(picked.label)
        labels = (*(axis.label for axis in new), *front.labels[1:])
        return Factor(_take_leading(front.array, indices, eqn.params), labels)

    return weight.map_factors(pick).viewed(value, view)


def _take_leading(array: jax.Array, indices: jax.Array, params) -> jax.Array:
    """Gather entries of the leading axis under the base gather's out-of-bounds mode.

    What the base fills in for an index out of bounds gets no update: the fill is zero here.
    """
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(indices.ndim - 1, indices.ndim - 2 + array.ndim)),
        collapsed_slice_dims=(0,),
        start_index_map=(0,),
    )
    same = {k: params[k] for k in ("unique_indices", "indices_are_sorted", "mode")}
    sizes = (1, *array.shape[1:])
    return lax.gather(array, indices, numbers, sizes, fill_value=0, **same)


def _meeting(weight: Weight, operand: _Operand) -> Meeting:
    return Meeting(*(frozenset().union(*(weight.axes[k].base for k in axes)) for axes in operand))


def _ordered_factors(weight: Weight, contracted: list[int]) -> tuple[Factor, Factor]:
    """The factors, the one whose own axes are exactly the contracted ones first."""
    a, b = weight.factors()
    made = {axis.label: size for axis, size in _made_on_the_way(weight) if axis.label in contracted}
    if any(size != 1 for size in made.values()):
        raise NotLowRank("is contracted along an axis on which weights are stacked or repeated")
    units = set(made)
    for first, second in ((a, b), (b, a)):
        if set(contracted) - units == set(weight.own_labels(first)):
            return first, _without(second, units)
    raise RolesContradict("contracts other axes than all of the input (or all of the output) axes")


def _made_on_the_way(weight: Weight) -> Iterable[tuple[Axis, int]]:
    sized = zip(weight.axes, weight.value.shape, strict=True)
    return ((axis, size) for axis, size in sized if not axis.base)


def _without(factor: Factor, units: Iterable[int]) -> Factor:
    for label in units:
        factor = factor.without(label)
    return factor


def _adapted_product(walk, weight: Weight, x: jax.Array, product: _Product) -> jax.Array:
    """The base product of x plus the adapter's share, which alone sees x under dropout.

    Without a magnitude the share is the low-rank update. With one it is, as in PEFT, everything
    by which the result would differ from the base if all of it saw the dropped x.
    """
    kept, gain = walk.dropped(x, weight), weight.magnitude
    if gain is None:
        base = product.base(x)
        return _sum_rounded_once(base, product.update(kept))
    if kept is x:
        return _rescaled_product(weight, gain, x, product)
    base, inner = product.base(x), at_least_float32(product.base(kept))
    share = at_least_float32(_rescaled_product(weight, gain, kept, product)) - inner
    return in_dtype(at_least_float32(base) + share, base.dtype)


def _rescaled_product(weight: Weight, gain: Factor, x: jax.Array, product: _Product) -> jax.Array:
    """W's outputs are rescaled: in the result where they remain, in x where they are contracted."""
    made_on_the_way = {axis.label for axis in weight.axes if not axis.base}
    gain = _without(gain, made_on_the_way.difference(product.y_labels))
    if set(gain.labels) <= set(product.y_labels):
        base = product.base(x)
        total = _sum_in_float32(base, product.update(x)) * gain.over(product.y_labels)
        return in_dtype(total, base.dtype)
    if set(gain.labels) <= set(product.x_labels):
        x = in_dtype(x * gain.over(product.x_labels), x.dtype)
        base = product.base(x)
        return in_dtype(_sum_in_float32(base, product.update(x)), base.dtype)
    raise NotLowRank("has a magnitude along axes that neither the input nor the result has")


def _by_row(weight: Weight, expert: int, group_sizes: jax.Array, rows: int) -> Weight:
    """The weight with its magnitude given for each row of x, instead of for each group."""
    if (gain := weight.magnitude) is None:
        return weight
    grouped = gain.leading(expert)
    of_rows = jnp.repeat(grouped.array, group_sizes, axis=0, total_repeat_length=rows)
    return replace(weight, magnitude=Factor(of_rows, (_TOKENS, *grouped.labels[1:])))


@partial(
    jax.jit,
    static_argnames=("sides", "weight_first", "dtype", "scale", "precision"),
    inline=True,
)
def _low_rank_dot(
    factors: tuple[Factor, Factor],
    x: Factor,
    *,
    sides: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
    weight_first: bool,
    dtype: Any,
    scale: float,
    precision: Any,
) -> jax.Array:
    """scale·(x·A)·B in the layout of the base product, in float32 or wider.

    Jitted and inlined: JAX then differentiates it once for all weights of a shape, which is most
    of the time of tracing, and leaves no trace of the jit in the program.
    """
    contracted, batch, free = sides
    tokens = _with_tokens_as_one(x, list(contracted), list(batch))
    down, up = (replace(f, array=in_dtype(f.array, dtype)) for f in factors)
    wide = jnp.promote_types(dtype, jnp.float32)
    options = {"precision": precision, "preferred_element_type": wide}
    operands = (down, tokens) if weight_first else (tokens, down)
    hidden = contract(*operands, contracted, **options)
    scaled = hidden.array if scale == 1 else hidden.array * scale
    hidden = replace(hidden, array=in_dtype(scaled, dtype))
    operands = (up, hidden) if weight_first else (hidden, up)
    product = contract(*operands, [RANK], **options)
    order = (*batch, *free, _TOKENS) if weight_first else (*batch, _TOKENS, *free)
    return product.grouped(*((label,) for label in order))


def _remember(walk, up: Factor, weight: Weight, weight_first: bool) -> None:
    """The shape in which `contract` will take the second factor."""
    stack = [label for label in up.labels if label in weight.stack_labels()]
    matrix = (up.size([RANK]), up.size(weight.own_labels(up)))
    lead = (up.size(stack),) if stack else ()
    walk.remember_second_factor(
        1 - weight_first, (*lead, *(matrix[::-1] if weight_first else matrix))
    )


def _labels_of_activation(
    ndim: int, axes: _Operand, contracted: list[int], batch: list[int]
) -> tuple[int, ...]:
    """The weight's labels for the axes that the two share, labels of their own for the others."""
    names = dict(zip((*axes.contract, *axes.batch), (*contracted, *batch), strict=True))
    return tuple(names.get(axis, _TOKENS - axis) for axis in range(ndim))


def _with_tokens_as_one(x: Factor, contracted: list[int], batch: list[int]) -> Factor:
    """The activation with its token axes flattened to one."""
    tokens = [label for label in x.labels if label not in (*contracted, *batch)]
    order = (*batch, _TOKENS, *contracted)
    return Factor(x.grouped(*(tokens if each == _TOKENS else [each] for each in order)), order)


def _convolved(x: jax.Array, kernel: jax.Array, out_axis: int, params) -> jax.Array:
    """x through the kernel A, once for each feature group."""
    groups = params["feature_group_count"]
    return lax.conv_general_dilated(
        x,
        lax.concatenate([kernel] * groups, out_axis),
        params["window_strides"],
        params["padding"],
        lhs_dilation=params["lhs_dilation"],
        rhs_dilation=params["rhs_dilation"],
        dimension_numbers=params["dimension_numbers"],
        feature_group_count=groups,
        precision=params["precision"],
    )


def _mixed_channels(hidden: jax.Array, second: Factor, weight: Weight, params) -> jax.Array:
    """B over the rank channels of each group, in the layout of the convolution's result."""
    groups, channel = params["feature_group_count"], params["dimension_numbers"].out_spec[1]
    [out] = weight.own_labels(second)
    group, out_in_group = fresh_label(weight), fresh_label(weight) + 1
    up = second.regrouped([out], [group, out_in_group], [groups, second.size([out]) // groups])
    rank = hidden.shape[channel] // groups
    split = [*hidden.shape[:channel], groups, rank, *hidden.shape[channel + 1 :]]
    labels = [_TOKENS - axis for axis in range(len(split))]
    labels[channel : channel + 2] = [group, RANK]
    channels = _scaled(Factor(lax.reshape(hidden, split), tuple(labels)), weight)
    mixed = contract(channels, _in_dtype(up, weight), [RANK], **_wide(weight))
    order = [*labels[:channel], group, out_in_group, *labels[channel + 2 :]]
    return mixed.grouped(*([label] for label in order))


def _wide(weight: Weight) -> dict:
    return {"preferred_element_type": jnp.promote_types(weight.value.dtype, jnp.float32)}


def _in_dtype(factor: Factor, weight: Weight) -> Factor:
    return replace(factor, array=in_dtype(factor.array, weight.value.dtype))


def _scaled(hidden: Factor, weight: Weight) -> Factor:
    scaled = hidden.array if weight.scale == 1 else hidden.array * weight.scale
    return replace(hidden, array=in_dtype(scaled, weight.value.dtype))


def _sum_in_float32(base: jax.Array, update: jax.Array) -> jax.Array:
    return lax.add(at_least_float32(base), lax.reshape(update, base.shape))


@partial(jax.jit, inline=True)
def _sum_rounded_once(base: jax.Array, update: jax.Array) -> jax.Array:
    return in_dtype(_sum_in_float32(base, update), base.dtype)
