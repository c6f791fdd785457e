"""The update: token-weighted, the adapter alone, the same however its batch is divided."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax.adapter import LoraPair
from lora_jax.train.losses import LossSum, cross_entropy
from lora_jax.train.optim import adamw
from lora_jax.train.precision import PRECISIONS
from lora_jax.train.schedules import schedule
from lora_jax.train.step import init_state, make_step

RNG = np.random.default_rng(0)
BASE = jnp.asarray(RNG.normal(size=(4, 7)), jnp.float32)
ADAPTER = {
    "w": LoraPair(
        jnp.asarray(RNG.normal(size=(4, 2)), jnp.float32),
        jnp.asarray(RNG.normal(size=(2, 7)), jnp.float32),
    )
}
NAN = float("nan")


def loss_fn(adapter, params, batch):
    x, targets, weights = batch
    return cross_entropy(x @ params + x @ adapter["w"].a @ adapter["w"].b, targets, weights)


def batch(rows, weights):
    x = RNG.normal(size=(rows, 4)).astype(np.float32)
    return x, RNG.integers(0, 7, rows).astype(np.int32), np.asarray(weights, np.float32)


def poisoned(data, value=NAN):
    x, targets, weights = data
    return np.where(np.arange(x.size).reshape(x.shape) == 0, np.float32(value), x), targets, weights


def stacked(parts):
    return tuple(np.stack(leaves) for leaves in zip(*parts, strict=True))


def joined(parts):
    return tuple(np.concatenate(leaves) for leaves in zip(*parts, strict=True))


ADAMW = adamw(schedule("cosine", 0.1, 20, 2), weight_decay=0.3, clip_norm=0.5)
SGD = optax.sgd(1.0)


@functools.cache
def compiled(tx, accumulate):
    return jax.jit(make_step(loss_fn, tx, accumulate=accumulate))


def run(batches, *, accumulate=False, tx=None):
    """States after 0, 1, 2, ... calls, and the metrics of each call."""
    tx = tx or ADAMW
    step = compiled(tx, accumulate)
    states, log = [init_state(ADAPTER, tx)], []
    for data in batches:
        state, metrics = step(states[-1], BASE, data)
        states.append(state)
        log.append(jax.device_get(metrics))
    return states, log


def as_bytes(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def learned(state):
    """All that an update may change, but for the counts of calls and faults."""
    return as_bytes((state.adapter, state.opt_state, state.updates))


UNEQUAL = [batch(3, [1, 1, 1]), batch(3, [1, 0, 0]), batch(3, [0, 0, 0])]


def test_micro_batches_of_unequal_token_counts_equal_the_whole_batch():
    (_, whole), (metrics,) = run([joined(UNEQUAL)], tx=SGD)
    (_, summed), (summed_metrics,) = run([stacked(UNEQUAL)], accumulate=True, tx=SGD)
    for left, right in zip(*map(jax.tree.leaves, (whole, summed)), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(metrics[:3], summed_metrics[:3], rtol=1e-6)
    assert float(metrics.tokens) == 4
    (_, first), _ = run(UNEQUAL[:1], tx=SGD)
    assert float(jnp.abs(first.adapter["w"].a - whole.adapter["w"].a).max()) > 1e-3


@pytest.mark.parametrize("accumulate", [False, True])
def test_devices_sum_losses_tokens_and_gradients(accumulate):
    tx = ADAMW
    state = init_state(ADAPTER, tx)
    (_, expected), alone = run([joined(UNEQUAL)])
    per_device = stacked(UNEQUAL)
    if accumulate:
        per_device = tuple(leaf[:, None] for leaf in per_device)
    step = make_step(loss_fn, tx, accumulate=accumulate, axis_name="devices")
    mapped = jax.jit(jax.vmap(step, in_axes=(None, None, 0), axis_name="devices"))
    after, metrics = mapped(state, BASE, per_device)
    for leaf, reference in zip(*map(jax.tree.leaves, (after, expected)), strict=True):
        for device in range(3):
            np.testing.assert_allclose(leaf[device], reference, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(metrics.loss, np.repeat(alone[0].loss, 3), rtol=1e-6)
    alone_step = make_step(loss_fn, tx, accumulate=accumulate)
    apart, _ = jax.jit(jax.vmap(alone_step, in_axes=(None, None, 0)))(state, BASE, per_device)
    assert float(jnp.abs(apart.adapter["w"].b[1] - expected.adapter["w"].b).max()) > 1e-3


def test_one_devices_fault_is_everyones():
    tx = ADAMW
    state = init_state(ADAPTER, tx)
    step = make_step(loss_fn, tx, axis_name="devices")
    data = stacked([UNEQUAL[0], poisoned(UNEQUAL[1])])
    mapped = jax.jit(jax.vmap(step, in_axes=(None, None, 0), axis_name="devices"))
    after, metrics = mapped(state, BASE, data)
    assert metrics.skipped.tolist() == [True, True]
    assert after.faults.tolist() == [1, 1]
    np.testing.assert_array_equal(after.adapter["w"].a[1], ADAPTER["w"].a)


@pytest.mark.parametrize("x", [1.0, NAN, np.inf], ids=["sound", "nan", "inf"])
def test_batch_without_a_token_has_loss_zero_and_no_update(x):
    good, empty = batch(3, [1, 1, 1]), poisoned(batch(3, [0, 0, 0]), x)
    states, log = run([good, empty, good])
    assert learned(states[2]) == learned(states[1]), "no decay, no moments, no schedule"
    assert (float(log[1].loss), float(log[1].grad_norm), float(log[1].tokens)) == (0, 0, 0)
    assert [bool(m.skipped) for m in log] == [False, True, False]
    assert [int(m.faults) for m in log] == [0, 0, 0]
    assert [int(state.step) for state in states] == [0, 1, 2, 3]
    assert [int(m.updates) for m in log] == [1, 1, 2]
    without, _ = run([good, good])
    assert learned(states[-1]) == learned(without[-1])
    assert learned(states[3]) != learned(states[2])


@pytest.mark.parametrize("x", [NAN, np.inf], ids=["nan", "inf"])
def test_empty_micro_batch_of_nonsense_leaves_the_group_sound(x):
    sound = [*UNEQUAL[:2], batch(3, [0, 0, 0])]
    nonsense = [*sound[:2], poisoned(sound[2], x)]
    (_, expected), _ = run([stacked(sound)], accumulate=True)
    (_, state), (metrics,) = run([stacked(nonsense)], accumulate=True)
    assert learned(state) == learned(expected)
    assert not metrics.skipped
    (_, state), (metrics,) = run([stacked([poisoned(UNEQUAL[0], x)])], accumulate=True)
    assert metrics.skipped


@pytest.mark.parametrize("accumulate", [False, True])
def test_update_that_is_not_finite_is_left_out_and_counted_in_a_row(accumulate):
    good = batch(3, [1, 1, 0])
    bad = poisoned(good)
    data = [stacked([part]) if accumulate else part for part in (good, bad, bad, good, bad)]
    states, log = run(data, accumulate=accumulate)
    assert [int(m.faults) for m in log] == [0, 1, 2, 0, 1]
    assert [bool(m.skipped) for m in log] == [False, True, True, False, True]
    assert [int(m.updates) for m in log] == [1, 1, 1, 2, 2]
    assert np.isnan(log[1].loss)
    assert learned(states[1]) == learned(states[2]) == learned(states[3])
    assert learned(states[4]) == learned(states[5]) != learned(states[3])
    without, _ = run([data[0], data[3]], accumulate=accumulate)
    assert learned(states[-1]) == learned(without[-1])


def test_gradient_that_is_not_finite_under_a_finite_loss_is_a_fault():
    def kinked(adapter, params, batch):
        loss = loss_fn(adapter, params, batch)
        b = adapter["w"].b
        return LossSum(loss.total + jnp.sqrt(b[0, 0] - b[0, 0]), loss.tokens)

    tx = ADAMW
    step = jax.jit(make_step(kinked, tx))
    state, metrics = step(init_state(ADAPTER, tx), BASE, batch(3, [1, 1, 1]))
    assert np.isfinite(metrics.loss)
    assert not np.isfinite(metrics.grad_norm)
    assert metrics.skipped
    assert int(state.faults) == 1
    assert as_bytes(state.adapter) == as_bytes(ADAPTER)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_donated_bytes_are_three_adapters_and_the_scalars(name):
    tx, policy = ADAMW, PRECISIONS[name]
    state = init_state(ADAPTER, tx, policy)
    adapter_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(ADAPTER))
    # step, updates, faults, Adam's count, the schedule's; float16: the scale, and how old it is.
    scalars = 4 * (5 + 2 * (name == "float16"))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) == 3 * adapter_bytes + scalars
    step = jax.jit(make_step(loss_fn, tx, policy=policy), donate_argnums=0)
    compiled = step.lower(state, BASE, batch(3, [1, 1, 1])).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == 3 * adapter_bytes + scalars


def test_a_thousand_calls_compile_once_and_move_nothing_to_or_from_the_host():
    traces = []

    def counted_loss(*args):
        traces.append(1)
        return loss_fn(*args)

    tx = adamw(schedule("hf_cosine", 1e-3, 1000, 10))
    step = jax.jit(make_step(counted_loss, tx), donate_argnums=0)
    state = init_state(jax.tree.map(jnp.copy, ADAPTER), tx)
    data = jax.device_put([batch(3, [1, 1, 0]), poisoned(batch(3, [1, 1, 1])), batch(3, [0] * 3)])
    donated = state.adapter["w"].a
    with jax.transfer_guard("disallow"):
        for i in range(1000):
            state, _ = step(state, BASE, data[i % 3])
        assert (len(traces), step._cache_size()) == (1, 1)
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            step(state, BASE, batch(3, [1, 1, 1]))
    assert (int(state.step), int(state.updates)) == (1000, 334)
    assert donated.is_deleted()


def test_base_is_neither_changed_nor_given_away():
    before = as_bytes(BASE)
    tx = ADAMW
    step = jax.jit(make_step(loss_fn, tx), donate_argnums=0)
    step(init_state(jax.tree.map(jnp.copy, ADAPTER), tx), BASE, batch(3, [1, 1, 1]))
    assert as_bytes(BASE) == before
