"""The loop over updates: what it reports, when it stops, and the loss over a set of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax.train.loop import StepReport, fit, mean_loss
from lora_jax.train.losses import LossSum, cross_entropy
from lora_jax.train.step import init_state, make_eval_step, make_step

RNG = np.random.default_rng(0)
BASE = jnp.asarray(RNG.normal(size=(4, 7)), jnp.float32)
ADAPTER = {"w": jnp.asarray(RNG.normal(size=(4, 7)), jnp.float32)}


def loss_fn(adapter, params, batch):
    x, targets, weights = batch
    return cross_entropy(x @ (params + adapter["w"]), targets, weights)


def batch(rows, weights):
    x = RNG.normal(size=(rows, 4)).astype(np.float32)
    return x, RNG.integers(0, 7, rows), np.asarray(weights, np.float32)


def test_loop_reports_every_update_in_order_and_leaves_the_base_alone():
    batches = [batch(3, [1, 1, 0]) for _ in range(4)]
    tx = optax.sgd(0.1)
    step = jax.jit(make_step(loss_fn, tx), donate_argnums=0)
    seen: list[StepReport] = []
    before = np.asarray(BASE).copy()
    state = init_state(jax.tree.map(jnp.copy, ADAPTER), tx)
    state = fit(step, state, BASE, batches, seen.append)
    assert [report.step for report in seen] == [1, 2, 3, 4]
    assert [report.trained_tokens for report in seen] == [2] * 4
    assert int(state.step) == 4
    np.testing.assert_array_equal(BASE, before)


def test_loop_stops_when_asked_and_reports_the_last_update():
    tx = optax.sgd(0.1)
    seen: list[StepReport] = []
    state = init_state(ADAPTER, tx)
    batches = [batch(3, [1, 1, 1])] * 9
    step = make_step(loss_fn, tx)
    state = fit(step, state, BASE, batches, seen.append, should_stop=lambda done: len(seen) == 2)
    assert int(state.step) == len(seen) == 3


def test_mean_loss_weights_by_tokens():
    few, many = batch(2, [1, 0]), batch(6, [1] * 6)
    sums = [loss_fn(ADAPTER, BASE, data) for data in (few, many)]
    expected = sum(float(s.total) for s in sums) / 7
    assert abs(mean_loss(make_eval_step(loss_fn), ADAPTER, BASE, [few, many]) - expected) < 1e-6
    assert isinstance(sums[0], LossSum)
