"""Convolutions, with the factors that PEFT gives them.

To add a rule: write it and give it a row in `CONVOLUTIONS`.
"""

from typing import Any

import jax
from jax import lax

from lora_jax.rewrite.products import (
    TOKENS,
    Operand,
    Product,
    adapted_product,
    meeting_of,
    ordered_factors,
    taken_factors,
    wide,
)
from lora_jax.rewrite.weight import RANK, Factor, NotLowRank, Weight, contract, fresh_label


def convolution(walk, eqn, x: Any, weight: Any):
    """conv(x, W) + scale·(conv(x, A) contracted with B over channels), as PEFT has it.

    A is a kernel of the same window with ``rank`` output channels, B mixes channels alone. Under
    feature groups every group has the same A and its own columns of B.
    """
    if not isinstance(weight, Weight) or isinstance(x, Weight):
        raise NotLowRank("convolves with the weight as the input")
    params = eqn.params
    out_axis, *window = params["dimension_numbers"].rhs_spec
    kernel_axes = Operand(contract=tuple(window), batch=(), free=(out_axis,))
    walk.note(weight, eqn, meeting=meeting_of(weight, kernel_axes))
    if weight.a is None:
        return walk.bind(eqn, x, weight.value)
    if params["batch_group_count"] != 1:
        raise NotLowRank("convolves in batch groups")
    factors = ordered_factors(weight, [weight.labels[k] for k in window])
    first, second = taken_factors(factors, weight.scale, weight.value.dtype)
    out = weight.labels[out_axis]
    order = [RANK if label == out else label for label in weight.labels]
    kernel = first.grouped(*([label] for label in order))
    y_labels = [TOKENS - axis for axis in range(x.ndim)]
    y_labels[params["dimension_numbers"].out_spec[1]] = out

    def base(x: jax.Array) -> jax.Array:
        return walk.bind(eqn, x, weight.value)[0]

    def update(x: jax.Array) -> jax.Array:
        hidden = _convolved(x, kernel, out_axis, params)
        return _mixed_channels(hidden, second, weight, params)

    return [adapted_product(walk, weight, x, Product(base, update, (), tuple(y_labels)))]


CONVOLUTIONS = {"conv_general_dilated": convolution}


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
    labels = [TOKENS - axis for axis in range(len(split))]
    labels[channel : channel + 2] = [group, RANK]
    channels = Factor(lax.reshape(hidden, split), tuple(labels))
    mixed = contract(channels, up, [RANK], **wide(weight.value.dtype))
    order = [*labels[:channel], group, out_in_group, *labels[channel + 2 :]]
    return mixed.grouped(*([label] for label in order))
