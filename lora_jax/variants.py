"""The maths of one weight: its update ΔW = scale · A B in the weight's own axes."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.adapter import LoraPair
from lora_jax.site import ROLES, Site


def delta_weight(site: Site, pair: LoraPair) -> jax.Array:
    """ΔW = scale · A B, in the axes of the weight and at least in float32.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.

    Args:
      site: the weight's shape, axis roles and scale.
      pair: ``a`` (\\*stack, \\*in, rank) and ``b`` (\\*stack, rank, \\*out).

    Returns:
      An array of ``site.shape``.

    >>> site = Site("w", (2, 3), "float32", ("out", "in"), rank=1, scale=2.0)
    >>> pair = LoraPair(jnp.array([[1.0], [2.0], [3.0]]), jnp.array([[1.0, 10.0]]))
    >>> delta_weight(site, pair)
    Array([[ 2.,  4.,  6.],
           [20., 40., 60.]], dtype=float32)
    """
    stack, inputs, outputs = (site.dims(role) for role in ROLES)
    a = pair.a.reshape(*stack, math.prod(inputs), site.rank)
    b = pair.b.reshape(*stack, site.rank, math.prod(outputs))
    product = at_least_float32(a) @ at_least_float32(b) * site.scale
    grouped = [axis for role in ROLES for axis in site.axes(role)]
    return product.reshape(*stack, *inputs, *outputs).transpose(_inverse(grouped))


def effective_weight(site: Site, weight: jax.Array, pair: LoraPair) -> jax.Array:
    """W + ΔW, summed in float32 (or wider) and rounded once to the weight's dtype."""
    return (at_least_float32(weight) + delta_weight(site, pair)).astype(weight.dtype)


def at_least_float32(array: jax.Array) -> jax.Array:
    """The array in float32, or as it is where its dtype is wider."""
    return in_dtype(array, jnp.promote_types(array.dtype, jnp.float32))


def in_dtype(array: jax.Array, dtype: Any) -> jax.Array:
    """The array in ``dtype``; the same object where it is already, which keeps tracing quick."""
    return array if array.dtype == dtype else lax.convert_element_type(array, dtype)


def _inverse(permutation: list[int]) -> list[int]:
    return sorted(range(len(permutation)), key=permutation.__getitem__)
