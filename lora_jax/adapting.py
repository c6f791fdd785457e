"""The adapted function: the model function with a low-rank path beside every adapted weight.

    model_fn(params, x)   ->   adapted(params, adapter, x)

The model function is not changed and does not know. The base goes in as an argument that nobody
differentiates, copies or merges into; the gradient with respect to ``adapter`` holds no product
of a weight's shape.

>>> import jax, jax.numpy as jnp
>>> import lora_jax as lora
>>> def model_fn(params, x):
...     hidden = jnp.tanh(x @ params["up"]["kernel"])
...     return hidden @ params["down"]["kernel"]
>>> key = jax.random.key(0)
>>> params = {"up": {"kernel": jax.random.normal(key, (8, 16))},
...           "down": {"kernel": jax.random.normal(key, (16, 4))}}
>>> batch = jax.random.normal(key, (32, 8))
>>> config  = lora.LoraConfig(rank=2, alpha=4, targets=r".*/kernel")
>>> plan    = lora.plan(model_fn, params, batch, config=config)
>>> adapter = lora.init(key, params, plan)
>>> adapted = lora.adapt(model_fn, plan)
>>> def loss(adapter, params, batch):
...     return jnp.mean(adapted(params, adapter, batch) ** 2)
>>> bool(jnp.allclose(adapted(params, adapter, batch), model_fn(params, batch)))
True
>>> grads   = jax.grad(loss)(adapter, params, batch)
>>> jax.tree.map(jnp.shape, grads["up/kernel"])
LoraPair(a=(8, 2), b=(2, 16))
>>> adapter = jax.tree.map(lambda p, g: p - 0.1 * g, adapter, grads)
>>> merged  = lora.merge(params, adapter, plan)
>>> bool(jnp.allclose(model_fn(merged, batch), adapted(params, adapter, batch), atol=1e-4))
True
"""

import inspect
from collections.abc import Callable, Collection
from functools import wraps
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lora_jax.adapter import Adapter, check, check_params, require_plan
from lora_jax.errors import InputError
from lora_jax.merging import merge
from lora_jax.rewrite.walk import Traced, Walk, trace
from lora_jax.rewrite.weight import symbolic_weight
from lora_jax.site import Plan
from lora_jax.variants import effective_weight, factors_of

Mode = Literal["low_rank", "merge"]


def adapt(
    model_fn: Callable[..., Any], plan: Plan, *, mode: Mode = "low_rank"
) -> Callable[..., Any]:
    """Rewrite ``model_fn(params, ...)`` into ``adapted(params, adapter, ...)``.

    Every product x·W of an adapted weight becomes x·W + scale·(x·A)·B; the two are summed in
    float32 (or wider) and rounded once to the dtype of the base product. A and B are cast to the
    dtype in which the function uses W. Operations that have no low-rank form get W + ΔW, formed
    at their place; `explain` says which.

    The result composes with jit, grad, vmap, scan and remat like any JAX function. Call it under
    ``jax.jit``: each call outside of it traces ``model_fn`` anew.

    Given ``dropout_key=``, a random key, the function drops entries of A's input at each site's
    rate, as PEFT does: another mask for each use, each layer of a scan and each step of a loop,
    the same masks for the same key. Without it nothing is dropped.

    Args:
      model_fn: any traceable function whose first argument is the parameter tree.
      plan: from `plan` (or `plan_from_axes`) for the same function and parameters.
      mode: ``low_rank``, or ``merge``: the same function by merging first, at the cost of full
        fine-tuning; the oracle in tests.

    Returns:
      ``adapted(params, adapter, *args, dropout_key=None, **kwargs)``, which raises InputError
      where ``params`` or ``adapter`` do not fit the plan.
    """
    if mode not in ("low_rank", "merge"):
        raise InputError(f"mode {mode!r} is not known: use 'low_rank' or 'merge'")
    require_plan(plan)
    if "dropout_key" in _parameters(model_fn):
        raise InputError(
            "model_fn has a parameter dropout_key, which the adapted function keeps for itself: "
            "adapt a lambda that calls yours by another name"
        )

    @wraps(model_fn)
    def low_rank(
        params: Any,
        adapter: Adapter,
        *args: Any,
        dropout_key: jax.Array | None = None,
        **kwargs: Any,
    ) -> Any:
        check_params(params, plan)
        check(adapter, plan)
        traced = trace(model_fn, params, args, kwargs)
        return _run(traced, plan, adapter, Walk(dropout_key=dropout_key))

    @wraps(model_fn)
    def merged(params: Any, adapter: Adapter, *args: Any, **kwargs: Any) -> Any:
        if kwargs.pop("dropout_key", None) is not None:
            raise InputError("mode='merge' has no input of A to drop: leave out dropout_key")
        return model_fn(merge(params, adapter, plan), *args, **kwargs)

    adapted = low_rank if mode == "low_rank" else merged
    # JAX finds arguments by name in the signature, and ours has the adapter in it.
    del adapted.__wrapped__
    return adapted


def _parameters(model_fn: Callable[..., Any]) -> Collection[str]:
    try:
        return inspect.signature(model_fn).parameters
    except (TypeError, ValueError):  # Of some callables Python knows no signature.
        return ()


def _run(traced: Traced, plan: Plan, adapter: Adapter, walk: Walk) -> Any:
    """The function with symbolic weights for leaves that have factors, values for the others."""
    leaves = {site.path: jnp.asarray(traced.leaves[site.path]) for site in plan.sites}
    whole = {
        site.path: effective_weight(site, leaves[site.path], adapter[site.path])
        for site in plan.sites
        if site.is_whole
    }
    weights = {
        site.path: symbolic_weight(
            site, leaves[site.path], factors_of(site, leaves[site.path], adapter[site.path])
        )
        for site in plan.sites
        if not site.is_whole
    }
    return traced._replace(leaves={**traced.leaves, **whole}).run(walk, weights)
