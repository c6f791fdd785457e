"""The training loop, and the loss over a whole set of rows."""

import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from lora_jax.train.losses import LossSum
from lora_jax.train.step import StepMetrics, TrainState


class StepReport(NamedTuple):
    """What an observer of the loop gets to see of each update."""

    step: int
    """Updates done, from 1."""
    loss: float
    """Mean over the update's trained tokens, nats."""
    grad_norm: float
    trained_tokens: int
    skipped: bool
    """Whether the state was left as it was: no token to learn from, or something not finite."""
    updates: int
    """Those among them that changed the adapter; the learning rate was that of one less."""
    faults: int
    """Updates in a row, with this one, that were left out as not finite."""
    loss_scale: float | None
    """Of float16; None elsewhere."""
    seconds: float
    """Wall-clock since the update before."""


def fit(
    step: Callable[[TrainState, Any, Any], tuple[TrainState, StepMetrics]],
    state: TrainState,
    params: Any,
    batches: Iterable[Any],
    observe: Callable[[StepReport], None],
    *,
    done: int = 0,
    pauses: Callable[[int], bool] = lambda done: False,
    pause: Callable[[int, TrainState], None] = lambda done, state: None,
    should_stop: Callable[[int], bool] = lambda done: False,
) -> TrainState:
    """Run ``step`` over ``batches``.

    Metrics are fetched one update late, so that the device always has the next one queued; at a
    pause and at the end they are fetched up to the last.

    Args:
      step: the compiled update; it may donate the state.
      state: where to start.
      params: the base; it only ever goes in.
      batches: one batch an update.
      observe: called once an update, in order.
      done: updates done before, in a run that is resumed.
      pauses: whether to pause after so many updates.
      pause: called then with the updates done and the state, as to evaluate or to save; it must
        not keep the state, which the next update may donate.
      should_stop: asked after each update with the updates done; the loop ends when it says so.

    Returns:
      The state after the last update.
    """
    pending, last = None, time.perf_counter()
    for batch in batches:
        state, metrics = step(state, params, batch)
        last = _report(pending, done, last, observe)
        pending, done = metrics, done + 1
        if pauses(done):
            last, pending = _report(pending, done, last, observe), None
            pause(done, state)
            last = time.perf_counter()
        if should_stop(done):
            break
    _report(pending, done, last, observe)
    return state


def mean_loss(
    eval_step: Callable[[Any, Any, Any], LossSum], adapter: Any, params: Any, batches: Iterable[Any]
) -> float:
    """Mean loss a token over all batches, nats: sums and counts are added up first."""
    sums = [eval_step(adapter, params, batch) for batch in batches]
    total, tokens = (sum(float(part) for part in parts) for parts in zip(*sums, strict=True))
    return total / max(tokens, 1)


def _report(
    metrics: StepMetrics | None, step: int, last: float, observe: Callable[[StepReport], None]
) -> float:
    if metrics is None:
        return last
    values = jax.device_get(metrics)
    scale = values.loss_scale
    now = time.perf_counter()
    observe(
        StepReport(
            step=step,
            loss=float(values.loss),
            grad_norm=float(values.grad_norm),
            trained_tokens=int(values.tokens),
            skipped=bool(values.skipped),
            updates=int(values.updates),
            faults=int(values.faults),
            loss_scale=None if scale is None else float(scale),
            seconds=now - last,
        )
    )
    return now
