"""What every product of an activation with an adapted weight has in common.

A rule emits the base equation unchanged and adds the product with the two factors, the one that
carries the contracted axes first: dots.py, convolutions.py and gathers.py have the rules.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.rewrite.weight import Axis, Factor, NotLowRank, RolesContradict, Weight
from lora_jax.variants import at_least_float32, in_dtype

TOKENS = -2
"""The label under which all token axes of an activation are one."""


class Meeting(NamedTuple):
    """Which axes of the *base* weight an operation contracts, runs over in batch, and leaves."""

    contracted: frozenset[Any]
    batch: frozenset[Any]
    free: frozenset[Any]


class Operand(NamedTuple):
    """Axes of one operand of a dot_general."""

    contract: tuple[int, ...]
    batch: tuple[int, ...]
    free: tuple[int, ...]


class Product(NamedTuple):
    """A product of an activation with an adapted weight, as functions of the activation."""

    base: Callable[[jax.Array], jax.Array]
    update: Callable[[jax.Array], jax.Array]
    """scale·(x·A)·B, in float32 or wider."""
    x_labels: tuple[int, ...]
    """The weight's labels on the activation's axes, and others."""
    y_labels: tuple[int, ...]
    """The same of the result's."""


def meeting_of(weight: Weight, operand: Operand) -> Meeting:
    """The meeting in axes of the base weight, from axes of the view."""
    return Meeting(*(frozenset().union(*(weight.axes[k].base for k in axes)) for axes in operand))


def ordered_factors(weight: Weight, contracted: list[int]) -> tuple[Factor, Factor]:
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


def adapted_product(walk, weight: Weight, x: jax.Array, product: Product) -> jax.Array:
    """The base product of x plus the adapter's share, which alone sees x under dropout.

    Without a magnitude the share is the low-rank update. With one it is, as in PEFT, everything
    by which the result would differ from the base if all of it saw the dropped x.
    """
    kept, gain = walk.dropped(x, weight), weight.magnitude
    if weight.replaced is not None:
        replaced = _without(weight.replaced, _contracted_units(weight, product))
        return _with_rows_replaced(replaced, x, product)
    if gain is None:
        base = product.base(x)
        return _sum_rounded_once(base, product.update(kept))
    if kept is x:
        return _rescaled_product(weight, gain, x, product)
    base, inner = product.base(x), at_least_float32(product.base(kept))
    share = at_least_float32(_rescaled_product(weight, gain, kept, product)) - inner
    return in_dtype(at_least_float32(base) + share, base.dtype)


def taken_factors(
    factors: tuple[Factor, Factor], scale: float, dtype: Any
) -> tuple[Factor, Factor]:
    """The two factors as the products take them: in ``dtype``, the scale in the second.

    The scale meets B before it is cast: scale·(x·A) may be too large for float16.
    """
    first, second = factors
    scaled = second.array if scale == 1 else second.array * scale
    return as_operand(first, dtype), replace(second, array=in_dtype(scaled, dtype))


def as_operand(factor: Factor, dtype: Any) -> Factor:
    """The array as a product in ``dtype`` takes it."""
    return replace(factor, array=in_dtype(factor.array, dtype))


def product_dtype(weight: Weight, x: jax.Array) -> Any:
    """What the low-rank products compute in: the wider of the weight's dtype and x's."""
    return jnp.promote_types(weight.value.dtype, x.dtype)


def wide(dtype: Any) -> dict[str, Any]:
    """The option by which a product is summed in float32 or wider."""
    return {"preferred_element_type": jnp.promote_types(dtype, jnp.float32)}


def sum_in_float32(base: jax.Array, update: jax.Array) -> jax.Array:
    """base + update in float32 or wider, in the shape of the base product."""
    base = at_least_float32(base)
    return lax.add(base, in_dtype(lax.reshape(update, base.shape), base.dtype))


def masked_base(base: jax.Array, replaced: Factor, labels: Sequence[int]) -> jax.Array:
    """The base product without what comes of replaced rows, whatever they hold."""
    return jnp.where(replaced.over(labels), 0, base).astype(base.dtype)


def _with_rows_replaced(replaced: Factor, x: jax.Array, product: Product) -> jax.Array:
    if set(replaced.labels) <= set(product.y_labels):
        base = masked_base(product.base(x), replaced, product.y_labels)
    elif set(replaced.labels) <= set(product.x_labels):
        base = product.base(masked_base(x, replaced, product.x_labels))
    else:
        raise NotLowRank("has replaced rows along an axis that neither input nor result has")
    return _sum_rounded_once(base, product.update(x))


def _rescaled_product(weight: Weight, gain: Factor, x: jax.Array, product: Product) -> jax.Array:
    """W's outputs are rescaled: in the result where they remain, in x where they are contracted."""
    gain = _without(gain, _contracted_units(weight, product))
    if set(gain.labels) <= set(product.y_labels):
        base = product.base(x)
        total = sum_in_float32(base, product.update(x)) * gain.over(product.y_labels)
        return in_dtype(total, base.dtype)
    if set(gain.labels) <= set(product.x_labels):
        x = in_dtype(x * gain.over(product.x_labels), x.dtype)
        base = product.base(x)
        return in_dtype(sum_in_float32(base, product.update(x)), base.dtype)
    raise NotLowRank("has a magnitude along axes that neither the input nor the result has")


def _contracted_units(weight: Weight, product: Product) -> set[int]:
    """Axes of size 1 made on the way that the result hasn't."""
    return {axis.label for axis in weight.axes if not axis.base}.difference(product.y_labels)


def _made_on_the_way(weight: Weight) -> Iterable[tuple[Axis, int]]:
    sized = zip(weight.axes, weight.value.shape, strict=True)
    return ((axis, size) for axis, size in sized if not axis.base)


def _without(factor: Factor, units: Iterable[int]) -> Factor:
    for label in units:
        factor = factor.without(label)
    return factor


@partial(jax.jit, inline=True)
def _sum_rounded_once(base: jax.Array, update: jax.Array) -> jax.Array:
    return in_dtype(sum_in_float32(base, update), base.dtype)
