"""The update: token-weighted, the adapter alone, the same with and without accumulation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax.train.loop import StepReport, fit, mean_loss, stop_on_interrupt
from lora_jax.train.losses import LossSum, cross_entropy
from lora_jax.train.optim import adamw, warmup_cosine
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


def one_update(data, *, accumulate=False, tx=None):
    tx = tx or optax.sgd(1.0)
    step = make_step(loss_fn, tx, accumulate=accumulate)
    return step(init_state(ADAPTER, tx), BASE, data)


def test_micro_batches_of_unequal_token_counts_equal_the_whole_batch():
    parts = [batch(3, [1, 1, 1]), batch(3, [1, 0, 0]), batch(3, [0, 0, 0])]
    whole = tuple(np.concatenate(leaves) for leaves in zip(*parts, strict=True))
    stacked = tuple(np.stack(leaves) for leaves in zip(*parts, strict=True))
    state, metrics = one_update(whole)
    accumulated, accumulated_metrics = one_update(stacked, accumulate=True)
    np.testing.assert_allclose(state.adapter["w"], accumulated.adapter["w"], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(metrics, accumulated_metrics, rtol=1e-6)
    assert float(metrics.tokens) == 4
    first, _ = one_update(parts[0])
    assert float(jnp.abs(first.adapter["w"] - state.adapter["w"]).max()) > 1e-3


def test_batch_without_a_trained_token_has_loss_zero_and_no_gradient():
    state, metrics = one_update(batch(3, [0, 0, 0]))
    assert float(metrics.loss) == 0
    assert float(metrics.grad_norm) == 0
    np.testing.assert_array_equal(state.adapter["w"], ADAPTER["w"])


def test_update_equals_torch_adamw_with_clipping():
    torch = pytest.importorskip("torch")
    data = batch(5, [1, 1, 0, 1, 1])
    tx = adamw(0.1, weight_decay=0.3, clip_norm=0.05)
    step = jax.jit(make_step(loss_fn, tx))
    state = init_state(ADAPTER, tx)
    w = torch.nn.Parameter(torch.tensor(np.asarray(ADAPTER["w"])))
    optimizer = torch.optim.AdamW([w], lr=0.1, weight_decay=0.3)
    for _ in range(5):
        state, metrics = step(state, BASE, data)
        optimizer.zero_grad()
        logits = torch.tensor(data[0]) @ (torch.tensor(np.asarray(BASE)) + w)
        each = torch.nn.functional.cross_entropy(logits, torch.tensor(data[1]), reduction="none")
        loss = (each * torch.tensor(data[2])).sum() / data[2].sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([w], 0.05)
        optimizer.step()
        assert abs(float(metrics.loss) - loss.item()) < 1e-5
        assert abs(float(metrics.grad_norm) - norm.item()) < 1e-5
    # torch divides by norm + 1e-6 when it clips, optax by the norm.
    np.testing.assert_allclose(state.adapter["w"], w.detach().numpy(), atol=2e-5)


def test_schedule_rises_to_the_peak_and_falls_to_the_floor():
    schedule = warmup_cosine(1.0, steps=20, warmup=4, floor=0.1)
    values = [float(schedule(i)) for i in range(21)]
    np.testing.assert_allclose(values[:5], [0.25, 0.5, 0.75, 1.0, 1.0])
    assert values[4:] == sorted(values[4:], reverse=True)
    assert abs(values[20] - 0.1) < 1e-6
    assert float(warmup_cosine(1.0, steps=20, warmup=0)(0)) == 1.0


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
    state = fit(step, state, BASE, batches, seen.append, should_stop=lambda: len(seen) == 2)
    assert int(state.step) == len(seen) == 3


def test_interrupt_becomes_a_request_once():
    import os
    import signal

    with stop_on_interrupt() as requested:
        assert not requested()
        os.kill(os.getpid(), signal.SIGINT)
        assert requested()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_mean_loss_weights_by_tokens():
    few, many = batch(2, [1, 0]), batch(6, [1] * 6)
    sums = [loss_fn(ADAPTER, BASE, data) for data in (few, many)]
    expected = sum(float(s.total) for s in sums) / 7
    assert abs(mean_loss(make_eval_step(loss_fn), ADAPTER, BASE, [few, many]) - expected) < 1e-6
    assert isinstance(sums[0], LossSum)
