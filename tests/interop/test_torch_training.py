"""The training loop in torch: beside lora_jax update by update, and by itself."""

import copy
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch_lora_models import (
    MLP,
    MODELS,
    STEPS,
    VOCAB,
    adapted,
    as_jax,
    both_sides,
    build,
    data,
    largest_gap,
    pair,
    torch_batches,
)

import lora_jax as lora
from interop.torch_lora import (
    by_name,
    lora_layers,
)
from interop.torch_training import (
    Recipe,
    accumulated,
    accumulated_as_minimind,
    cosine_schedule,
    mean_cross_entropy,
    minimind_schedule,
    shifted_twice,
    train,
)
from lora_jax.train.losses import cross_entropy
from lora_jax.train.optim import adamw
from lora_jax.train.schedules import schedule
from lora_jax.train.step import init_state, make_step


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These models are too small for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_lora_jaxs(name):
    model, params, adapter, apply = both_sides(name)
    inputs, targets, weights = (rows[0] for rows in data())

    def loss_fn(adapter):
        logits = apply(params, adapter, inputs)
        loss = cross_entropy(logits.reshape(-1, VOCAB), targets.ravel(), weights.ravel())
        return loss.total / loss.tokens, logits

    (loss, logits), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(adapter)
    batch = torch_batches(data())[0]
    ours = model(batch.inputs).detach().numpy()
    assert np.abs(ours - logits).max() < 1e-5
    torch_loss = mean_cross_entropy(model, batch)
    torch_loss.backward()
    assert torch_loss.item() == pytest.approx(float(loss), abs=1e-6)
    layers = lora_layers(model).items()
    theirs = {f"{name}.weight": pair(layer, lambda p: p.grad) for name, layer in layers}
    assert largest_gap(grads, theirs) < 1e-6
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(grads)) > 1e-4
    halved = jax.tree.map(lambda leaf: leaf / 2, adapter)
    assert np.abs(apply(params, halved, inputs) - logits).max() > 1e-2


PEAK, CLIP = 5e-3, 0.25
SCHEDULES = {"hf_cosine": (cosine_schedule, (4,)), "minimind": (minimind_schedule, ())}


def torch_run(model, updates, rates, **options):
    records = train(model, updates, Recipe(rates, clip_norm=CLIP, **options))
    columns = np.array([(r.loss, r.grad_norm, r.learning_rate) for r in records])
    return columns, as_jax(model)[1]


def jax_run(apply, params, adapter, rates):
    def loss_fn(adapter, params, batch):
        inputs, targets, weights = batch
        logits = apply(params, adapter, inputs).reshape(-1, VOCAB)
        return cross_entropy(logits, targets.ravel(), weights.ravel())

    tx = adamw(rates, clip_norm=CLIP)
    step = jax.jit(make_step(loss_fn, tx, accumulate=True))
    state, columns = init_state(adapter, tx), []
    for update in zip(*(rows.reshape(STEPS, 3, *rows.shape[1:]) for rows in data()), strict=True):
        rate = rates(int(state.updates))
        state, metrics = step(state, params, update)
        columns.append((metrics.loss, metrics.grad_norm, rate))
    return np.array(columns), state.adapter


CASES = [
    ("mlp", "hf_cosine", 1.0),
    ("mlp", "minimind", 0.0),
    ("transformer", "hf_cosine", 0.0),
    ("transformer", "minimind", 1.0),
]


@pytest.mark.parametrize(("name", "rates", "b"), CASES)
def test_twenty_updates_are_lora_jaxs(name, rates, b):
    """Three micro-batches an update, clipped, on a schedule, from a B that is zero and is not."""
    model, params, adapter, apply = both_sides(name)
    adapter = {path: pair._replace(b=b * pair.b) for path, pair in adapter.items()}
    for layer in lora_layers(model).values():
        layer.lora_B.data *= b
    other, batches = copy.deepcopy(model), torch_batches(data())
    make_rates, warmup = SCHEDULES[rates]
    torch_rates = make_rates(PEAK, STEPS, *warmup)
    ours, learned = torch_run(model, accumulated(batches, 3), torch_rates)
    theirs, expected = jax_run(apply, params, adapter, schedule(rates, PEAK, STEPS, *warmup))
    assert np.abs(ours - theirs).max() < 1e-5
    assert largest_gap(learned, expected) < 1e-5
    assert largest_gap(learned, adapter) > 0.03
    assert (ours[:, 1] > CLIP).any()  # the clipping has had something to do

    alike = [u._replace(shares=[1 / 3] * 3) for u in accumulated(batches, 3)]
    unweighted, _ = torch_run(other, alike, torch_rates)
    assert np.abs(unweighted - theirs).max() > 1e-2


def test_bfloat16_is_lora_jaxs():
    def cast(params):
        return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)

    model, params, adapter, apply = both_sides("mlp", cast)
    updates, rates = accumulated(torch_batches(data()), 3), cosine_schedule(PEAK, STEPS)
    exact, _ = torch_run(copy.deepcopy(model), updates, rates)
    ours, _ = torch_run(model, updates, rates, precision="bfloat16")
    theirs, _ = jax_run(apply, params, adapter, schedule("hf_cosine", PEAK, STEPS))
    assert np.abs(ours - theirs)[:, 0].max() < 2e-3
    assert np.abs(ours - exact)[:, 0].max() > 1e-4


def test_schedules_are_the_references():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=3e-4)
    reference = transformers.get_cosine_schedule_with_warmup(optimizer, 7, 40)
    for count in range(40):
        expected = reference.get_last_lr()[0]
        assert cosine_schedule(3e-4, 40, 7)(count) == pytest.approx(expected, rel=1e-12)
        optimizer.step()
        reference.step()


def test_minimind_accumulates_from_the_second_batch_on_and_over_the_epochs_end():
    batches = torch_batches(data(count=16))
    updates = accumulated_as_minimind(batches, 4, 8)
    expected = [batches[0:3], batches[3:7], batches[7:11], batches[11:15]]
    assert [[*map(id, u.batches)] for u in updates] == [[*map(id, part)] for part in expected]
    assert [update.count for update in updates] == [2, 6, 10, 14]
    assert {share for update in updates for share in update.shares} == {0.25}
    pairs = zip(accumulated_as_minimind(batches, 1, 8), accumulated(batches), strict=True)
    assert all(a.batches[0] is b.batches[0] and a[1:] == b[1:] for a, b in pairs)


def test_the_last_update_takes_what_is_left_and_weighs_positions_alike():
    batches = torch_batches(data(count=5))
    updates = accumulated(batches, 2)
    assert [len(update.batches) for update in updates] == [2, 2, 1]
    assert updates[2].shares == [1.0]
    first, second = (batch.weights.sum().item() for batch in batches[:2])
    assert updates[0].shares == [first / (first + second), second / (first + second)]
    assert first != second


def test_float16_stays_near_float32():
    """Norms are those of the gradients without the scaler's factor."""
    model, _ = adapted(*MODELS["transformer"][::2])
    updates, rates = accumulated(torch_batches(data(count=18)), 3), cosine_schedule(PEAK, 6)
    exact, _ = torch_run(copy.deepcopy(model), updates, rates)
    reduced, learned = torch_run(model, updates, rates, precision="float16")
    assert 0 < np.abs(exact - reduced)[:, 0].max() < 1e-3
    assert np.abs(reduced / exact - 1)[:, 1].max() < 5e-3
    assert {leaf.dtype for leaf in jax.tree.leaves(learned)} == {np.dtype("float32")}


def test_an_overflow_in_float16_is_skipped_and_halves_the_scale():
    model, _ = adapted(MLP, by_name("up", "down"))
    before = copy.deepcopy(model.state_dict())
    updates = accumulated(torch_batches(data(count=1)))
    recipe = Recipe(cosine_schedule(0.1, 10), precision="float16")

    def huge(model, batch):
        return mean_cross_entropy(model, batch) * 1e36

    (record,) = train(model, updates, recipe, loss_fn=huge)
    assert record.skipped
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    (record,) = train(model, updates, recipe)
    assert not record.skipped


def test_a_gradient_that_is_not_finite_ends_a_run_in_float32():
    model, _ = adapted(MLP, by_name("up"))
    with pytest.raises(RuntimeError, match="non-finite"):
        train(
            model,
            accumulated(torch_batches(data(count=1))),
            Recipe(lambda count: 0.1),
            loss_fn=lambda model, batch: mean_cross_entropy(model, batch) * math.inf,
        )


def test_only_the_adapter_moves_and_every_update_is_observed():
    model, _ = adapted(MLP, by_name("up", "down"))
    before, seen = copy.deepcopy(model.state_dict()), []
    updates = accumulated(torch_batches(data(count=3)))
    records = train(model, updates, Recipe(lambda count: 0.1), observe=seen.append)
    assert seen == records
    assert len(records) == 3
    same = {n for n, value in model.state_dict().items() if torch.equal(value, before[n])}
    assert same == {n for n in before if "lora_" not in n}


def test_an_update_without_a_trained_position_is_named():
    batches = [b._replace(weights=0 * b.weights) for b in torch_batches(data(count=4))]
    batches[0].weights[0, 0] = 1
    with pytest.raises(lora.InputError, match=r"no position is trained in updates 1"):
        accumulated(batches, 2)
    model = build(MLP)
    assert mean_cross_entropy(model, batches[1]) == 0


BAD_TRAINING = {
    "accumulate must be at least 1, got 0": lambda: accumulated([], 0),
    "batches_per_epoch must be at least 1, got 0": lambda: accumulated_as_minimind([], 1, 0),
    "int8.*clip_norm must be positive, got -1.*not negative: -2": lambda: Recipe(
        float, -1, -2, "int8"
    ),
    "nothing to train": lambda: train(build(MLP).requires_grad_(False), [], Recipe(float)),
}


@pytest.mark.parametrize(("message", "call"), BAD_TRAINING.items(), ids=map(str, BAD_TRAINING))
def test_what_training_refuses(message, call):
    with pytest.raises(lora.InputError, match=message):
        call()


def test_the_notebooks_second_shift_is_its_slicing_of_the_logits():
    """The notebook drops the last logits and the first targets and weights."""
    model, _ = adapted(*MODELS["transformer"][::2])
    batch = torch_batches(data())[0]
    logits = model(batch.inputs)[..., :-1, :]
    each = nn.CrossEntropyLoss(reduction="none")
    raw = each(logits.reshape(-1, VOCAB), batch.targets[..., 1:].reshape(-1))
    mask = batch.weights[..., 1:].reshape(-1)
    expected = (raw * mask).sum() / (mask.sum() + 1e-8)
    found = mean_cross_entropy(model, shifted_twice(batch))
    assert abs(found - expected) < 1e-6
    assert abs(found - mean_cross_entropy(model, batch)) > 1e-2


def test_the_notebooks_learning_rates():
    model, _ = adapted(MLP, by_name("up"))
    batches = torch_batches(data(count=1)) * 5
    updates = accumulated_as_minimind(batches, accumulate=1, batches_per_epoch=1)
    records = train(model, updates, Recipe(minimind_schedule(5e-4, 5)))
    printed = ["0.00050225", "0.00037725", "0.00022275", "0.00009775", "0.00005000"]
    assert [f"{record.learning_rate:.8f}" for record in records] == printed
