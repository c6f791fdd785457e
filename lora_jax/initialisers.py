"""Fresh adapters: A by a table of initialisers, B zero, so that the base function is unchanged."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapter import Adapter, LoraPair, check_params
from lora_jax.paths import path_key
from lora_jax.site import Plan, Site


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
      params: the base parameter tree that ``plan`` was made from (arrays or shapes).
      plan: which weights are adapted, and how.

    Returns:
      ``{path: LoraPair(a, b)}`` in float32.

    Raises:
      InputError: the plan names leaves that ``params`` lacks, or whose shape differs.

    >>> site = Site("w", (4, 6), "float32", ("in", "out"), rank=2, scale=1.0)
    >>> adapter = init(jax.random.key(0), {"w": jnp.ones((4, 6))}, Plan((site,), 24))
    >>> adapter["w"].a.shape, float(abs(adapter["w"].b).max())
    ((4, 2), 0.0)
    """
    check_params(params, plan)
    return {site.path: _fresh(path_key(key, site.path), site) for site in plan.sites}


def _fresh(key: jax.Array, site: Site) -> LoraPair:
    return LoraPair(_INITIALISERS[site.init](key, site), jnp.zeros(site.b_shape, jnp.float32))
