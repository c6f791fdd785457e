"""The decoder's loss and gradient are the same, however rows are arranged and shared."""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax.data.arranging import arrange_rows
from lora_jax.data.batch_plan import plan_batches
from lora_jax.data.batches import Batch, eval_batches, example_batches, train_batches
from lora_jax.data.chat import Encoded, encode_rows
from lora_jax.data.fitting import fit_rows
from lora_jax.models.decoder import Decoder, init_params
from lora_jax.models.presets import TINY
from lora_jax.train.losses import cross_entropy

import corpus

RNG = np.random.default_rng(0)
LENGTHS = np.concatenate([RNG.integers(4, 9, 10), RNG.integers(17, 25, 8)])
ROWS = [
    # The first token of a row is its number, by which its losses are found again.
    Encoded(np.array([i, *RNG.integers(24, 320, n - 1)], np.int32), RNG.random(n) < 0.6)
    for i, n in enumerate(LENGTHS)
]
PARAMS = jax.tree.map(lambda leaf: leaf * 3, init_params(jax.random.key(0), TINY))


def logits_of(params, batch: Batch):
    return Decoder(TINY).apply(
        {"params": params},
        batch.tokens,
        batch.positions,
        batch.segment_ids,
        logits_at=batch.predict_at,
    )[0]


@jax.jit
def token_losses(params, batch: Batch):
    logits = logits_of(params, batch)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets) * batch.weights


@jax.jit
def summed(params, batch: Batch):
    return cross_entropy(logits_of(params, batch), batch.targets, batch.weights).total


gradient = jax.jit(jax.grad(summed))


def arranged(packing, **plan):
    groups = arrange_rows(
        ROWS, packing=packing, max_length=48, vocab_size=TINY.vocab_size, sequences_per_step=4
    )
    return groups, plan_batches(groups, **{"batch_size": 4} | plan)


def losses_by_token(batches) -> dict[tuple[int, int], float]:
    found = {}
    for batch in batches:
        losses = np.asarray(token_losses(PARAMS, batch))
        tokens, positions = batch.tokens.reshape(-1), batch.positions.reshape(-1)
        for at, loss, weight in zip(batch.predict_at, losses, batch.weights, strict=True):
            if weight:
                found[int(tokens[at - positions[at]]), int(positions[at])] = float(loss)
    return found


def gradient_of_all(batches):
    total, tokens = jax.tree.map(jnp.zeros_like, PARAMS), 0.0
    for batch in batches:
        total = jax.tree.map(jnp.add, total, gradient(PARAMS, batch))
        tokens += batch.weights.sum()
    return jax.tree.map(lambda leaf: leaf / tokens, total)


@pytest.mark.parametrize("packing", ["packed", "buckets"])
def test_each_token_has_the_loss_it_has_in_a_row_of_its_own(packing):
    alone = losses_by_token(eval_batches(*arranged("padded", batch_size=1)))
    together = losses_by_token(eval_batches(*arranged(packing)))
    assert alone.keys() == together.keys()
    assert len(alone) == sum(int(row.trained[1:].sum()) for row in ROWS)
    apart = [abs(alone[key] - together[key]) for key in alone]
    assert max(apart) < 1e-5
    assert np.ptp(list(alone.values())) > 1


def test_without_segments_the_losses_of_packed_rows_differ():
    groups, plan = arranged("packed")
    alone = losses_by_token(eval_batches(*arranged("padded")))
    blurred = (
        b._replace(segment_ids=np.ones_like(b.segment_ids)) for b in eval_batches(groups, plan)
    )
    together = losses_by_token(blurred)
    assert max(abs(alone[key] - together[key]) for key in alone) > 1e-2


@pytest.mark.parametrize("packing", ["packed", "buckets"])
def test_an_epoch_has_the_gradient_of_the_padded_one(packing):
    padded = gradient_of_all(eval_batches(*arranged("padded")))
    ours = gradient_of_all(train_batches(*arranged(packing), seed=1))
    for expected, found in zip(jax.tree.leaves(padded), jax.tree.leaves(ours), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        assert np.abs(expected).max() > 1e-3


def test_the_micro_batches_of_all_processes_have_the_loss_of_one_large_batch():
    groups = arranged("packed")[0]
    large = plan_batches(groups, batch_size=4, epochs=2)
    plan = plan_batches(groups, batch_size=2, epochs=2, accumulate=2)
    alone = train_batches(groups, large, seed=1)
    shared = [train_batches(groups, plan, seed=1, own=(process,)) for process in range(2)]
    for whole, *parts in zip(alone, *shared, strict=True):
        micro = [Batch(*leaves) for part in parts for leaves in zip(*part, strict=True)]
        total = sum(summed(PARAMS, each) for each in micro)
        np.testing.assert_allclose(total, summed(PARAMS, whole), rtol=1e-6)
        assert sum(each.weights.sum() for each in micro) == whole.weights.sum()


def test_a_batch_without_a_trained_token_has_loss_and_gradient_zero():
    groups, plan = arranged("packed")
    (batch,) = example_batches(groups, plan)
    empty = Batch(*map(np.zeros_like, batch))
    assert float(summed(PARAMS, empty)) == 0
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradient(PARAMS, empty)))


def test_a_step_is_compiled_once_a_shape():
    for packing, shapes in (("packed", 1), ("buckets", 2), ("padded", 1)):
        traced = []
        step = jax.jit(lambda batch, seen=traced: seen.append(batch) or batch.weights.sum())
        groups, plan = arranged(packing, epochs=3)
        for batch in train_batches(groups, plan, seed=0):
            step(batch)
        assert len(traced) == len(plan.shapes) == shapes


@pytest.mark.slow
def test_an_epoch_of_packed_rows_takes_at_most_half_the_time():
    rows = corpus.docstring_rows()[::4]
    encoded = fit_rows(encode_rows(corpus.chat_format(rows), rows), 256, "drop").rows
    narrow = [row._replace(ids=row.ids % TINY.vocab_size) for row in encoded]
    assert np.mean([len(row.ids) for row in narrow]) < 256 / 3
    epochs = {packing: partial(epoch, narrow, packing) for packing in ("packed", "padded")}
    for run in epochs.values():
        run()
    seconds = {name: min(run() for _ in range(2)) for name, run in epochs.items()}
    print(f"an epoch takes {seconds['packed']:.2f} s packed, {seconds['padded']:.2f} s padded")
    assert seconds["packed"] <= seconds["padded"] / 2


def epoch(rows, packing) -> float:
    groups = arrange_rows(
        rows,
        packing=packing,
        max_length=256,
        vocab_size=TINY.vocab_size,
        sequences_per_step=8,
    )
    plan = plan_batches(groups, batch_size=8)
    started = time.perf_counter()
    jax.block_until_ready([gradient(PARAMS, b) for b in train_batches(groups, plan, seed=0)])
    return time.perf_counter() - started
