"""Matrix products: dot_general, whatever its axes, and ragged_dot over a mixture's experts.

To add a rule: write it and give it a row in `DOTS`.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.rewrite.products import (
    TOKENS,
    Operand,
    Product,
    adapted_product,
    as_operand,
    meeting_of,
    ordered_factors,
    product_dtype,
    taken_factors,
    wide,
)
from lora_jax.rewrite.weight import RANK, Factor, NotLowRank, RolesContradict, Weight, contract
from lora_jax.variants import in_dtype


def dot_general(walk, eqn, lhs: Any, rhs: Any):
    """x·W + scale·(x·A)·B, with the weight on either side."""
    if isinstance(rhs, Weight):
        lhs = walk.plain(lhs, eqn, NotLowRank("is contracted with another adapted weight"))
    weight_first = isinstance(lhs, Weight)
    weight: Weight = lhs if weight_first else rhs
    x: Any = rhs if weight_first else lhs
    operands = _operands(eqn.params["dimension_numbers"], lhs, rhs)
    of_weight, of_x = operands if weight_first else operands[::-1]
    walk.note(weight, eqn, meeting=meeting_of(weight, of_weight))
    if weight.a is None:
        return walk.bind(eqn, walk.value(lhs), walk.value(rhs))
    contracted, batch, free = ([weight.labels[k] for k in axes] for axes in of_weight)
    if not set(batch) <= set(weight.stack_labels()):
        raise RolesContradict("runs in batch over an input or output axis")
    factors = ordered_factors(weight, contracted)
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
            dtype=product_dtype(weight, x),
            scale=weight.scale,
            precision=eqn.params["precision"],
        )

    return [adapted_product(walk, weight, x, Product(base, update, x_labels, y_labels))]


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
    walk.note(weight, eqn, meeting=meeting_of(weight, Operand(contracted, groups, free)))
    if weight.a is None:
        return walk.bind(eqn, x, weight.value, group_sizes)
    expert, inputs, outputs = ([weight.labels[k] for k in ks] for ks in (groups, contracted, free))
    if not set(expert) <= set(weight.stack_labels()):
        raise RolesContradict("has groups along an input or output axis")
    first, second = ordered_factors(weight, inputs)
    dtype = product_dtype(weight, x)
    options = {"precision": eqn.params["precision"], **wide(dtype)}
    first, second = taken_factors((first, second), weight.scale, dtype)
    down = first.grouped(expert, inputs, [RANK])
    up = second.grouped(expert, [RANK], outputs)

    def base(x: jax.Array) -> jax.Array:
        return walk.bind(eqn, x, weight.value, group_sizes)[0]

    def update(x: jax.Array) -> jax.Array:
        hidden = lax.ragged_dot(in_dtype(x, dtype), down, group_sizes, **options)
        return lax.ragged_dot(in_dtype(hidden, dtype), up, group_sizes, **options)

    of_rows = _by_row(weight, expert[0], group_sizes, x.shape[0])
    product = Product(base, update, (TOKENS, *inputs), (TOKENS, *outputs))
    return [adapted_product(walk, of_rows, x, product)]


DOTS = {"dot_general": dot_general, "ragged_dot_general": ragged_dot}


def _operands(dimension_numbers, lhs, rhs) -> tuple[Operand, Operand]:
    contract, batch = dimension_numbers
    left, right = (_operand(*axes) for axes in zip(contract, batch, (lhs, rhs), strict=True))
    return left, right


def _operand(contract, batch, x) -> Operand:
    rank = len(x.axes) if isinstance(x, Weight) else x.ndim
    free = tuple(axis for axis in range(rank) if axis not in (*contract, *batch))
    return Operand(tuple(contract), tuple(batch), free)


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
    tokens = as_operand(_with_tokens_as_one(x, list(contracted), list(batch)), dtype)
    down, up = taken_factors(factors, scale, dtype)
    options = {"precision": precision, **wide(dtype)}
    operands = (down, tokens) if weight_first else (tokens, down)
    hidden = as_operand(contract(*operands, contracted, **options), dtype)
    operands = (up, hidden) if weight_first else (hidden, up)
    product = contract(*operands, [RANK], **options)
    order = (*batch, *free, TOKENS) if weight_first else (*batch, TOKENS, *free)
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
    ndim: int, axes: Operand, contracted: list[int], batch: list[int]
) -> tuple[int, ...]:
    """The weight's labels for the axes that the two share, labels of their own for the others."""
    names = dict(zip((*axes.contract, *axes.batch), (*contracted, *batch), strict=True))
    return tuple(names.get(axis, TOKENS - axis) for axis in range(ndim))


def _with_tokens_as_one(x: Factor, contracted: list[int], batch: list[int]) -> Factor:
    """The activation with its token axes flattened to one."""
    tokens = [label for label in x.labels if label not in (*contracted, *batch)]
    order = (*batch, TOKENS, *contracted)
    return Factor(x.grouped(*(tokens if each == TOKENS else [each] for each in order)), order)


def _by_row(weight: Weight, expert: int, group_sizes: jax.Array, rows: int) -> Weight:
    """The weight with its magnitude given for each row of x, instead of for each group."""
    if (gain := weight.magnitude) is None:
        return weight
    grouped = gain.leading(expert)
    of_rows = jnp.repeat(grouped.array, group_sizes, axis=0, total_repeat_length=rows)
    return replace(weight, magnitude=Factor(of_rows, (TOKENS, *grouped.labels[1:])))
