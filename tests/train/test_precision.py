"""float16 with a dynamic loss scale, and the policies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lora
from lora_jax.adapter import LoraPair
from lora_jax.errors import InputError
from lora_jax.train.losses import cross_entropy
from lora_jax.train.optim import adamw
from lora_jax.train.precision import (
    PRECISIONS,
    LossScaling,
    Precision,
    cast_floating,
    computing_in,
    precision,
)
from lora_jax.train.step import init_state, make_step

RNG = np.random.default_rng(0)
BASE = {"w": jnp.asarray(RNG.normal(size=(6, 5)), jnp.float32)}
RULE = LossScaling(initial=2.0**15, interval=3, minimum=2.0**5)
FLOAT16 = Precision("float16", "float16", RULE)


def model_fn(params, x):
    return x @ params["w"]


def make_batch(scale=1.0):
    x = RNG.normal(size=(8, 6)).astype(np.float32) * scale
    return jnp.asarray(x), jnp.asarray(RNG.integers(0, 5, 8)), jnp.ones(8)


# Gradients are about x times the loss scale, 32768: in float16's range (65504) for the one batch
# and beyond it for the other, while all logits and losses stay far within.
GOOD = make_batch(0.1)
HUGE = make_batch(100.0)
ADAMW = adamw(lambda count: 1e-2)


@functools.cache
def make_problem(policy):
    params = cast_floating(BASE, policy.base)
    cast_fn = computing_in(model_fn, policy.compute)
    plan = lora.plan(cast_fn, params, GOOD[0], config=lora.LoraConfig(rank=2, targets="w"))
    pair = lora.init(jax.random.key(0), params, plan)["w"]
    adapter = {"w": pair._replace(b=jax.random.normal(jax.random.key(1), pair.b.shape) / 4)}
    adapted = lora.adapt(cast_fn, plan)

    def loss_fn(adapter, params, batch):
        x, targets, weights = batch
        return cross_entropy(adapted(params, adapter, x), targets, weights)

    return loss_fn, params, adapter


@functools.cache
def compiled(policy):
    return jax.jit(make_step(make_problem(policy)[0], ADAMW, policy=policy))


def run(policy, batches):
    """States after 0, 1, 2, ... calls, and the metrics of each call."""
    _, params, adapter = make_problem(policy)
    step = compiled(policy)
    states = [init_state(adapter, ADAMW, policy)]
    log = []
    for batch in batches:
        state, metrics = step(states[-1], params, batch)
        states.append(state)
        log.append(jax.device_get(metrics))
    return states, log


def as_bytes(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_overflow_skips_halves_and_recovers():
    states, log = run(FLOAT16, [GOOD, HUGE, GOOD, GOOD, GOOD, GOOD])
    assert [bool(m.skipped) for m in log] == [False, True, False, False, False, False]
    assert np.isfinite(log[1].loss), "the loss is sound, its scaled gradient is not"
    assert not np.isfinite(log[1].grad_norm)
    assert [float(m.loss_scale) / 2**15 for m in log] == [1, 1, 0.5, 0.5, 0.5, 1]
    assert [int(m.updates) for m in log] == [1, 1, 2, 3, 4, 5]
    assert [int(m.faults) for m in log] == [0] * 6, "an overflow is no fault"
    skipped, before = states[2], states[1]
    assert as_bytes((skipped.adapter, skipped.opt_state)) == as_bytes(
        (before.adapter, before.opt_state)
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(states[-1].adapter))


def test_what_overflowed_passes_at_a_lower_scale():
    patient = Precision("float16", "float16", LossScaling(initial=RULE.initial))
    states, log = run(patient, [HUGE] * 10)
    skipped = [bool(m.skipped) for m in log]
    assert skipped[0]
    assert not skipped[-1]
    assert skipped == sorted(skipped, reverse=True)
    assert int(states[-1].faults) == 0


def test_scale_moves_as_torchs():
    torch = pytest.importorskip("torch")
    scaler = torch.amp.GradScaler("cpu", init_scale=RULE.initial, growth_interval=RULE.interval)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    _, log = run(FLOAT16, [GOOD, HUGE, GOOD, GOOD, GOOD, GOOD, GOOD, HUGE, GOOD, GOOD])
    for metrics in log:
        assert scaler.get_scale() == float(metrics.loss_scale)
        optimizer.zero_grad()
        factor = float("inf") if metrics.skipped else 1.0
        scaler.scale(parameter.sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()


def test_defaults_are_torchs():
    torch = pytest.importorskip("torch")
    scaler, rule = torch.amp.GradScaler("cpu"), LossScaling()
    found = scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval()
    assert found == (rule.growth, rule.backoff, rule.interval)
    assert scaler.get_scale() == rule.initial


def test_overflow_at_the_minimum_is_a_fault():
    at_minimum = Precision("float16", "float16", LossScaling(initial=2.0**15, minimum=2.0**15))
    states, log = run(at_minimum, [HUGE, HUGE, GOOD])
    assert [int(m.faults) for m in log] == [1, 2, 0]
    assert [float(m.loss_scale) for m in log] == [2.0**15] * 3
    assert int(states[-1].updates) == 1


def test_a_loss_that_is_not_finite_is_a_fault_at_any_scale():
    x, targets, weights = GOOD
    _, log = run(FLOAT16, [(x.at[0, 0].set(jnp.nan), targets, weights), GOOD])
    assert [int(m.faults) for m in log] == [1, 0]
    assert [bool(m.skipped) for m in log] == [True, False]


def test_small_gradients_survive_in_float16_by_their_scale_alone():
    def grad_norm(policy):
        loss_fn, params, adapter = make_problem(policy)
        tx = optax.sgd(1.0)

        def faint_loss(adapter, params, batch):
            loss = loss_fn(adapter, params, batch)
            return loss._replace(total=loss.total * 1e-7)

        step = jax.jit(make_step(faint_loss, tx, policy=policy))
        return float(step(init_state(adapter, tx, policy), params, GOOD)[1].grad_norm)

    exact = grad_norm(PRECISIONS["float32"])
    assert exact > 0
    assert grad_norm(FLOAT16) == pytest.approx(exact, rel=0.02)
    unscaled = Precision("float16", "float16", LossScaling(initial=1.0))
    assert grad_norm(unscaled) < 0.9 * exact


def test_scale_does_not_depend_on_how_many_tokens_a_micro_batch_has():
    x, targets, weights = GOOD
    many = (jnp.tile(x, (512, 1)), jnp.tile(targets, 512), jnp.tile(weights, 512))
    _, few_log = run(PRECISIONS["float16"], [GOOD])
    _, many_log = run(PRECISIONS["float16"], [many])
    assert not few_log[0].skipped
    assert not many_log[0].skipped
    assert many_log[0].grad_norm == pytest.approx(few_log[0].grad_norm, rel=1e-2)


@pytest.mark.parametrize("name", PRECISIONS)
def test_every_policy_trains_near_float32(name):
    batches = [GOOD] * 10
    policy = precision(name)
    states, log = run(policy, batches)
    _, exact = run(PRECISIONS["float32"], batches)
    tolerance = {"float32": 0, "bfloat16": 3e-2, "float16": 3e-3}[policy.compute]
    losses = [[float(m.loss) for m in metrics] for metrics in (log, exact)]
    np.testing.assert_allclose(*losses, rtol=tolerance)
    assert losses[0][-1] < losses[0][0]
    floats = jax.tree.leaves((states[-1].adapter, states[-1].opt_state, log[-1].loss))
    assert {str(leaf.dtype) for leaf in floats} == {"float32", "int32"}
    assert (states[-1].loss_scale is None) == (policy.compute != "float16")


def test_accumulated_losses_of_low_precision_are_summed_in_float32():
    logits = jnp.asarray(RNG.normal(size=(4096, 7)), jnp.bfloat16)
    targets, weights = jnp.zeros(4096, jnp.int32), jnp.ones(4096)
    loss = cross_entropy(logits, targets, weights)
    exact = cross_entropy(logits.astype(jnp.float32), targets, weights)
    assert loss.total.dtype == jnp.float32
    assert float(loss.total) == float(exact.total)


def test_bad_policies_are_refused():
    with pytest.raises(InputError, match=r"no precision 'bf16'"):
        precision("bf16")
    with pytest.raises(InputError, match="float16 needs LossScaling"):
        Precision("float16", "float16")
    with pytest.raises(InputError, match="the other dtypes need None"):
        Precision("bfloat16", "bfloat16", LossScaling())


def test_adapter_in_half_precision_and_mixed_up_policies_are_refused():
    half = {"w": LoraPair(jnp.ones(2, jnp.bfloat16), jnp.ones(2))}
    with pytest.raises(InputError, match=r"'w/a' is bfloat16; cast it with"):
        init_state(half, optax.sgd(0.1))
    loss_fn, params, adapter = make_problem(FLOAT16)
    tx = optax.sgd(0.1)
    with pytest.raises(InputError, match="the same policy"):
        make_step(loss_fn, tx, policy=FLOAT16)(init_state(adapter, tx), params, GOOD)
    with pytest.raises(InputError, match="the same policy"):
        make_step(loss_fn, tx)(init_state(adapter, tx, FLOAT16), params, GOOD)


def test_loss_that_is_scaled_is_reported_unscaled():
    _, log = run(FLOAT16, [GOOD])
    _, exact = run(PRECISIONS["float32"], [GOOD])
    assert float(log[0].loss) == pytest.approx(float(exact[0].loss), rel=1e-3)
