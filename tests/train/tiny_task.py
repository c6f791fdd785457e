"""The tiny decoder on real packed chat rows, and twenty updates of it under some placement."""

from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax

import lora_jax as lora
from interop import pretrained
from lora_jax.data.batch_plan import plan_batches
from lora_jax.data.batches import eval_batches, train_batches
from lora_jax.data.chat import ChatFormat, encode_rows
from lora_jax.data.fitting import fit_rows
from lora_jax.data.formats import read_rows
from lora_jax.data.packing import pack_rows
from lora_jax.models.decoder import Decoder
from lora_jax.train.losses import cross_entropy
from lora_jax.train.step import init_state, make_step

ROWS = Path(__file__).parents[2] / "examples/data/identity.jsonl"
MICRO_BATCHES = 8
"""In an update, whatever computes them."""
UPDATES = 20


class Task(NamedTuple):
    params: dict
    adapter: dict
    plan: lora.Plan
    packed: tuple
    loss_fn: object


def tiny_task() -> Task:
    base = pretrained.load("tiny")
    names = {f"{role}_token": text for role, text in base.special_tokens.items()}
    rows = encode_rows(ChatFormat(base.tokenizer, base.chat_template, names), read_rows(ROWS))
    packed = pack_rows(fit_rows(rows, 192, "drop").rows, 192, base.config.vocab_size)

    def model_fn(params, batch):
        inputs = batch.tokens, batch.positions, batch.segment_ids
        return Decoder(base.config).apply({"params": params}, *inputs, logits_at=batch.predict_at)[
            0
        ]

    example = next(eval_batches(packed, plan_batches(packed, batch_size=1)))
    config = lora.LoraConfig(rank=4, alpha=8, targets=r".*(q|v|o|down)_proj/kernel")
    plan = lora.plan(model_fn, base.params, example, config=config)
    adapted = lora.adapt(model_fn, plan)

    def loss_fn(adapter, params, batch):
        return cross_entropy(adapted(params, adapter, batch), batch.targets, batch.weights)

    adapter = lora.init(jax.random.key(0), base.params, plan)
    return Task(base.params, jax.device_get(adapter), plan, packed, loss_fn)


def optimizer():
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(2e-3))


def batches(task, *, batch_size=1, accumulate=MICRO_BATCHES):
    """Twenty updates of the same rows, however they are cut into micro-batches."""
    plan = plan_batches(task.packed, batch_size=batch_size, accumulate=accumulate, epochs=UPDATES)
    return list(islice(train_batches(task.packed, plan, seed=3), UPDATES))


def mean_of_means(batch):
    """The mistake: each micro-batch weighs the same, however many tokens it has."""
    tokens = batch.weights.sum(axis=1, keepdims=True)
    return batch._replace(weights=batch.weights / np.maximum(tokens, 1))


class Run(NamedTuple):
    """Twenty updates: what they came to, and the program that made them."""

    losses: np.ndarray
    adapter: dict
    program: jax.stages.Compiled
    state: object


def trained(placement, task, change=lambda batch: batch, program=None):
    """Make twenty updates, compiling the step unless its program is given."""
    state = placement.put_state(init_state(task.adapter, optimizer()))
    params = placement.put_params(task.params)
    placed = [placement.put_batch(placement.own(change(batch))) for batch in batches(task)]
    if program is None:
        step = placement.compile_step(partial(make_step, tx=optimizer()), task.loss_fn)
        program = step.lower(state, params, placed[0]).compile()
    losses = []
    for batch in placed:
        state, metrics = program(state, params, batch)
        losses.append(metrics.loss)
    losses = np.array(jax.device_get(losses))
    return Run(losses, placement.fetch(state.adapter), program, state)


def largest_difference(one, other):
    """Between losses, and between adapters."""
    pairs = zip(*(jax.tree.leaves((run.losses, run.adapter)) for run in (one, other)), strict=True)
    return max(np.abs(a - b).max() for a, b in pairs)


def require_equal(one, other):
    """In float32 the order of sums is all that differs."""
    assert largest_difference(one, other) < 5e-6
