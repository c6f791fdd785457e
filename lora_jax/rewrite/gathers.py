"""Gathers: whole rows looked up, as by an embedding, or entries picked from a stack of weights.

Each factor is gathered along the axes that it carries, by the same indices and in the same mode.
To add a rule: write it and give it a row in `GATHERS`.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import lax

from lora_jax.rewrite.products import (
    Operand,
    masked_base,
    meeting_of,
    ordered_factors,
    sum_in_float32,
    taken_factors,
    wide,
)
from lora_jax.rewrite.weight import (
    RANK,
    Axis,
    Factor,
    NotLowRank,
    Weight,
    contract,
    fresh_label,
)
from lora_jax.variants import in_dtype


class _Picks(NamedTuple):
    """What a gather does with each axis of the weight's view; all others it takes whole."""

    params: Any
    indices: jax.Array
    chosen: tuple[int, ...]
    """Axes of which the indices choose a part."""
    paired: dict[int, int]
    """Axes that run in batch with the indices, and with which of the indices' axes."""


def gather(walk, eqn, weight, indices):
    """Rows looked up, W[ids] + scale·A[ids]·B, or a view of the weight at what was picked."""
    if not isinstance(weight, Weight) or isinstance(indices, Weight):
        raise NotLowRank("uses the weight as indices")
    picks = _picks(eqn.params, weight, indices)
    taken = {*picks.chosen, *picks.paired}
    free = tuple(axis for axis in range(len(weight.axes)) if axis not in taken)
    if len(free) == 1 and _looks_up(weight, picks):
        walk.note(weight, eqn, meeting_of(weight, Operand(picks.chosen, tuple(picks.paired), free)))
        return [_rows(walk, eqn, weight, picks)]
    [value] = walk.bind(eqn, weight.value, indices)
    picked = weight.map_factors(partial(_gathered, weight=weight, picks=picks))
    return [picked.viewed(value, _axes_of_result(weight, picks))]


GATHERS = {"gather": gather}


def _looks_up(weight: Weight, picks: _Picks) -> bool:
    """Whether single entries are chosen, along all of the input or all of the output axes."""
    if _has_windows(picks):
        return False
    chosen = {weight.labels[axis] for axis in picks.chosen}
    known = [factor for factor in (weight.a, weight.b) if factor is not None]
    return not known or any(chosen == set(weight.own_labels(factor)) for factor in known)


def _rows(walk, eqn, weight: Weight, picks: _Picks) -> jax.Array:
    [base] = walk.bind(eqn, weight.value, picks.indices)
    if weight.a is None:
        return base
    gathered = partial(_gathered, weight=weight, picks=picks)
    factors = ordered_factors(weight, [weight.labels[axis] for axis in picks.chosen])
    first, second = taken_factors(factors, weight.scale, weight.value.dtype)
    update = contract(gathered(first), second, [RANK], **wide(weight.value.dtype))
    order = [axis.label for axis in _axes_of_result(weight, picks)]
    if weight.replaced is not None:
        base = masked_base(base, gathered(weight.replaced), order)
    total = sum_in_float32(base, update.grouped(*([label] for label in order)))
    if weight.magnitude is not None:
        total = total * gathered(weight.magnitude).over(order)
    return in_dtype(total, base.dtype)


def _picks(params, weight: Weight, indices: jax.Array) -> _Picks:
    """Raises where the factors can't be gathered as the weight is."""
    numbers, shape, sizes = params["dimension_numbers"], weight.value.shape, params["slice_sizes"]
    indexed = tuple(numbers.start_index_map)
    paired = dict(
        zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
    )
    narrow = {axis for axis in range(len(shape)) if sizes[axis] != shape[axis]} - set(paired)
    parts = narrow | set(numbers.collapsed_slice_dims)
    # Where the indices choose nothing, an axis of size 1 is what they were made for.
    chosen = parts or {axis for axis in indexed if shape[axis] == 1}
    if not chosen or not chosen <= set(indexed):
        raise NotLowRank("takes a part of an axis that has no index")
    picks = _Picks(params, indices, tuple(axis for axis in indexed if axis in chosen), paired)
    _require_fill_without_update(picks, weight)
    if weight.a is not None:
        _require_roles(picks, weight)
    return picks


def _require_fill_without_update(picks: _Picks, weight: Weight) -> None:
    """Out of bounds the update is zero, and a magnitude leaves only 0 and NaN as they are."""
    if picks.params["mode"] is not lax.GatherScatterMode.FILL_OR_DROP:
        return
    fill = picks.params["fill_value"]
    if weight.magnitude is not None and not (fill is None or fill == 0 or math.isnan(fill)):
        raise NotLowRank("fills in a number where an index is out of bounds")
    if len(picks.chosen) != len(picks.params["dimension_numbers"].start_index_map):
        raise NotLowRank("has indices along an axis that is taken whole")


def _require_roles(picks: _Picks, weight: Weight) -> None:
    stack = weight.stack_labels()
    if not all(weight.labels[axis] in stack for axis in picks.paired):
        raise NotLowRank("is indexed in batch along an input or output axis")
    if not _new_axes(picks):
        return
    a, b = weight.factors()
    chosen = [weight.labels[axis] for axis in picks.chosen]
    homes = {(label in a.labels, label in b.labels) for label in chosen}
    if len(homes) > 1:
        raise NotLowRank("is picked from along axes of different roles")
    if not set(chosen) <= set(stack) and _has_windows(picks):
        raise NotLowRank("is taken in many windows along an input or output axis")


def _has_windows(picks: _Picks) -> bool:
    return any(picks.params["slice_sizes"][axis] != 1 for axis in picks.chosen)


def _new_axes(picks: _Picks) -> list[int]:
    """The axes of the indices that no axis of the weight runs along with."""
    return [axis for axis in range(picks.indices.ndim - 1) if axis not in picks.paired.values()]


def _collapsed(picks: _Picks) -> tuple[int, ...]:
    return tuple(picks.params["dimension_numbers"].collapsed_slice_dims)


def _axes_of_indices(weight: Weight, picks: _Picks) -> list[Axis]:
    """An axis of the weight for each axis of the indices; the new ones are of what they choose."""
    first, base = (
        fresh_label(weight),
        frozenset().union(*(weight.axes[k].base for k in picks.chosen)),
    )
    axes = {of_indices: weight.axes[axis] for axis, of_indices in picks.paired.items()}
    return [axes.get(k, Axis(first + k, base)) for k in range(picks.indices.ndim - 1)]


def _axes_of_result(weight: Weight, picks: _Picks) -> list[Axis]:
    gone = {*_collapsed(picks), *picks.paired}
    kept = [axis for k, axis in enumerate(weight.axes) if k not in gone]
    offsets = picks.params["dimension_numbers"].offset_dims
    axes = dict(zip(map(int, offsets), kept, strict=True))
    others = iter(_axes_of_indices(weight, picks))
    count = len(kept) + picks.indices.ndim - 1
    return [axes[k] if k in axes else next(others) for k in range(count)]


def _gathered(factor: Factor, weight: Weight, picks: _Picks) -> Factor:
    """The factor's share of the gather: the indices' axes first, then its own.

    What the base fills in for an index out of bounds gets no update: the fill is zero here.
    """
    chosen = [axis for axis in picks.chosen if weight.labels[axis] in factor.labels]
    if not chosen:
        return factor
    order = [label for label in (*weight.labels, RANK) if label in factor.labels]
    places = {k: order.index(each) for k, each in enumerate(weight.labels) if each in order}
    array = factor.grouped(*([label] for label in order))
    sizes = [*(picks.params["slice_sizes"][axis] for axis in places), *array.shape[len(places) :]]
    numbers = _numbers(places, chosen, picks, array.ndim)
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    own = [label for k, label in enumerate(order) if k not in gone]
    labels = (*(axis.label for axis in _axes_of_indices(weight, picks)), *own)
    indices, told = _columns(chosen, picks)
    mode = picks.params["mode"]
    return Factor(
        lax.gather(array, indices, numbers, sizes, fill_value=0, mode=mode, **told), labels
    )


def _numbers(
    places: dict[int, int], chosen: list[int], picks: _Picks, ndim: int
) -> lax.GatherDimensionNumbers:
    """The base gather's dimension numbers for a factor that has its axes at ``places``."""
    collapsed = tuple(places[axis] for axis in _collapsed(picks) if axis in places)
    lead, kept = picks.indices.ndim - 1, ndim - len(collapsed) - len(picks.paired)
    return lax.GatherDimensionNumbers(
        offset_dims=tuple(range(lead, lead + kept)),
        collapsed_slice_dims=collapsed,
        start_index_map=tuple(places[axis] for axis in chosen),
        operand_batching_dims=tuple(places[axis] for axis in picks.paired),
        start_indices_batching_dims=tuple(picks.paired.values()),
    )


def _columns(chosen: list[int], picks: _Picks) -> tuple[jax.Array, dict[str, bool]]:
    """The indices along the chosen axes; what is told of all of them may not hold of some."""
    indexed = list(picks.params["dimension_numbers"].start_index_map)
    if chosen == indexed:
        told = {name: picks.params[name] for name in ("unique_indices", "indices_are_sorted")}
        return picks.indices, told
    last = picks.indices.ndim - 1
    columns = [indexed.index(axis) for axis in chosen]
    parts = [lax.slice_in_dim(picks.indices, k, k + 1, axis=last) for k in columns]
    return lax.concatenate(parts, last), {}
