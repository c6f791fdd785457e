"""Fresh adapters: A by a table of initialisers, B zero, so that the base function is unchanged."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapter import Adapter, Bias, DoraTriple, Full, LoraPair, Rows, check_params
from lora_jax.paths import named_leaves, path_key
from lora_jax.site import Plan, Site
from lora_jax.variants import at_least_float32, magnitude_norm, values_of


def _kaiming_uniform(key: jax.Array, site: Site) -> jax.Array:
    bound = 1 / math.sqrt(site.fan_in)
    return jax.random.uniform(key, site.a_shape, jnp.float32, -bound, bound)


def _gaussian(key: jax.Array, site: Site) -> jax.Array:
    std = 1 / site.rank if site.init_std is None else site.init_std
    return std * jax.random.normal(key, site.a_shape, jnp.float32)


_INITIALISERS: dict[str, Callable[[jax.Array, Site], jax.Array]] = {
    "kaiming_uniform": _kaiming_uniform,
    "gaussian": _gaussian,
}
"""How A starts, by name. ``kaiming_uniform`` is U(-1/√in, 1/√in), what PEFT and loralib do
(He et al., arXiv:1502.01852, with a = √5); ``gaussian`` is N(0, std²), the paper's choice."""


def init(key: jax.Array, params: Any, plan: Plan) -> Adapter:
    """A fresh adapter: the adapted function equals the base function until it is trained.

    Each weight's random key is derived from its path, so that adding or removing a target
    leaves the values of the others as they were.

    Args:
      key: a JAX random key.
      params: the base parameter tree that ``plan`` was made from. Plain LoRA needs its shapes
        alone; a magnitude, a leaf trained whole and trained rows start from its values.
      plan: which weights are adapted, and how.

    Returns:
      ``{path: entry}`` in float32: `LoraPair`, `DoraTriple`, `Full`, `Rows` or `Bias`.

    Raises:
      InputError: the plan names leaves that ``params`` lacks, or whose shape or dtype differs,
        or whose values are needed and not there.

    >>> site = Site("w", (4, 6), "float32", ("in", "out"), rank=2, scale=1.0)
    >>> adapter = init(jax.random.key(0), {"w": jnp.ones((4, 6))}, Plan((site,), 24))
    >>> adapter["w"].a.shape, float(abs(adapter["w"].b).max())
    ((4, 2), 0.0)
    """
    check_params(params, plan)
    leaves = named_leaves(params)
    return {
        site.path: _FRESH[site.variant](path_key(key, site.path), site, leaves[site.path])
        for site in plan.sites
    }


def _fresh_lora(key: jax.Array, site: Site, leaf: Any) -> LoraPair:
    a = _INITIALISERS[site.init](key, site)
    return LoraPair(_zero_beyond_rank(a, site), jnp.zeros(site.b_shape, jnp.float32))


def _fresh_dora(key: jax.Array, site: Site, leaf: Any) -> DoraTriple:
    pair = _fresh_lora(key, site, leaf)
    return DoraTriple(*pair, magnitude_norm(site, values_of(site, leaf), pair))


def _fresh_full(key: jax.Array, site: Site, leaf: Any) -> Full:
    return Full(_copied(values_of(site, leaf)))


def _fresh_rows(key: jax.Array, site: Site, leaf: Any) -> Rows:
    return Rows(site.rows, at_least_float32(values_of(site, leaf)[jnp.array(site.rows)]))


def _fresh_bias(key: jax.Array, site: Site, leaf: Any) -> Bias:
    return Bias(jnp.zeros(site.shape, jnp.float32))


_FRESH: dict[str, Callable[[jax.Array, Site, Any], Any]] = {
    "lora": _fresh_lora,
    "dora": _fresh_dora,
    "full": _fresh_full,
    "rows": _fresh_rows,
    "bias": _fresh_bias,
}


def _copied(leaf: jax.Array) -> jax.Array:
    """In memory of its own: an optimizer step donates the adapter, and must not take the base."""
    return jnp.array(at_least_float32(leaf), copy=True)


def _zero_beyond_rank(a: jax.Array, site: Site) -> jax.Array:
    """A with zeros beyond each layer's rank; B is zero too, so they stay zero in training."""
    if not site.ranks:
        return a
    ranks = jnp.array(site.ranks).reshape(-1, *(1,) * (a.ndim - 1))
    return jnp.where(jnp.arange(site.rank) < ranks, a, 0)
