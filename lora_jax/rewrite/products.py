"""Where the weight meets an activation: the base operation as it was, plus the low-rank path.

A rule here emits the base equation unchanged and adds the product with the two factors, the one
that carries the contracted axes first. To add one: write it and give it a row in `PRODUCTS`.
"""

from dataclasses import replace
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
from lora_jax.variants import at_least_float32

_TOKENS = -2
"""The label under which all token axes of an activation are one."""


class Meeting(NamedTuple):
    """Which axes of the *base* weight an operation contracts, runs over in batch, and leaves."""

    contracted: frozenset[int]
    batch: frozenset[int]
    free: frozenset[int]


class _Operand(NamedTuple):
    """Axes of one operand of a dot_general."""

    contract: tuple[int, ...]
    batch: tuple[int, ...]
    free: tuple[int, ...]


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
    precision = eqn.params["precision"]
    update = _low_rank_dot(weight, of_weight, x, of_x, weight_first, precision)
    [base] = walk.bind(eqn, walk.value(lhs), walk.value(rhs))
    return [_sum_rounded_once(base, update)]


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
    first, second = _ordered_factors(weight, [looked_up])
    taken = _take_leading(first.leading(looked_up).array, indices, eqn.params)
    ids = [_TOKENS - k for k in range(taken.ndim - 1)]
    hidden = _scaled(Factor(taken, (*ids, RANK)), weight)
    update = contract(hidden, _in_dtype(second, weight), [RANK], **_wide(weight))
    [base] = walk.bind(eqn, weight.value, indices)
    [offset] = eqn.params["dimension_numbers"].offset_dims
    order = [*ids[:offset], free, *ids[offset:]]
    return [_sum_rounded_once(base, update.grouped(*([label] for label in order)))]


PRODUCTS = {
    "dot_general": dot_general,
    "gather": row_gather,
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
    if len(looked_up) != 1 or numbers.collapsed_slice_dims != looked_up or not whole:
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
    for first, second in ((a, b), (b, a)):
        if set(contracted) == set(weight.own_labels(first)):
            return first, second
    raise RolesContradict("contracts other axes than all of the input (or all of the output) axes")


def _low_rank_dot(
    weight: Weight, of_weight: _Operand, x: jax.Array, of_x: _Operand, weight_first: bool, precision
) -> jax.Array:
    """scale·(x·A)·B in the layout of the base product, in float32 or wider."""
    contracted, batch, free = ([weight.labels[k] for k in axes] for axes in of_weight)
    first, second = _ordered_factors(weight, contracted)
    if not set(batch) <= set(weight.stack_labels()):
        raise RolesContradict("runs in batch over an input or output axis")
    tokens = _labelled_activation(x, of_x, contracted, batch)
    down, up = _in_dtype(first, weight), _in_dtype(second, weight)
    options = {"precision": precision, **_wide(weight)}
    sides = (down, tokens) if weight_first else (tokens, down)
    hidden = _scaled(contract(*sides, contracted, **options), weight)
    sides = (up, hidden) if weight_first else (hidden, up)
    product = contract(*sides, [RANK], **options)
    order = (*batch, *free, _TOKENS) if weight_first else (*batch, _TOKENS, *free)
    return product.grouped(*((label,) for label in order))


def _labelled_activation(x, axes: _Operand, contracted: list[int], batch: list[int]) -> Factor:
    """The activation under the weight's labels, with all its token axes as one."""
    names = dict(zip((*axes.contract, *axes.batch), (*contracted, *batch), strict=True))
    labels = tuple(names.get(axis, _TOKENS - axis) for axis in range(x.ndim))
    tokens = [labels[axis] for axis in axes.free]
    order = (*batch, _TOKENS, *contracted)
    groups = (tokens if label == _TOKENS else [label] for label in order)
    return Factor(Factor(x, labels).grouped(*groups), order)


def _wide(weight: Weight) -> dict:
    return {"preferred_element_type": jnp.promote_types(weight.value.dtype, jnp.float32)}


def _in_dtype(factor: Factor, weight: Weight) -> Factor:
    return replace(factor, array=factor.array.astype(weight.value.dtype))


def _scaled(hidden: Factor, weight: Weight) -> Factor:
    scaled = hidden.array if weight.site.scale == 1 else hidden.array * weight.site.scale
    return replace(hidden, array=scaled.astype(weight.value.dtype))


def _sum_rounded_once(base: jax.Array, update: jax.Array) -> jax.Array:
    return (at_least_float32(base) + lax.reshape(update, base.shape)).astype(base.dtype)
