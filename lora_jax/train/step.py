"""One optimizer update as a pure function over (state, base, batch)."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from lora_jax.errors import InputError
from lora_jax.train.gradients import LossFn, of_one_batch, over_micro_batches
from lora_jax.train.losses import LossSum
from lora_jax.train.precision import (
    FLOAT32,
    LossScale,
    Precision,
    init_loss_scale,
    next_loss_scale,
    require_float32,
)


class TrainState(NamedTuple):
    """What a step changes; the counts are int32 scalars."""

    adapter: Any
    opt_state: optax.OptState
    step: jax.Array
    """Calls of the step."""
    updates: jax.Array
    """Calls that changed the adapter, which is what the schedule counts."""
    faults: jax.Array
    """Calls in a row that were left out because the loss or a gradient was not finite."""
    loss_scale: LossScale | None = None
    """None unless the precision policy scales the loss."""


class StepMetrics(NamedTuple):
    """Of one call of the step, as scalars on the device."""

    loss: jax.Array
    """Mean over the tokens, nats, float32; as it came where it is not finite."""
    tokens: jax.Array
    """Trained tokens, float32."""
    grad_norm: jax.Array
    """Global norm before clipping, float32; as it came where it is not finite."""
    skipped: jax.Array
    """Whether the call left adapter and optimizer as they were: no token, a fault or an overflow
    of the scaled loss."""
    updates: jax.Array
    """Updates done with this one; the learning rate of this one is the schedule's at one less."""
    faults: jax.Array
    """Faults in a row with this one: stop a run on this number."""
    loss_scale: jax.Array | None
    """The scale that this call's loss was multiplied with; None without loss scaling."""


def init_state(
    adapter: Any, tx: optax.GradientTransformation, policy: Precision = FLOAT32
) -> TrainState:
    """The state before the first update.

    Raises:
      InputError: a leaf of the adapter has fewer than 32 bits.

    >>> state = init_state({"w": jnp.zeros(2)}, optax.sgd(0.1))
    >>> int(state.updates), state.loss_scale
    (0, None)
    """
    require_float32(adapter)
    zero = partial(jnp.zeros, (), jnp.int32)
    scale = init_loss_scale(policy)
    return TrainState(adapter, tx.init(adapter), zero(), zero(), zero(), scale)


def make_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    policy: Precision = FLOAT32,
    accumulate: bool = False,
    axis_name: str | tuple[str, ...] | None = None,
) -> Callable[[TrainState, Any, Any], tuple[TrainState, StepMetrics]]:
    """The update: gradients of the adapter alone, the base an argument like the batch.

    Losses and gradients are summed over micro-batches and devices, and divided once by the
    tokens of all of them. The update is left out, and adapter, moments and schedule stay as they
    were, where there is no token, or where the loss or the gradients' norm is not finite. The
    latter is a fault, and halves the loss scale if there is one; it is an overflow and no fault
    where the loss is finite and the scale above its minimum.

    Args:
      loss_fn: ``(adapter, params, batch) -> LossSum``.
      tx: the optimizer, over the adapter.
      policy: only its loss scaling matters here; `init_state` needs the same.
      accumulate: the batch's leaves have a leading axis of micro-batches.
      axis_name: the mapped axes that hold different batches, where the step runs inside ``pmap``,
        ``vmap`` or ``shard_map(check_vma=False)``; state and metrics come out equal on all.

    Returns:
      ``step(state, params, batch) -> (state, metrics)``. Jit it with the state donated.

    Raises:
      InputError: when traced, the state has a loss scale and the policy none, or the reverse.

    >>> def loss_fn(adapter, params, batch):
    ...     return LossSum(((adapter["w"] * params - batch) ** 2).sum(), jnp.float32(batch.size))
    >>> tx = optax.sgd(0.1)
    >>> state = init_state({"w": jnp.float32(0)}, tx)
    >>> step = jax.jit(make_step(loss_fn, tx), donate_argnums=0)
    >>> state, metrics = step(state, jnp.float32(1), jnp.ones(4))
    >>> float(metrics.loss), int(metrics.updates), bool(metrics.skipped)
    (1.0, 1, False)
    """
    one = of_one_batch(loss_fn)
    summed = over_micro_batches(one) if accumulate else one

    def step(state: TrainState, params: Any, batch: Any) -> tuple[TrainState, StepMetrics]:
        _require_scale_of(policy, state)
        sums = summed(state.adapter, params, batch, _scale(state))
        loss, grads = lax.psum(sums, axis_name) if axis_name else sums
        tokens = jnp.maximum(loss.tokens, 1)
        mean, grads = loss.total / tokens, jax.tree.map(lambda grad: grad / tokens, grads)
        norm = optax.tree.norm(grads)
        verdict = _judge(policy, state, loss, norm)
        after = _advance(policy, tx, state, grads, verdict)
        metrics = StepMetrics(
            mean, loss.tokens, norm, ~verdict.good, after.updates, after.faults, _scale(state)
        )
        return after, metrics

    return step


def make_eval_step(loss_fn: LossFn) -> Callable[[Any, Any, Any], LossSum]:
    """The loss alone, jitted: ``eval_step(adapter, params, batch) -> LossSum``."""
    return jax.jit(loss_fn)


class _Verdict(NamedTuple):
    good: jax.Array
    finite: jax.Array
    fault: jax.Array


def _judge(policy: Precision, state: TrainState, loss: LossSum, norm: jax.Array) -> _Verdict:
    finite = jnp.isfinite(loss.total) & jnp.isfinite(norm)
    fault = ~finite
    if policy.loss_scaling and state.loss_scale:
        at_minimum = state.loss_scale.value <= policy.loss_scaling.minimum
        fault &= at_minimum | ~jnp.isfinite(loss.total)
    return _Verdict(finite & (loss.tokens > 0), finite, fault)


def _advance(
    policy: Precision,
    tx: optax.GradientTransformation,
    state: TrainState,
    grads: Any,
    verdict: _Verdict,
) -> TrainState:
    updates, opt_state = tx.update(grads, state.opt_state, state.adapter)
    moved = optax.apply_updates(state.adapter, updates), opt_state
    stayed = state.adapter, state.opt_state
    adapter, opt_state = jax.tree.map(partial(jnp.where, verdict.good), moved, stayed)
    scale = state.loss_scale
    if policy.loss_scaling and scale:
        scale = next_loss_scale(policy.loss_scaling, scale, verdict.good, ~verdict.finite)
    faults = jnp.where(verdict.good, 0, state.faults + verdict.fault)
    done = state.updates + verdict.good
    return TrainState(adapter, opt_state, state.step + 1, done, faults, scale)


def _scale(state: TrainState) -> jax.Array | None:
    return state.loss_scale.value if state.loss_scale else None


def _require_scale_of(policy: Precision, state: TrainState) -> None:
    scaled = state.loss_scale is not None
    if scaled != (policy.loss_scaling is not None):
        raise InputError(
            f"the state has {'a' if scaled else 'no'} loss scale, the policy has "
            f"loss_scaling={policy.loss_scaling}: give init_state and make_step the same policy"
        )
