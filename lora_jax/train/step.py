"""One optimizer update as a pure function over (state, base, batch)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from lora_jax.train.losses import LossSum

LossFn = Callable[[Any, Any, Any], LossSum]
"""``loss_fn(adapter, params, batch) -> LossSum``."""


class TrainState(NamedTuple):
    """What a step changes: the adapter, the optimizer's moments, and the count of updates."""

    adapter: Any
    opt_state: optax.OptState
    step: jax.Array


class StepMetrics(NamedTuple):
    """Of one update, as float32 scalars: mean loss in nats a token, tokens, gradient norm."""

    loss: jax.Array
    tokens: jax.Array
    grad_norm: jax.Array


def init_state(adapter: Any, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first update."""
    return TrainState(adapter, tx.init(adapter), jnp.zeros((), jnp.int32))


def make_step(
    loss_fn: LossFn, tx: optax.GradientTransformation, *, accumulate: bool = False
) -> Callable[[TrainState, Any, Any], tuple[TrainState, StepMetrics]]:
    """The update: gradients of the adapter alone, the base an argument like the batch.

    Args:
      loss_fn: ``(adapter, params, batch) -> LossSum``.
      tx: the optimizer, over the adapter.
      accumulate: the batch's leaves have a leading axis of micro-batches; their losses and
        gradients are summed, and divided once by the tokens of all of them.

    Returns:
      ``step(state, params, batch) -> (state, metrics)``. Jit it with the state donated.

    >>> def loss_fn(adapter, params, batch):
    ...     return LossSum(((adapter["w"] * params - batch) ** 2).sum(), jnp.float32(batch.size))
    >>> tx = optax.sgd(0.1)
    >>> state = init_state({"w": jnp.float32(0)}, tx)
    >>> step = jax.jit(make_step(loss_fn, tx), donate_argnums=0)
    >>> state, metrics = step(state, jnp.float32(1), jnp.ones(4))
    >>> float(metrics.loss), int(state.step)
    (1.0, 1)
    """
    summed = _summed_over_micro_batches(loss_fn) if accumulate else _value_and_grad(loss_fn)

    def step(state: TrainState, params: Any, batch: Any) -> tuple[TrainState, StepMetrics]:
        loss, grads = summed(state.adapter, params, batch)
        tokens = jnp.maximum(loss.tokens, 1)
        grads = jax.tree.map(lambda grad: grad / tokens, grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.adapter)
        adapter = optax.apply_updates(state.adapter, updates)
        metrics = StepMetrics(loss.total / tokens, loss.tokens, optax.tree.norm(grads))
        return TrainState(adapter, opt_state, state.step + 1), metrics

    return step


def make_eval_step(loss_fn: LossFn) -> Callable[[Any, Any, Any], LossSum]:
    """The loss alone, jitted: ``eval_step(adapter, params, batch) -> LossSum``."""
    return jax.jit(loss_fn)


def _value_and_grad(loss_fn: LossFn) -> Callable[..., tuple[LossSum, Any]]:
    def total(adapter: Any, params: Any, batch: Any) -> tuple[jax.Array, LossSum]:
        loss = loss_fn(adapter, params, batch)
        return loss.total, loss

    def run(adapter: Any, params: Any, batch: Any) -> tuple[LossSum, Any]:
        (_, loss), grads = jax.value_and_grad(total, has_aux=True)(adapter, params, batch)
        return loss, grads

    return run


def _summed_over_micro_batches(loss_fn: LossFn) -> Callable[..., tuple[LossSum, Any]]:
    one = _value_and_grad(loss_fn)

    def run(adapter: Any, params: Any, batches: Any) -> tuple[LossSum, Any]:
        def add(sums: Any, batch: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, one(adapter, params, batch)), None

        zero = LossSum(jnp.zeros(()), jnp.zeros(())), jax.tree.map(jnp.zeros_like, adapter)
        return lax.scan(add, zero, batches)[0]

    return run
