"""What happens between the updates of a run: logging, evaluation, checkpoints, giving up."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
from rich.console import Console

from lora_jax.cli import runs
from lora_jax.cli.base import write_adapter
from lora_jax.cli.history import History, finite
from lora_jax.cli.preparing import schedule_of
from lora_jax.cli.progress import UpdateProgress
from lora_jax.cli.run_log import Sink
from lora_jax.cli.tasks import Judgement, Task
from lora_jax.cli.train import Options
from lora_jax.errors import InputError
from lora_jax.monitoring import movements
from lora_jax.train.checkpoint import Saver
from lora_jax.train.distributed import is_main
from lora_jax.train.loop import StepReport
from lora_jax.train.metrics import append_metrics, plot_loss
from lora_jax.train.placement import Placement
from lora_jax.train.step import TrainState
from lora_jax.train.utilisation import update_flops


class Run(NamedTuple):
    """A run that is about to start or to go on."""

    options: Options
    task: Task
    placement: Placement
    params: Any
    """The base, placed."""
    state: TrainState
    """Placed; the first update takes it."""
    done: int
    """Updates done before."""
    history: History
    judge: Callable[[Any, bool], Judgement]
    """``judge(adapter, with_answers)``."""
    console: Console

    @property
    def steps(self) -> int:
        """Updates in the whole run."""
        return self.task.rows.batches.steps

    def typical_seconds(self) -> float | None:
        """The median time of an update; None where there is none but the first, which compiles."""
        times = self.history.seconds[1:]
        return median(times) if times else None

    @property
    def update_flops(self) -> float:
        """Of one update, by theory; embedding tables and padding predictions aside."""
        plan, config = self.task.plan, self.task.base.config
        products = plan.base_parameters - config.vocab_size * config.hidden_size
        positions = self.task.rows.batches.positions_per_step
        return update_flops(products, plan.trainable, positions)


class Watch:
    """Looks at a run while it goes on; what it sees ends in the run's history and directory."""

    def __init__(
        self,
        run: Run,
        identity: Any,
        position: Callable[[], Any],
        saver: Saver,
        log: Sink,
        progress: UpdateProgress,
        started: float,
    ) -> None:
        self._run, self._identity, self._position = run, identity, position
        self._saver, self._log, self._progress = saver, log, progress
        self._started = started
        self._rate = schedule_of(run.options.optim, run.steps)
        self._move = jax.jit(movements, static_argnums=2)
        self._saved = run.done

    def observe(self, report: StepReport) -> None:
        """One update more."""
        run, history = self._run, self._run.history
        if len(history.losses) == run.done:
            after = time.perf_counter() - self._started
            run.console.print(f"first update after {after:.1f} s")
        history.losses.append(finite(report.loss))
        history.seconds.append(report.seconds)
        learning_rate = float(self._rate(max(report.updates - 1, 0)))
        self._write({
            **{name: finite(value) for name, value in report._asdict().items()},
            "learning_rate": learning_rate,
            "tokens_per_second": report.trained_tokens / report.seconds,
            "positions_per_second": run.task.rows.batches.positions_per_step / report.seconds,
            "flops_per_second": run.update_flops / report.seconds,
        })  # fmt: skip
        self._show(report, learning_rate)
        history.gave_up |= report.faults >= run.options.run.max_faults
        if report.faults:
            run.console.print(_described(report, run), markup=False, soft_wrap=True)

    def _show(self, report: StepReport, learning_rate: float) -> None:
        rate = self._run.task.rows.batches.positions_per_step / report.seconds
        line = f"loss {report.loss:.3f} · lr {learning_rate:.1e} · {rate:,.0f} tok/s"
        left = (self._run.steps - report.step) * report.seconds
        self._progress.show(report.step, line, f" · {left:.0f} s left")

    def pauses(self, done: int) -> bool:
        """Whether there is something to do after so many updates."""
        often = self._run.options.run
        periods = often.eval_every, often.sample_every, often.save_every
        return any(_is_due(period, done) for period in periods)

    def pause(self, done: int, state: TrainState) -> None:
        """Evaluate, sample and save, where it is time to."""
        often = self._run.options.run
        if _is_due(often.eval_every, done):
            self._evaluate(done, state)
        if _is_due(often.sample_every, done):
            self._sample(done, state)
        improved = often.keep_best and self._run.history.best_kept(done) == done
        if _is_due(often.save_every, done) or improved:
            self._save(done, state)

    def gives_up(self) -> bool:
        """Whether too many updates were not finite, or the held-out loss falls no more."""
        patience, history = self._run.options.run.patience, self._run.history
        return history.gave_up or bool(patience and history.stale() >= patience)

    def keep_last(self, state: TrainState) -> None:
        """Save the state after the last update, unless it is saved, and wait until it is."""
        done = len(self._run.history.losses)
        if done > self._saved:
            self._save(done, state)
        self._settle()

    def _evaluate(self, done: int, state: TrainState) -> None:
        run = self._run
        loss = run.judge(state.adapter, False).loss
        moved = run.placement.fetch(self._move(run.params, state.adapter, run.task.plan))
        if loss is not None:
            run.history.heldout[done] = finite(loss)
            run.console.print(f"update {done}/{run.steps} · held-out loss {loss:.3f}")
        self._write({"step": done, "heldout_loss": finite(loss), **_flat(moved)})
        if is_main():
            draw_loss(run.options.out, run.history)

    def _sample(self, done: int, state: TrainState) -> None:
        run = self._run
        said = run.judge(state.adapter, True).answers
        if is_main():
            for prompt, answer in zip(run.task.questions, said, strict=False):
                append_metrics(
                    run.options.out / runs.SAMPLES, step=done, prompt=prompt, answer=answer
                )

    def _save(self, done: int, state: TrainState) -> None:
        self._settle()
        run, self._saved = self._run, done
        run.history.kept.add(done)
        whole = run.placement.fetch(state)
        if not is_main():
            return
        about = {
            "identity": self._identity,
            "batches": self._position(),
            "history": run.history.as_json(),
        }
        spare = run.history.best_kept() if run.options.run.keep_best else None
        write = partial(_write_adapter, run.task, whole.adapter)
        self._saver.submit(done, whole, about, write, spare)

    def _settle(self) -> None:
        """Wait for the save that is going on; where it failed, raise or go on, as was asked."""
        try:
            self._saver.wait()
        except InputError as error:
            if self._run.options.run.on_save_error == "stop":
                raise
            self._run.history.kept.discard(self._saved)
            self._run.console.print(f"going on  {error}", markup=False, soft_wrap=True)

    def _write(self, values: dict[str, Any]) -> None:
        if is_main():
            self._log(values)


def draw_loss(out: Path, history: History) -> None:
    """The loss curve as it is now, in the run's directory."""
    path = out / runs.LOSS_PLOT
    try:
        plot_loss(path, history.losses, history.finite_heldout)
    except OSError as error:
        raise InputError(f"can't write {path}: {error.strerror or error}") from error


def _write_adapter(task: Task, adapter: Any, directory: Path) -> None:
    write_adapter(directory / runs.ADAPTER, task.base, adapter, task.plan)


def _is_due(every: int, done: int) -> bool:
    return bool(every) and done % every == 0


def _flat(moved: Any) -> dict[str, float | None]:
    return {
        f"{name}/{path}": finite(float(value))
        for path, movement in moved.items()
        for name, value in movement._asdict().items()
    }


def _described(report: StepReport, run: Run) -> str:
    epoch, batch = divmod(report.step - 1, run.task.rows.batches.steps_per_epoch)
    return (
        f"update {report.step} (epoch {epoch + 1}, batch {batch + 1}) was left out: loss "
        f"{report.loss}, gradient norm {report.grad_norm}; {report.faults} in a row"
    )
