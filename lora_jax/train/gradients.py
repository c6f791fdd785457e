"""Losses and gradients as sums over a group of micro-batches, to be divided by its tokens."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.train.losses import LossSum

LossFn = Callable[[Any, Any, Any], LossSum]
"""``loss_fn(adapter, params, batch) -> LossSum``."""

SumFn = Callable[[Any, Any, Any, jax.Array | None], tuple[LossSum, Any]]
"""``sum_fn(adapter, params, batch, loss_scale) -> (loss, gradients of its total)``."""


def of_one_batch(loss_fn: LossFn) -> SumFn:
    """The loss of a batch and its gradients with respect to the adapter.

    The gradients pass through the model multiplied with ``loss_scale`` over the batch's tokens,
    and are divided by it again in float32. A batch without a token gives zeros, whatever the
    model makes of it.

    >>> sums = of_one_batch(lambda adapter, params, batch: LossSum(adapter * batch, batch))
    >>> loss, grads = sums(jnp.float32(3), None, jnp.float32(2), jnp.float32(1024))
    >>> float(loss.total), float(grads)
    (6.0, 2.0)
    """

    def total(adapter: Any, params: Any, batch: Any, scale: Any) -> tuple[jax.Array, LossSum]:
        loss = loss_fn(adapter, params, batch)
        return loss.total * _scale_of_sum(scale, loss.tokens), loss

    def run(adapter: Any, params: Any, batch: Any, scale: Any) -> tuple[LossSum, Any]:
        (_, loss), grads = jax.value_and_grad(total, has_aux=True)(adapter, params, batch, scale)
        factor = _scale_of_sum(scale, loss.tokens)
        # What a model makes of padding alone may be NaN, and must not reach the other sums.
        kept = partial(jnp.where, loss.tokens > 0)
        loss = LossSum(*(kept(part, 0) for part in loss))
        return loss, jax.tree.map(lambda grad: kept(grad / factor, 0), grads)

    return run


def over_micro_batches(one: SumFn) -> SumFn:
    """The sums of ``one`` over the leading axis of every leaf of the batch.

    >>> sums = over_micro_batches(of_one_batch(lambda a, params, batch: LossSum(a * batch, batch)))
    >>> loss, grads = sums(jnp.float32(3), None, jnp.array([2.0, 5.0]), None)
    >>> float(loss.total), float(loss.tokens), float(grads)
    (21.0, 7.0, 7.0)
    """

    def run(adapter: Any, params: Any, batches: Any, scale: Any) -> tuple[LossSum, Any]:
        def add(sums: Any, batch: Any) -> tuple[Any, LossSum]:
            loss, grads = one(adapter, params, batch, scale)
            return jax.tree.map(jnp.add, sums, grads), loss

        grads, losses = lax.scan(add, jax.tree.map(jnp.zeros_like, adapter), batches)
        return jax.tree.map(jnp.sum, losses), grads

    return run


def _scale_of_sum(scale: jax.Array | None, tokens: jax.Array) -> jax.Array | float:
    # Over tokens: the loss scale is meant for a mean, whatever the size of the micro-batch.
    return 1.0 if scale is None else scale / jnp.maximum(tokens, 1)
