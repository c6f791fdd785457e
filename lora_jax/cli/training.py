"""One training run from its options to its directory, in the order in which it happens."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.table import Table

import lora_jax as lora
from lora_jax.cli import datasets, runs
from lora_jax.cli.answers import answers
from lora_jax.cli.base import Base, adapted_language_model, load_base, write_adapter
from lora_jax.cli.compilation_cache import enable_compilation_cache
from lora_jax.cli.options import LoraOptions, OptimOptions
from lora_jax.cli.parsing import as_yaml
from lora_jax.cli.progress import TrainingProgress
from lora_jax.cli.train import Options
from lora_jax.data.batches import Batch, eval_batches, train_batches
from lora_jax.models.config import DecoderConfig
from lora_jax.models.decoder import Decoder
from lora_jax.site import Plan
from lora_jax.train.loop import StepReport, fit, mean_loss, stop_on_interrupt
from lora_jax.train.losses import LossSum, cross_entropy
from lora_jax.train.metrics import append_metrics, plot_loss
from lora_jax.train.optim import adamw, warmup_cosine
from lora_jax.train.step import TrainState, init_state, make_eval_step, make_step

INTERRUPTED = 130


class Judgement(NamedTuple):
    """How good an adapter is: its answers, and its loss on held-out rows if there are any."""

    answers: list[str]
    loss: float | None


def train(options: Options) -> int:
    """Run the whole of it; see `lora_jax.cli.train.run`."""
    clock = time.perf_counter()
    console = Console(highlight=False, soft_wrap=False)
    enable_compilation_cache()
    rows = datasets.read(options.data)
    base = load_base(options.model.model, options.model.dtype, console)
    console.print(f"model     {base.name} ({base.source})", soft_wrap=True)

    accumulate = options.data.accumulate if options.data.accumulate > 1 else None
    pack = partial(datasets.pack, options.data, base=base)
    sequences = pack(rows.train, epochs=options.data.epochs, accumulate=accumulate)
    heldout = pack(rows.heldout, epochs=1, accumulate=None) if rows.heldout else None
    console.print(f"training  {sequences.batches}", soft_wrap=True)
    console.print(f"held out  {heldout.batches if heldout else 'none'}", soft_wrap=True)

    model_fn = logits_of_batch(replace(base.config, remat=options.model.remat))
    example = _one_micro_batch(sequences, accumulate)
    plan = lora.plan(model_fn, base.params, example, config=lora_config(options.lora))
    console.print(lora.explain(plan, width=console.width), markup=False, soft_wrap=True)
    adapter = lora.init(jax.random.key(options.data.seed), base.params, plan)
    loss_fn = adapted_loss(model_fn, plan)

    judge = _judge(options, base, plan, datasets.questions(rows, options.prompts), heldout, loss_fn)
    with console.status("answering and evaluating before training"):
        before = judge(adapter)

    steps = sequences.batches.steps
    schedule = _schedule(options.optim, steps)
    tx = adamw(schedule, weight_decay=options.optim.weight_decay, clip_norm=options.optim.clip_norm)
    state = init_state(adapter, tx)
    step = make_step(loss_fn, tx, accumulate=accumulate is not None)
    batches = train_batches(sequences.packed, sequences.batches, seed=options.data.seed)
    with console.status("compiling the update"):
        compiling = time.perf_counter()
        update = compile_update(step, state, base.params, next(eval_batches(*sequences)))
    console.print(f"compiled  in {time.perf_counter() - compiling:.1f} s")

    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / runs.CONFIG).write_text(as_yaml(options), encoding="utf-8")
    losses: list[float] = []

    def observe(report: StepReport) -> None:
        if not losses:
            console.print(f"first update after {time.perf_counter() - clock:.1f} s from the start")
        losses.append(report.loss)
        record = report._asdict() | {"learning_rate": float(schedule(report.step - 1))}
        append_metrics(options.out / runs.METRICS, **record)
        progress.show(report)

    positions = sequences.batches.sequences_per_step * sequences.batches.length
    with (
        TrainingProgress(console, steps, positions, schedule) as progress,
        stop_on_interrupt() as stop,
    ):
        state = fit(update, state, base.params, batches, observe, should_stop=stop)
    write_adapter(options.out / runs.ADAPTER, base, state.adapter, plan)

    with console.status("answering and evaluating after training"):
        after = judge(state.adapter)
    _write_judgements(options, losses, steps, before, after)
    _print_judgements(console, datasets.questions(rows, options.prompts), before, after)
    console.print(f"adapter   {options.out / runs.ADAPTER} (a PEFT directory)", soft_wrap=True)
    console.print(f"took      {time.perf_counter() - clock:.0f} s")
    if len(losses) < steps:
        console.print(f"stopped   after {len(losses)} of {steps} updates; what was learned is kept")
        return INTERRUPTED
    return 0


def logits_of_batch(config: DecoderConfig) -> Callable[[Any, Batch], jax.Array]:
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


def adapted_loss(model_fn: Callable[[Any, Batch], jax.Array], plan: Plan, **adapt_options: Any):
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


def compile_update(step: Callable, state: TrainState, params: Any, batch: Batch) -> Callable:
    """The update compiled ahead of its first use, its state donated."""
    return jax.jit(step, donate_argnums=0).lower(state, params, batch).compile()


def _one_micro_batch(sequences: datasets.Sequences, accumulate: int | None) -> Batch:
    batch = next(eval_batches(*sequences))
    return Batch(*(leaf[0] for leaf in batch)) if accumulate else batch


def _schedule(options: OptimOptions, steps: int) -> Callable[[Any], Any]:
    warmup = min(round(options.warmup * steps), steps - 1)
    return warmup_cosine(options.learning_rate, steps, warmup, options.final_lr)


def _judge(
    options: Options,
    base: Base,
    plan: Plan,
    questions: tuple[str, ...],
    heldout: datasets.Sequences | None,
    loss_fn: Callable[..., LossSum],
) -> Callable[[Any], Judgement]:
    """One compiled way to judge every adapter of the run; a fresh one is the base."""
    model = adapted_language_model(base.config, plan)
    eval_step = make_eval_step(loss_fn)

    def judge(adapter: Any) -> Judgement:
        both = base.params, adapter
        said = answers(base, model, both, questions, options.max_new_tokens)
        if heldout is None:
            return Judgement(said, None)
        return Judgement(said, mean_loss(eval_step, adapter, base.params, eval_batches(*heldout)))

    return judge


def _write_judgements(
    options: Options, losses: list[float], steps: int, before: Judgement, after: Judgement
) -> None:
    heldout = {0: before.loss, len(losses): after.loss}
    known = {step: loss for step, loss in heldout.items() if loss is not None}
    plot_loss(options.out / runs.LOSS_PLOT, losses, known)
    content = {"before": before._asdict(), "after": after._asdict(), "updates": len(losses)}
    text = json.dumps(content, indent=2, ensure_ascii=False)
    (options.out / runs.ANSWERS).write_text(text + "\n", encoding="utf-8")


def _print_judgements(
    console: Console, questions: tuple[str, ...], before: Judgement, after: Judgement
) -> None:
    table = Table("prompt", "before", "after", show_lines=True)
    for row in zip(questions, before.answers, after.answers, strict=True):
        table.add_row(*row)
    console.print(table, markup=False)
    if before.loss is not None and after.loss is not None:
        share = after.loss / before.loss
        console.print(
            f"held out  loss {before.loss:.3f} before, {after.loss:.3f} after ({share:.0%}), "
            "nats a token"
        )
