"""Everything that is read, loaded and planned before a run costs time or writes anything."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from rich.console import Console

import lora_jax as lora
from lora_jax.adapter import shapes_of
from lora_jax.cli import datasets
from lora_jax.cli.base import Base, load_base, require_writable
from lora_jax.cli.options import DeviceOptions, LoraOptions, OptimOptions, require_ranges
from lora_jax.cli.stopping import Stop
from lora_jax.cli.tasks import Example, LossFn, Task
from lora_jax.cli.train import Options
from lora_jax.data.batches import Batch, example_batches
from lora_jax.errors import InputError
from lora_jax.models.config import DecoderConfig
from lora_jax.models.decoder import Decoder
from lora_jax.site import Plan
from lora_jax.train.losses import LossSum, cross_entropy
from lora_jax.train.mesh import make_mesh
from lora_jax.train.optim import adamw
from lora_jax.train.placement import Placement, on_mesh, on_one_device, on_replicas
from lora_jax.train.schedules import schedule

ModelFn = Callable[[Any, Batch], jax.Array]


def prepare(options: Options, console: Console, stop: Stop) -> Task:
    """Read, load and plan everything, so that whatever is wrong is found before it costs time."""
    require_ranges(options.optim, options.data, options.run)
    config = lora_config(options.lora)
    rows = datasets.read(options.data)
    base = load_base(options.model.model, options.model.precision, console, on_host=True)
    stop.check()
    console.print(f"model     {base.name} ({base.source})", soft_wrap=True)
    shards = shards_of(options.devices)
    data, single = options.data, replace(options.data, epochs=1, accumulate=1)
    sequences = datasets.pack(data, rows.train, base, console, shards)
    heldout = datasets.pack(single, rows.heldout, base, console, shards) if rows.heldout else None
    console.print(f"training  {sequences.batches}", soft_wrap=True)
    console.print(f"held out  {heldout.batches if heldout else 'none'}", soft_wrap=True)
    if heldout is None and (options.run.eval_every or options.run.keep_best):
        raise InputError("eval_every and keep_best need rows to evaluate on: give --heldout")

    schedule_of(options.optim, sequences.batches.steps)
    model_fn = logits_of_batch(replace(base.config, remat=options.model.remat))
    example = next(example_batches(*sequences))
    example = Batch(*(leaf[0] for leaf in example))
    plan = lora.plan(model_fn, base.params, example, config=config)
    require_writable(plan, base)
    console.print(lora.explain(plan, width=console.width), markup=False, soft_wrap=True)
    questions = datasets.questions(rows, options.prompts)
    return Task(base, sequences, heldout, questions, plan, adapted_loss(model_fn, plan))


def logits_of_batch(config: DecoderConfig) -> ModelFn:
    """``model_fn(params, batch) -> logits`` at the positions whose next token is trained."""
    decoder = Decoder(config)

    def model_fn(params: Any, batch: Batch) -> jax.Array:
        logits, _ = decoder.apply(
            {"params": params},
            batch.tokens,
            batch.positions,
            batch.segment_ids,
            logits_at=batch.predict_at,
        )
        return logits

    return model_fn


def adapted_loss(model_fn: ModelFn, plan: Plan, **adapt_options: Any) -> LossFn:
    """``loss_fn(adapter, params, example) -> LossSum`` of the adapted function."""
    adapted = lora.adapt(model_fn, plan, **adapt_options)

    def loss_fn(adapter: Any, params: Any, example: Example) -> LossSum:
        batch, data = example
        dropped = {} if data is None else {"dropout_key": jax.random.wrap_key_data(data)}
        logits = adapted(params, adapter, batch, **dropped)
        return cross_entropy(logits, batch.targets, batch.weights)

    return loss_fn


def lora_config(options: LoraOptions) -> lora.LoraConfig:
    """The library's config for the command line's options."""
    return lora.LoraConfig(
        rank=options.rank,
        alpha=options.alpha,
        targets=options.targets,
        exclude=options.exclude,
        variant=options.variant,
        use_rslora=options.rslora,
        init=options.init,
        init_std=options.init_std,
        dropout=options.dropout,
    )


def schedule_of(options: OptimOptions, steps: int) -> Callable[[Any], Any]:
    """Learning rate by updates done."""
    return schedule(
        options.schedule, options.learning_rate, steps, options.warmup, options.final_lr
    )


def optimizer_of(options: OptimOptions, steps: int) -> Any:
    """AdamW as the options say."""
    return adamw(
        schedule_of(options, steps),
        weight_decay=options.weight_decay,
        clip_norm=options.clip_norm,
        b_ratio=options.b_ratio,
        freeze=options.freeze,
    )


def dropout_keys(seed: int, update: int, numbers: Iterable[int]) -> np.ndarray:
    """(micro-batches, 2) uint32: keys that depend on the run's seed, the update and the number."""
    of_update = jax.random.fold_in(jax.random.key(seed), update)
    keys = [jax.random.key_data(jax.random.fold_in(of_update, int(each))) for each in numbers]
    return np.stack(keys)


def shards_of(options: DeviceOptions) -> int:
    """Micro-batches that all devices compute side by side."""
    if options.placement == "single":
        return 1
    if options.placement == "pmap":
        return jax.device_count()
    return jax.device_count() // options.mesh_tensor


def placement_of(options: DeviceOptions, base: Base, plan: Plan) -> Placement:
    """Where the run computes."""
    if options.placement == "single":
        return on_one_device()
    if options.placement == "pmap":
        return on_replicas()
    mesh = make_mesh(data=options.mesh_data, fsdp=options.mesh_fsdp, tensor=options.mesh_tensor)
    return on_mesh(mesh, base.params, shapes_of(plan), plan)
