"""One training run from its options to its directory, in the order in which it happens."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import lora_jax as lora
from lora_jax.cli import datasets, runs
from lora_jax.cli.answers import answers
from lora_jax.cli.base import (
    adapted_language_model,
    load_base,
    require_writable,
    write_adapter,
)
from lora_jax.cli.baseline import judge_base
from lora_jax.cli.compilation_cache import enable_compilation_cache
from lora_jax.cli.options import LoraOptions, OptimOptions, require_ranges
from lora_jax.cli.parsing import as_yaml
from lora_jax.cli.progress import TrainingProgress
from lora_jax.cli.tasks import Judgement, LossFn, Task
from lora_jax.cli.terminal import open_console
from lora_jax.cli.train import Options
from lora_jax.data.batches import Batch, eval_batches, train_batches
from lora_jax.errors import InputError
from lora_jax.models.config import DecoderConfig
from lora_jax.models.decoder import Decoder
from lora_jax.site import Plan
from lora_jax.train.loop import StepReport, fit, mean_loss, stop_on_interrupt
from lora_jax.train.losses import LossSum, cross_entropy
from lora_jax.train.metrics import append_metrics, plot_loss
from lora_jax.train.optim import adamw, warmup_cosine
from lora_jax.train.step import TrainState, init_state, make_eval_step, make_step

INTERRUPTED = 130

ModelFn = Callable[[Any, Batch], jax.Array]


def train(options: Options) -> int:
    """Run the whole of it; see `lora_jax.cli.train.run`."""
    started = time.perf_counter()
    console = open_console()
    enable_compilation_cache()
    task = prepare(options, console)
    batches = train_batches(*task.rows, seed=options.data.seed)
    judge = judge_of(task, options.max_new_tokens)
    adapter = lora.init(jax.random.key(options.data.seed), task.base.params, task.plan)
    with console.status("answering and evaluating before training"):
        before = judge_base(task, options.max_new_tokens, lambda: judge(adapter), console)

    steps = task.rows.batches.steps
    schedule = schedule_of(options.optim, steps)
    with console.status("compiling the update"):
        state, update = compile_update(options, task, adapter, schedule, console)

    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / runs.CONFIG).write_text(as_yaml(options), encoding="utf-8")
    rates = jax.device_get(jax.vmap(schedule)(jnp.arange(steps))).tolist()
    losses: list[float] = []
    with TrainingProgress(console, steps, positions_per_update(task), rates) as progress:

        def observe(report: StepReport) -> None:
            require_finite(report)
            if not losses:
                console.print(f"first update after {time.perf_counter() - started:.1f} s")
            losses.append(report.loss)
            rate = rates[report.step - 1]
            append_metrics(options.out / runs.METRICS, **report._asdict(), learning_rate=rate)
            progress.show(report)

        with stop_on_interrupt() as stop:
            state = fit(update, state, task.base.params, batches, observe, should_stop=stop)

    write_adapter(options.out / runs.ADAPTER, task.base, state.adapter, task.plan)
    with console.status("answering and evaluating after training"):
        after = judge(state.adapter)
    write_judgements(options.out, losses, before, after)
    print_judgements(console, task.questions, before, after)
    console.print(f"adapter   {options.out / runs.ADAPTER} (a PEFT directory)", soft_wrap=True)
    console.print(f"took      {time.perf_counter() - started:.0f} s")
    if len(losses) == steps:
        return 0
    console.print(f"stopped   after {len(losses)} of {steps} updates; what was learned is kept")
    return INTERRUPTED


def prepare(options: Options, console: Console) -> Task:
    """Read, load and plan everything, so that whatever is wrong is found before it costs time."""
    require_ranges(options.optim, options.data)
    config = lora_config(options.lora)
    rows = datasets.read(options.data)
    base = load_base(options.model.model, options.model.dtype, console)
    console.print(f"model     {base.name} ({base.source})", soft_wrap=True)
    data, single = options.data, replace(options.data, epochs=1, accumulate=1)
    sequences = datasets.pack(data, rows.train, base, console)
    heldout = datasets.pack(single, rows.heldout, base, console) if rows.heldout else None
    console.print(f"training  {sequences.batches}", soft_wrap=True)
    console.print(f"held out  {heldout.batches if heldout else 'none'}", soft_wrap=True)

    model_fn = logits_of_batch(replace(base.config, remat=options.model.remat))
    example = next(eval_batches(*sequences))
    if sequences.batches.accumulate is not None:
        example = Batch(*(leaf[0] for leaf in example))
    plan = lora.plan(model_fn, base.params, example, config=config)
    require_writable(plan)
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
    """``loss_fn(adapter, params, batch) -> LossSum`` of the adapted function."""
    adapted = lora.adapt(model_fn, plan, **adapt_options)

    def loss_fn(adapter: Any, params: Any, batch: Batch) -> LossSum:
        return cross_entropy(adapted(params, adapter, batch), batch.targets, batch.weights)

    return loss_fn


def lora_config(options: LoraOptions) -> lora.LoraConfig:
    """The library's config for the command line's options."""
    return lora.LoraConfig(
        rank=options.rank,
        alpha=options.alpha,
        targets=options.targets,
        exclude=options.exclude,
        use_rslora=options.rslora,
        init=options.init,
        init_std=options.init_std,
    )


def schedule_of(options: OptimOptions, steps: int) -> Callable[[Any], Any]:
    """Learning rate by updates done."""
    warmup = min(round(options.warmup * steps), steps - 1)
    return warmup_cosine(options.learning_rate, steps, warmup, options.final_lr)


def compile_update(
    options: Options, task: Task, adapter: Any, schedule: Callable, console: Console
) -> tuple[TrainState, Callable]:
    """The first state and the update, compiled ahead of its first use, the state donated."""
    started = time.perf_counter()
    optim = options.optim
    tx = adamw(schedule, weight_decay=optim.weight_decay, clip_norm=optim.clip_norm)
    step = make_step(task.loss_fn, tx, accumulate=task.rows.batches.accumulate is not None)
    state = init_state(adapter, tx)
    batch = next(eval_batches(*task.rows))
    update = jax.jit(step, donate_argnums=0).lower(state, task.base.params, batch).compile()
    console.print(f"compiled  in {time.perf_counter() - started:.1f} s")
    return state, update


def require_finite(report: StepReport) -> None:
    """Raise an InputError at the first loss or gradient that is not a number."""
    if not (math.isfinite(report.loss) and math.isfinite(report.grad_norm)):
        raise InputError(
            f"update {report.step} has loss {report.loss} and gradient norm {report.grad_norm}: "
            "training stopped and no adapter was written; lower --learning-rate"
        )


def positions_per_update(task: Task) -> int:
    """Positions computed in one update, padding included."""
    return task.rows.batches.sequences_per_step * task.rows.batches.length


def judge_of(task: Task, max_new_tokens: int) -> Callable[[Any], Judgement]:
    """One compiled way to judge every adapter of the run; a fresh one is the base."""
    model = adapted_language_model(task.base.config, task.plan)
    eval_step = make_eval_step(task.loss_fn)

    def judge(adapter: Any) -> Judgement:
        params = task.base.params
        said = answers(task.base, model, (params, adapter), task.questions, max_new_tokens)
        if task.heldout is None:
            return Judgement(said, None)
        return Judgement(said, mean_loss(eval_step, adapter, params, eval_batches(*task.heldout)))

    return judge


def write_judgements(out: Path, losses: list[float], before: Judgement, after: Judgement) -> None:
    """The loss curve, and the answers before and after."""
    heldout = {0: before.loss, len(losses): after.loss}
    known = {step: loss for step, loss in heldout.items() if loss is not None}
    plot_loss(out / runs.LOSS_PLOT, losses, known)
    content = {"before": before._asdict(), "after": after._asdict(), "updates": len(losses)}
    text = json.dumps(content, indent=2, ensure_ascii=False)
    (out / runs.ANSWERS).write_text(text + "\n", encoding="utf-8")


def print_judgements(
    console: Console, questions: tuple[str, ...], before: Judgement, after: Judgement
) -> None:
    """Answers side by side, and the loss on the held-out rows."""
    table = Table("prompt", "before", "after", show_lines=True)
    for row in zip(questions, before.answers, after.answers, strict=True):
        table.add_row(*row)
    console.print(table, markup=False)
    if before.loss is not None and after.loss is not None:
        console.print(
            f"held out  loss {before.loss:.3f} before, {after.loss:.3f} after "
            f"({after.loss / before.loss:.0%}), nats a token"
        )
