"""Weights stacked inside the function, as layers that are scanned: one weight of several leaves.

The factors are stacked beside the values; a plain array among them has zero factors. To add a
rule: write it and give it a row in `STACKING`.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.rewrite.views import add_units
from lora_jax.rewrite.weight import FACTORS, RANK, Axis, Factor, NotLowRank, Weight


def concatenate(walk, eqn, *pieces):
    """Join along an axis that every factor carries; along others W + ΔW is formed."""
    [value] = walk.bind(eqn, *map(walk.value, pieces))
    axis = eqn.params["dimension"]
    sizes = [walk.value(piece).shape[axis] for piece in pieces]
    return [_joined(pieces, axis, sizes, value)]


def stack(walk, eqn, *pieces):
    """As `concatenate`, along an axis made for it."""
    [value] = walk.bind(eqn, *map(walk.value, pieces))
    axis = eqn.params["axis"]
    lifted = [add_units(x, [axis]) if isinstance(x, Weight) else x for x in pieces]
    return [_joined(lifted, axis, [1] * len(pieces), value)]


STACKING = {"concatenate": concatenate, "stack": stack}


def _joined(pieces: Sequence[Any], axis: int, sizes: list[int], value: jax.Array) -> Weight:
    weights = [piece for piece in pieces if isinstance(piece, Weight)]
    first, label = weights[0], weights[0].labels[axis]
    axes = [_same_axis(same) for same in zip(*(weight.axes for weight in weights), strict=True)]
    paths = dict.fromkeys(path for each in weights for path in (each.site.path, *each.others))
    others = tuple(path for path in paths if path != first.site.path)
    joined = replace(first.viewed(value, axes), others=others)
    if first.a is None:
        return joined  # Whether it only stacks is told once the roles are known.
    aligned = [_aligned(weight, first.labels) for weight in weights]
    _require_stacking(weights, aligned, label)
    members = iter(_with_one_scale(aligned))
    # A plain array has the factors of the first weight, emptied.
    every = [
        next(members) if isinstance(piece, Weight) else _without_update(aligned[0], label, size)
        for piece, size in zip(pieces, sizes, strict=True)
    ]
    scale = first.scale if _one_scale(weights) else 1.0
    return replace(joined, scale=scale, **_stacked_factors(every, label))


def _same_axis(same: Sequence[Axis]) -> Axis:
    return Axis(same[0].label, frozenset().union(*(axis.base for axis in same)))


def _aligned(weight: Weight, labels: Sequence[int]) -> Weight:
    """The weight with ``labels`` on its axes, and its factors' axes in that order."""
    names = dict(zip((*weight.labels, RANK), (*labels, RANK), strict=True))

    def renamed(factor: Factor) -> Factor:
        own = Factor(factor.array, tuple(names[label] for label in factor.labels))
        order = tuple(label for label in (*labels, RANK) if label in own.labels)
        return Factor(own.grouped(*((label,) for label in order)), order)

    return weight.map_factors(renamed)


def _require_stacking(weights: Sequence[Weight], aligned: Sequence[Weight], label: int) -> None:
    if len({tuple(_labels_by_name(weight).items()) for weight in aligned}) > 1:
        raise NotLowRank("is stacked with weights of other axis roles or another variant")
    if not all(label in labels for labels in _labels_by_name(aligned[0]).values()):
        raise NotLowRank("is joined with others along an input or output axis")
    if len({weight.site.dropout for weight in weights}) > 1:
        raise NotLowRank("is stacked with weights of other dropout rates")


def _labels_by_name(weight: Weight) -> dict[str, tuple[int, ...]]:
    return {name: factor.labels for name, factor in _factors_by_name(weight).items()}


def _factors_by_name(weight: Weight) -> dict[str, Factor]:
    found = {name: getattr(weight, name) for name in FACTORS}
    return {name: factor for name, factor in found.items() if factor is not None}


def _one_scale(weights: Sequence[Weight]) -> bool:
    return len({weight.scale for weight in weights}) == 1


def _with_one_scale(weights: Sequence[Weight]) -> Sequence[Weight]:
    """The weights; where their scales differ, each with its own in B."""
    if _one_scale(weights):
        return weights
    return [
        replace(weight, b=replace(b, array=b.array * weight.scale))
        for weight, b in ((weight, weight.factors()[1]) for weight in weights)
    ]


def _without_update(like: Weight, label: int, size: int) -> Weight:
    """A weight whose ΔW is zero, of ``size`` along the stacked axis."""

    def emptied(factor: Factor) -> Factor:
        neutral = 0 if RANK in factor.labels or factor.array.dtype == bool else 1
        shape = list(factor.array.shape)
        shape[factor.labels.index(label)] = size
        return replace(factor, array=lax.full(shape, neutral, factor.array.dtype))

    return like.map_factors(emptied)


def _stacked_factors(weights: Sequence[Weight], label: int) -> dict[str, Factor]:
    rank = max(weight.factors()[0].size([RANK]) for weight in weights)
    members = [_factors_by_name(each.map_factors(partial(_padded, rank=rank))) for each in weights]

    def stacked(name: str, labels: tuple[int, ...]) -> Factor:
        arrays = [factors[name].array for factors in members]
        return Factor(jnp.concatenate(arrays, labels.index(label)), labels)

    return {name: stacked(name, factor.labels) for name, factor in members[0].items()}


def _padded(factor: Factor, rank: int) -> Factor:
    """Zeros along the rank axis, where there is one, until it is ``rank`` long."""

    def pad(array: jax.Array, at: int) -> jax.Array:
        widths = [(0, 0)] * array.ndim
        widths[at] = (0, rank - array.shape[at])
        return array if array.shape[at] == rank else jnp.pad(array, widths)

    return factor.along(RANK, pad)
