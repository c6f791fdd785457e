"""What is written while a run goes on: metrics.jsonl, and whichever dashboards were asked for."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lora_jax.cli import runs
from lora_jax.errors import InputError
from lora_jax.files import write_text
from lora_jax.train.metrics import append_metrics

Sink = Callable[[Mapping[str, Any]], None]
"""Takes the values of one update or evaluation; ``step`` is among them."""


@contextmanager
def sinks(out: Path, names: Sequence[str]) -> Iterator[Sink]:
    """One sink for metrics.jsonl and all dashboards of these names.

    Raises:
      InputError: the package of a dashboard is not installed.
    """
    with ExitStack() as stack:
        opened = [_jsonl(out), *(stack.enter_context(_DASHBOARDS[name](out)) for name in names)]

        def log(values: Mapping[str, Any]) -> None:
            for sink in opened:
                sink(values)

        yield log


def keep_up_to(path: Path, step: int) -> None:
    """Cut what a killed run logged after the checkpoint of update ``step``."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and _step_of(line) <= step]
        write_text(path, "".join(kept))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _jsonl(out: Path) -> Sink:
    path = out / runs.METRICS

    def sink(values: Mapping[str, Any]) -> None:
        try:
            append_metrics(path, **values)
        except OSError as error:
            raise InputError(f"can't write {path}: {error.strerror or error}") from error

    return sink


@contextmanager
def _tensorboard(out: Path) -> Iterator[Sink]:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise InputError("tensorboard needs a package: pip install tensorboardX") from error
    with SummaryWriter(str(out / "tensorboard")) as writer:

        def sink(values: Mapping[str, Any]) -> None:
            for name, value in _numbers(values).items():
                writer.add_scalar(name, value, values["step"])

        yield sink


@contextmanager
def _wandb(out: Path) -> Iterator[Sink]:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError("wandb needs its package: pip install wandb") from error
    with wandb.init(dir=str(out), name=out.name, resume="allow") as run:
        yield lambda values: run.log(_numbers(values), step=values["step"])


_DASHBOARDS = {"tensorboard": _tensorboard, "wandb": _wandb}


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in values.items()
        if name != "step" and isinstance(value, int | float) and math.isfinite(value)
    }
