"""Folding an adapter into the base: a new tree, leaf by leaf; the old one is untouched."""

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapter import Adapter, check, check_params
from lora_jax.paths import named_leaves, replace_leaves
from lora_jax.site import Plan, Site
from lora_jax.variants import at_least_float32, effective_weight, exact_weight


def merge(params: Any, adapter: Adapter, plan: Plan) -> Any:
    """The base with every entry of the adapter folded in: W + ΔW, and so on by variant.

    Each sum is taken in float32 and rounded once to the weight's dtype. Leaves that are not
    adapted are the same objects as in ``params``. It can be traced: inside a loss, with the
    gradient taken with respect to ``adapter``, it is the classic form of LoRA, at the cost of
    full fine-tuning; `adapt` is the same function for less. There is no unmerge: keep the old
    tree.

    Args:
      params: the base parameter tree.
      adapter: ``{path: entry}``.
      plan: the plan that the adapter was made from.

    Returns:
      A tree of the same structure, shapes and dtypes as ``params``.

    Raises:
      InputError: ``params`` or ``adapter`` do not fit ``plan``.

    >>> from lora_jax import LoraConfig, init, plan_from_axes
    >>> params = {"w": jnp.ones((4, 6)), "b": jnp.zeros(6)}
    >>> plan = plan_from_axes(params, LoraConfig(rank=2, targets="w"), {"w": "in out"})
    >>> adapter = init(jax.random.key(0), params, plan)
    >>> merged = merge(params, adapter, plan)
    >>> bool((merged["w"] == params["w"]).all()), merged["b"] is params["b"]
    (True, True)
    """
    check_params(params, plan)
    check(adapter, plan)
    leaves = named_leaves(params)
    merged = {
        site.path: _merged(site, jnp.asarray(leaves[site.path]), adapter[site.path])
        for site in plan.sites
    }
    return replace_leaves(params, merged)


def _merged(site: Site, weight: jax.Array, entry: Any) -> jax.Array:
    """In memory of its own: the adapter may be donated afterwards."""
    return jnp.array(effective_weight(site, weight, entry), copy=site.is_whole)


def rounding_loss(params: Any, merged: Any, adapter: Adapter, plan: Plan) -> dict[str, float]:
    """The largest error that rounding to the base's dtype made, per adapted weight.

    In float32 this is some 1e-8; in bfloat16 a small ΔW can lose most of itself.

    Returns:
      ``{path: max |(W + ΔW in float32) - merged W|}``.
    """
    check_params(params, plan)
    check_params(merged, plan)
    check(adapter, plan)
    before, after = named_leaves(params), named_leaves(merged)

    def lost(path: str) -> float:
        exact = exact_weight(plan[path], jnp.asarray(before[path]), adapter[path])
        return float(jnp.max(jnp.abs(exact - at_least_float32(after[path]))))

    return {path: lost(path) for path in plan}
