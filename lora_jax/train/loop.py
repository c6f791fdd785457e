"""The training loop, and the loss over a whole set of rows."""

import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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
    seconds: float
    """Wall-clock since the update before."""


def fit(
    step: Callable[[TrainState, Any, Any], tuple[TrainState, StepMetrics]],
    state: TrainState,
    params: Any,
    batches: Iterable[Any],
    observe: Callable[[StepReport], None],
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainState:
    """Run ``step`` over ``batches``.

    Metrics are fetched one update late, so that the device always has the next one queued.

    Args:
      step: the compiled update; it may donate the state.
      state: where to start.
      params: the base; it only ever goes in.
      batches: one batch an update.
      observe: called once an update, in order.
      should_stop: asked after each update; the loop ends when it says so.

    Returns:
      The state after the last update.
    """
    pending, last = None, time.perf_counter()
    done = int(state.step)
    for batch in batches:
        state, metrics = step(state, params, batch)
        last = _report(pending, done, last, observe)
        pending, done = metrics, done + 1
        if should_stop():
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


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a request to stop after the current update.

    Yields a function that tells whether a stop was requested. A second Ctrl-C interrupts at
    once, as usual.
    """
    requested = []

    def request(signum: int, frame: Any) -> None:
        requested.append(signum)
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, request)
    try:
        yield lambda: bool(requested)
    finally:
        signal.signal(signal.SIGINT, previous)


def _report(
    metrics: StepMetrics | None, step: int, last: float, observe: Callable[[StepReport], None]
) -> float:
    if metrics is None:
        return last
    loss, tokens, grad_norm = (float(x) for x in jax.device_get(metrics))
    now = time.perf_counter()
    observe(StepReport(step, loss, grad_norm, int(tokens), now - last))
    return now
