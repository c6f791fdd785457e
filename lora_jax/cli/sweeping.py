"""One sweep from its options to its directory, in the order in which it happens."""

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from rich.console import Console

import lora_jax as lora
from lora_jax.cli import datasets
from lora_jax.cli.base import Base, load_base, require_writable
from lora_jax.cli.compilation_cache import enable_compilation_cache
from lora_jax.cli.datasets import Sequences
from lora_jax.cli.preparing import (
    ModelFn,
    adapted_loss,
    dropout_keys,
    logits_of_batch,
    lora_config,
    optimizer_of,
)
from lora_jax.cli.progress import UpdateProgress
from lora_jax.cli.stopping import Stop
from lora_jax.cli.sweep import Options
from lora_jax.cli.sweep_grid import Setting, settings_of
from lora_jax.cli.sweep_results import Result, print_results, write_results
from lora_jax.cli.tasks import Example, LossFn
from lora_jax.cli.terminal import open_console
from lora_jax.data.batches import Batch, eval_batches, example_batches, train_batches
from lora_jax.site import Plan
from lora_jax.train.many import Trained, evaluate_many, train_many
from lora_jax.train.members import Member
from lora_jax.train.partition import stop_gradients
from lora_jax.train.precision import precision
from lora_jax.train.step import StepMetrics

DIVERGED = 1


class Task(NamedTuple):
    """What is trained, on what: everything that is decided before anything is compiled."""

    options: Options
    base: Base
    rows: Sequences
    heldout: Sequences | None
    model_fn: ModelFn
    settings: list[Setting]
    members: list[Member]

    def loss_of(self, plan: Plan) -> LossFn:
        """The loss of the model adapted as ``plan`` says."""
        loss_fn, frozen = adapted_loss(self.model_fn, plan), self.options.optim.freeze
        return stop_gradients(loss_fn, frozen) if frozen else loss_fn


def sweep(options: Options, stop: Stop) -> int:
    """Run the whole of it; see `lora_jax.cli.sweep.run`."""
    started = time.perf_counter()
    console = open_console()
    enable_compilation_cache()
    task = prepare(options, console, stop)
    trained = _train(task, console, stop)
    results = _results(task, trained)
    write_results(options, task.base, results)
    print_results(console, results)
    done, steps = len(trained[0].losses), task.rows.batches.steps
    if done < steps:
        console.print(f"stopped   after {done} of {steps} updates, on request")
    console.print(f"written   {options.out}: sweep.json, sweep.png, a run for each", soft_wrap=True)
    console.print(f"took      {time.perf_counter() - started:.0f} s")
    if done < steps:
        return stop.status
    return 0 if any(result.is_finite for result in results) else DIVERGED


def prepare(options: Options, console: Console, stop: Stop) -> Task:
    """Read, load and plan everything, so that whatever is wrong is found before it costs time."""
    settings = settings_of(options)
    lora_config(options.lora)
    data, single = options.data, replace(options.data, epochs=1, accumulate=1)
    rows = datasets.read(data)
    base = load_base(options.model.model, options.model.precision, console)
    stop.check()
    console.print(f"model     {base.name} ({base.source})", soft_wrap=True)
    sequences = datasets.pack(data, rows.train, base, console)
    heldout = datasets.pack(single, rows.heldout, base, console) if rows.heldout else None
    console.print(f"training  {sequences.batches}", soft_wrap=True)
    console.print(f"held out  {heldout.batches if heldout else 'none'}", soft_wrap=True)
    optimizer_of(options.optim, sequences.batches.steps)
    model_fn = logits_of_batch(replace(base.config, remat=options.model.remat))
    example = Batch(*(leaf[0] for leaf in next(example_batches(*sequences))))
    members = _members(options, settings, base, model_fn, example)
    largest = max((member.plan for member in members), key=lambda plan: plan.trainable)
    console.print(f"adapters  {len(members)} at once, of which the largest is")
    console.print(lora.explain(largest, width=console.width), markup=False, soft_wrap=True)
    stop.check()
    return Task(options, base, sequences, heldout, model_fn, settings, members)


def _members(
    options: Options, settings: list[Setting], base: Base, model_fn: ModelFn, example: Batch
) -> list[Member]:
    """A member for each setting; what is the same for several is made once."""

    @cache
    def plan_of(rank: int, alpha: float) -> Plan:
        config = lora_config(replace(options.lora, rank=rank, alpha=alpha))
        plan = lora.plan(model_fn, base.params, example, config=config)
        require_writable(plan, base)
        return plan

    @cache
    def first_values(rank: int, seed: int) -> Any:
        plan = plan_of(rank, settings[0].alpha)
        return jax.device_get(lora.init(jax.random.key(seed), base.params, plan))

    return [
        Member(
            plan_of(each.rank, each.alpha), first_values(each.rank, each.seed), each.learning_rate
        )
        for each in settings
    ]


def _train(task: Task, console: Console, stop: Stop) -> list[Trained]:
    options, steps = task.options, task.rows.batches.steps
    unit = replace(options.optim, learning_rate=1.0)

    def optimizer(peak: Any) -> Any:
        # The learning rate is the last factor of an update, so the peak can come after all else.
        return optax.chain(optimizer_of(unit, steps), optax.scale(peak))

    started = time.perf_counter()
    with UpdateProgress(console, steps) as progress:

        def observe(update: int, metrics: StepMetrics) -> None:
            if update == 1:
                took = time.perf_counter() - started
                console.print(f"first update of {len(metrics.loss)} adapters after {took:.1f} s")
            progress.show(update, _range_of_losses(np.asarray(metrics.loss)))

        return train_many(
            task.loss_of,
            optimizer,
            task.base.params,
            task.members,
            _examples(task),
            policy=precision(options.model.precision),
            accumulate=True,
            batch_axes=Example(None, 0 if options.lora.dropout else None),  # type: ignore[arg-type]
            observe=observe,
            should_stop=stop.requested,
        )


def _range_of_losses(losses: np.ndarray) -> str:
    finite = losses[np.isfinite(losses)]
    return f"loss {finite.min():.3f} to {finite.max():.3f}" if len(finite) else "no finite loss"


def _examples(task: Task) -> Iterator[Example]:
    """The batches of the run, with the keys of each member's dropout where there is any."""
    options = task.options
    for update, batch in enumerate(train_batches(*task.rows, seed=options.data.seed)):
        keys = _dropout_keys(task, update) if options.lora.dropout else None
        yield Example(batch, keys)


def _dropout_keys(task: Task, update: int) -> np.ndarray:
    """(members, micro-batches, 2) uint32: a member's as in a run of its own."""
    numbers = range(task.rows.batches.accumulate or 1)

    of_seed = cache(partial(dropout_keys, update=update, numbers=numbers))
    return np.stack([of_seed(setting.seed) for setting in task.settings])


def _results(task: Task, trained: list[Trained]) -> list[Result]:
    """One for each adapter, best first."""
    heldout: list[float | None] = [None] * len(trained)
    if task.heldout is not None:
        ended = [
            member._replace(adapter=each.adapter)
            for member, each in zip(task.members, trained, strict=True)
        ]
        batches = map(Example, eval_batches(*task.heldout))
        losses = evaluate_many(task.loss_of, task.base.params, ended, batches, accumulate=True)
        heldout = losses.tolist()
    epoch = task.rows.batches.steps_per_epoch
    results = [
        Result(setting, member.plan, each, _mean_of_last(epoch, each), loss)
        for setting, member, each, loss in zip(
            task.settings, task.members, trained, heldout, strict=True
        )
    ]
    return sorted(results, key=Result.order)


def _mean_of_last(updates: int, trained: Trained) -> float:
    """The training loss over the last so many updates, by tokens."""
    losses, tokens = trained.losses[-updates:], trained.tokens[-updates:]
    return float((losses * tokens).sum() / max(tokens.sum(), 1))
