"""One training run from its options to its directory, in the order in which it happens."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import lora_jax as lora
from lora_jax.cli import runs
from lora_jax.cli.answers import answers
from lora_jax.cli.base import adapted_language_model, write_adapter
from lora_jax.cli.baseline import judge_base
from lora_jax.cli.compilation_cache import enable_compilation_cache
from lora_jax.cli.history import History, finite
from lora_jax.cli.parsing import as_yaml
from lora_jax.cli.preparing import dropout_keys, optimizer_of, placement_of, prepare
from lora_jax.cli.progress import UpdateProgress
from lora_jax.cli.resuming import checkpoint_of, identity, resume_hint
from lora_jax.cli.run_log import Sink, keep_up_to, sinks
from lora_jax.cli.stopping import Stop
from lora_jax.cli.tasks import Example, Judgement, Task
from lora_jax.cli.terminal import open_console
from lora_jax.cli.train import Options
from lora_jax.cli.watching import Run, Watch, draw_loss
from lora_jax.data.batches import Batch, eval_batches, train_batches
from lora_jax.errors import InputError
from lora_jax.files import locked, write_text
from lora_jax.train import checkpoint
from lora_jax.train.checkpoint import Checkpoint, Saver
from lora_jax.train.distributed import any_process, initialize_distributed, is_main
from lora_jax.train.loop import fit, mean_loss
from lora_jax.train.partition import stop_gradients
from lora_jax.train.placement import Placement
from lora_jax.train.precision import precision
from lora_jax.train.step import TrainState, init_state, make_step
from lora_jax.train.utilisation import peak_flops, peak_memory

FAULTY = 1

AGREE_EVERY = 16
"""Updates after which several processes ask each other whether to stop."""


def train(options: Options, stop: Stop) -> int:
    """Run the whole of it; see `lora_jax.cli.train.run`."""
    started = time.perf_counter()
    devices = options.devices
    if devices.distributed:
        initialize_distributed(devices.coordinator, devices.num_processes, devices.process_id)
    _require_usable(options)
    console = open_console(quiet=not is_main())
    enable_compilation_cache()
    task = prepare(options, console, stop)
    with locked(options.out) if is_main() else contextlib.nullcontext():
        _require_usable(options)  # Another run may have come and gone meanwhile.
        now = identity(options, task)
        found = checkpoint_of(options, now, console)
        run = _begin(options, task, found, console, stop)
        if is_main():
            fresh = replace(options, run=replace(options.run, resume=False, force=False))
            write_text(options.out / runs.CONFIG, as_yaml(fresh))
            for name in (runs.METRICS, runs.SAMPLES):
                keep_up_to(options.out / name, run.done)
        batches = _batches(run, found)
        with sinks(options.out, options.run.log_to if is_main() else ()) as log:
            state = _train(run, now, batches, log, stop, started)
        return _finish(run, state, stop, started)


def _require_usable(options: Options) -> None:
    if is_main():
        (runs.require_run if options.run.resume else runs.require_free)(options.out)


def _begin(
    options: Options, task: Task, found: Checkpoint | None, console: Console, stop: Stop
) -> Run:
    placement = placement_of(options.devices, task.base, task.plan)
    params = placement.put_params(task.base.params)
    adapter = lora.init(jax.random.key(options.data.seed), task.base.params, task.plan)
    policy = precision(options.model.precision)
    state = init_state(adapter, optimizer_of(options.optim, task.rows.batches.steps), policy)
    judge = _judge_of(task, placement, params, options.max_new_tokens)
    if found is None:
        state, done = placement.put_state(state), 0
        with console.status("answering and evaluating before training"):
            before = _judge_base(task, judge, state.adapter, options, console)
        heldout = {} if before.loss is None else {0: finite(before.loss)}
        history = History(before, heldout=heldout)
    else:
        state, done = placement.put_state(checkpoint.restore(found, state)), found.step
        history = History.from_json(found.progress["history"])
        history.kept |= {*checkpoint.steps(options.out / runs.CHECKPOINTS)}
    stop.check()
    return Run(options, task, placement, params, state, done, history, judge, console)


def _judge_base(
    task: Task, judge: Callable, adapter: Any, options: Options, console: Console
) -> Judgement:
    """The base's judgement; where several processes compute, all do, or none."""
    fresh = partial(judge, adapter, True)
    if jax.process_count() > 1:
        return fresh()
    return judge_base(task, options.max_new_tokens, fresh, console)


def _judge_of(
    task: Task, placement: Placement, params: Any, max_new_tokens: int
) -> Callable[[Any, bool], Judgement]:
    """One compiled way to judge every adapter of the run; a fresh one is the base.

    Several processes don't answer: generation looks at each token on the host.
    """
    model = adapted_language_model(task.base.config, task.plan)
    eval_step = placement.compile_loss(task.loss_fn)

    def judge(adapter: Any, with_answers: bool) -> Judgement:
        said = []
        if with_answers and task.questions and jax.process_count() == 1:
            said = answers(task.base, model, (params, adapter), task.questions, max_new_tokens)
        if task.heldout is None:
            return Judgement(said, None)
        own = placement.own(np.arange(task.heldout.batches.accumulate or 1))
        batches = eval_batches(*task.heldout, own=own)
        placed = (placement.put_batch(Example(batch)) for batch in batches)
        return Judgement(said, mean_loss(eval_step, adapter, params, placed))

    return judge


def _asked_to_stop(stop: Stop, done: int) -> bool:
    """Whether a process was; several agree now and then, since all must end at one update."""
    if jax.process_count() > 1 and done % AGREE_EVERY:
        return False
    return any_process(stop.requested())


class _Batches(NamedTuple):
    """The batches of a run, placed, and where among them it is."""

    placed: Iterator[Any]
    position: Callable[[], Any]


def _batches(run: Run, found: Checkpoint | None) -> _Batches:
    own = run.placement.own(np.arange(run.task.rows.batches.accumulate or 1))
    source = train_batches(*run.task.rows, seed=run.options.data.seed, own=own)
    if found is not None:
        _set_position(source, found)
    examples = map(partial(_example, run.options, own), enumerate(source, run.done))
    return _Batches(map(run.placement.put_batch, examples), source.get_state)


def _set_position(source: Any, found: Checkpoint) -> None:
    position = found.progress["batches"]
    try:
        source.set_state(position)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        path = found.directory / checkpoint.PROGRESS
        raise InputError(f"{path} has batches={position}, which is no position") from error


def _example(options: Options, own: np.ndarray, numbered: tuple[int, Batch]) -> Example:
    """The batch of one update, with keys of its dropout that depend on its number alone."""
    update, batch = numbered
    if not options.lora.dropout:
        return Example(batch)
    return Example(batch, dropout_keys(options.data.seed, update, own))


def _train(
    run: Run, now: Any, batches: _Batches, log: Sink, stop: Stop, started: float
) -> TrainState:
    """All updates, with what happens between them."""
    options = run.options
    optim, policy = options.optim, precision(options.model.precision)
    tx = optimizer_of(optim, run.steps)
    loss_fn = stop_gradients(run.task.loss_fn, optim.freeze) if optim.freeze else run.task.loss_fn
    step = run.placement.compile_step(partial(make_step, tx=tx, policy=policy), loss_fn)
    with (
        Saver(options.out / runs.CHECKPOINTS, options.run.keep) as saver,
        UpdateProgress(run.console, run.steps) as progress,
    ):
        watch = Watch(run, now, batches.position, saver, log, progress, started)
        state = fit(
            step,
            run.state,
            run.params,
            batches.placed,
            watch.observe,
            done=run.done,
            pauses=watch.pauses,
            pause=watch.pause,
            should_stop=lambda done: watch.gives_up() or _asked_to_stop(stop, done),
        )
        watch.keep_last(state)
    return state


def _finish(run: Run, state: TrainState, stop: Stop, started: float) -> int:
    """Write and print what came of it; the exit status."""
    options, history, console = run.options, run.history, run.console
    done = len(history.losses)
    asked = any_process(stop.requested())
    stopped_early = done < run.steps and not asked and not history.gave_up
    if done < run.steps and not stopped_early:
        why = (
            "too many updates in a row were not finite; lower --learning-rate"
            if history.gave_up
            else ("on request")
        )
        console.print(f"stopped   after {done} of {run.steps} updates, {why}", soft_wrap=True)
        console.print(f"resume    {resume_hint(options)}", soft_wrap=True)
        return FAULTY if history.gave_up else stop.status
    state, chosen = _chosen(run, state, done)
    adapter = run.placement.fetch(state.adapter)
    if is_main():
        write_adapter(options.out / runs.ADAPTER, run.task.base, adapter, run.task.plan)
    with console.status("answering and evaluating after training"):
        after = run.judge(state.adapter, True)
    if after.loss is not None:
        history.heldout[chosen] = finite(after.loss)
    if is_main():
        _write_judgements(run, after)
        print_judgements(console, run.task.questions, history.before, after)
    console.print(f"adapter   {options.out / runs.ADAPTER} (a PEFT directory)", soft_wrap=True)
    if stopped_early:
        console.print(f"stopped   after {done} of {run.steps} updates: no lower held-out loss")
    if chosen != done:
        console.print(f"chosen    the adapter of update {chosen}, of the lowest held-out loss")
    console.print(_resources(run))
    console.print(f"took      {time.perf_counter() - started:.0f} s")
    return 0


def _resources(run: Run) -> str:
    """What the run used of the machine."""
    per_update, peak = run.update_flops, peak_flops(jax.devices())
    seconds = run.typical_seconds()
    share = f", {per_update / seconds / peak:.1%} of the devices' peak" if peak and seconds else ""
    speed = f", {per_update / seconds / 1e12:.3f} TFLOP/s{share}" if seconds else ""
    padding = run.task.rows.batches.padding_share
    return (
        f"used      {peak_memory() / 1e6:,.0f} MB at most; {per_update / 1e9:,.1f} GFLOP an update "
        f"by (4 N + 6 P) a position{speed}; {padding:.0%} of positions were padding"
    )


def _chosen(run: Run, state: TrainState, done: int) -> tuple[TrainState, int]:
    """The state whose adapter is the result: the last, or the best if that was asked for."""
    best = run.history.best_kept(done)
    if not run.options.run.keep_best or best is None or best == done:
        return state, done
    found = checkpoint.look(run.options.out / runs.CHECKPOINTS, best)
    return run.placement.put_state(checkpoint.restore(found, state)), best


def _write_judgements(run: Run, after: Judgement) -> None:
    """The loss curve, and the answers before and after."""
    out, history = run.options.out, run.history
    draw_loss(out, history)
    content = {
        "before": {**history.before._asdict(), "loss": finite(history.before.loss)},
        "after": {**after._asdict(), "loss": finite(after.loss)},
        "updates": len(history.losses),
    }
    text = json.dumps(content, indent=2, ensure_ascii=False)
    write_text(out / runs.ANSWERS, text + "\n")


def print_judgements(
    console: Console, questions: tuple[str, ...], before: Judgement, after: Judgement
) -> None:
    """Answers side by side, and the loss on the held-out rows."""
    if after.answers:
        table = Table("prompt", "before", "after", show_lines=True)
        for row in zip(questions, before.answers, after.answers, strict=True):
            table.add_row(*row)
        console.print(table, markup=False)
    if before.loss is not None and after.loss is not None:
        console.print(
            f"held out  loss {before.loss:.3f} before, {after.loss:.3f} after "
            f"({after.loss / before.loss:.0%}), nats a token"
        )
