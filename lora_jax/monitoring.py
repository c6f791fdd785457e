"""How far an adapter has moved each weight: the norm of ΔW, and its ratio to the weight's own."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.adapter import Adapter
from lora_jax.paths import named_leaves
from lora_jax.site import ROLES, Plan, Site
from lora_jax.variants import at_least_float32, scaled_bias


class Movement(NamedTuple):
    """Of one site, over all of its stack: float32 scalars."""

    delta_norm: jax.Array
    """‖ΔW‖, Frobenius; of a leaf that is trained whole ‖value - W‖."""
    ratio: jax.Array
    """‖ΔW‖ / ‖W‖."""


def movements(params: Any, adapter: Adapter, plan: Plan) -> dict[str, Movement]:
    """The norm of every site's ΔW = scale·A·B, from Gram matrices of rank's size.

    ‖A·B‖² = ⟨AᵀA, BBᵀ⟩, so nothing of a weight's shape is formed. DoRA's magnitude is left out of
    account. It can be jitted, with ``plan`` static.

    >>> site = Site("w", (2, 2), "float32", ("in", "out"), rank=1, scale=2.0)
    >>> from lora_jax.adapter import LoraPair
    >>> adapter = {"w": LoraPair(jnp.array([[3.0], [4.0]]), jnp.array([[1.0, 0.0]]))}
    >>> movements({"w": jnp.eye(2)}, adapter, Plan((site,), 4))["w"].delta_norm
    Array(10., dtype=float32)
    """
    leaves = named_leaves(params)
    return {
        site.path: _movement(site, leaves[site.path], adapter[site.path]) for site in plan.sites
    }


def _movement(site: Site, leaf: Any, entry: Any) -> Movement:
    weight = at_least_float32(jnp.asarray(leaf))
    delta = _DELTA_NORM[site.variant](site, weight, entry)
    norm = jnp.linalg.norm(weight)
    return Movement(delta, delta / jnp.where(norm == 0, 1, norm))


def _low_rank_norm(site: Site, weight: jax.Array, entry: Any) -> jax.Array:
    stack, inputs, outputs = (site.dims(role) for role in ROLES)
    a = entry.a.reshape(*stack, math.prod(inputs), site.rank)
    b = entry.b.reshape(*stack, site.rank, math.prod(outputs))
    gram_a, gram_b = jnp.swapaxes(a, -1, -2) @ a, b @ jnp.swapaxes(b, -1, -2)
    squares = jnp.maximum((gram_a * gram_b).sum((-1, -2)), 0)
    scale = jnp.asarray(site.scale)
    scale = scale.reshape(-1, *(1,) * (squares.ndim - 1)) if scale.ndim else scale
    return jnp.sqrt((scale**2 * squares).sum())


def _whole_norm(site: Site, weight: jax.Array, entry: Any) -> jax.Array:
    return jnp.linalg.norm(entry.value - weight)


def _rows_norm(site: Site, weight: jax.Array, entry: Any) -> jax.Array:
    return jnp.linalg.norm(entry.rows - weight[jnp.array(site.rows)])


def _bias_norm(site: Site, weight: jax.Array, entry: Any) -> jax.Array:
    return jnp.linalg.norm(scaled_bias(site, entry))


_DELTA_NORM = {
    "lora": _low_rank_norm,
    "dora": _low_rank_norm,
    "full": _whole_norm,
    "rows": _rows_norm,
    "bias": _bias_norm,
}
