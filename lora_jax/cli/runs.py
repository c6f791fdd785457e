"""A run directory: what training leaves behind, and where other commands find it.

adapter/         a PEFT directory: adapter_config.json, adapter_model.safetensors, manifest.json
config.yaml      every option as it was resolved; lora-jax train --config reads it back
checkpoints/     what --resume goes on from
metrics.jsonl    one line an update, and one an evaluation
samples.jsonl    answers on the way, with --sample-every
loss.png         the loss over the run
answers.json     the prompts, answered before and after
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax.cli.parsing import read_yaml
from lora_jax.errors import InputError, printable
from lora_jax.files import LOCK, is_unfinished
from lora_jax.manifest import read_small_json

ADAPTER, CONFIG, CHECKPOINTS, METRICS, SAMPLES, LOSS_PLOT, ANSWERS = (
    "adapter",
    "config.yaml",
    "checkpoints",
    "metrics.jsonl",
    "samples.jsonl",
    "loss.png",
    "answers.json",
)
PEFT_CONFIG = "adapter_config.json"


def require_free(directory: Path) -> None:
    """Raise unless a new run can be written to ``directory``; nothing is left behind.

    Raises:
      InputError: something is there already, or the disk can't be written to.
    """
    path = directory.absolute()
    parent = path
    try:
        if path.is_file() or (path.is_dir() and any(map(_counts, path.iterdir()))):
            raise InputError(f"{directory} already holds something: name a new directory")
        parent = next(each for each in (path, *path.parents) if each.exists())
        with tempfile.TemporaryFile(dir=parent) as probe:
            probe.write(b"lora-jax")
    except OSError as error:
        raise InputError(
            f"can't write to {parent}: {error.strerror}; choose another directory"
        ) from error


def _counts(entry: Path) -> bool:
    """Whether an entry is more than what a run killed before its first update leaves."""
    if entry.name == CHECKPOINTS and entry.is_dir():
        return any(map(_counts, entry.iterdir()))
    return entry.name != LOCK and not is_unfinished(entry.name)


def require_run(directory: Path) -> None:
    """Raise an InputError unless a run was begun in ``directory``."""
    if not (directory / CONFIG).is_file():
        raise InputError(
            f"{directory} is no run to resume: expected {directory / CONFIG}; leave out --resume"
        )


def adapter_directory(run: Path) -> Path:
    """The PEFT directory that ``run`` is, or that of the run there.

    Raises:
      InputError: neither.
    """
    for directory in (run, run / ADAPTER):
        if (directory / PEFT_CONFIG).is_file():
            return directory
    raise InputError(
        f"{run} is no run and no adapter: expected {run / ADAPTER / PEFT_CONFIG}; "
        "make one with lora-jax train"
    )


def model_of(run: Path, model: str | None) -> str:
    """The base model of a run: the one given, or the one that the run was trained on.

    Raises:
      InputError: no model is given and the directory doesn't say.
    """
    named = model or _of_config(run, "model").get("model")
    if not isinstance(named, str):
        raise InputError(f"{run} {_missing_base(run)}: give --model")
    return named


def _missing_base(run: Path) -> str:
    """Why no base is known: PEFT's name of it is for a person to judge."""
    found = (path for folder in (run, run / ADAPTER) if (path := folder / PEFT_CONFIG).is_file())
    named = next((read_small_json(path).get("base_model_name_or_path") for path in found), None)
    if not isinstance(named, str):
        return "doesn't say which base it belongs to"
    return f"names the base {printable(named)!r}, and no name in a file is followed"


def precision_of(run: Path) -> str | None:
    """The precision that a run was trained in; None where the directory doesn't say."""
    return _of_config(run, "model").get("precision")


def data_of(run: Path, data: Path | None) -> Path:
    """The rows of a run: the file given, or the one that the run was trained on.

    Raises:
      InputError: no file is given and the directory doesn't say; or it isn't there.
    """
    named = data or _of_config(run, "data").get("data")
    if named is None:
        raise InputError(f"{run} doesn't say what it was trained on: give --data")
    if not Path(named).is_file():
        raise InputError(f"no rows at {named}: give --data")
    return Path(named)


def prompts_of(run: Path) -> tuple[str, ...]:
    """The prompts that a run was sampled with; none where it wasn't."""
    prompts = _config(run).get("prompts")
    return tuple(map(str, prompts)) if isinstance(prompts, list) else ()


def _of_config(run: Path, group: str) -> Mapping[str, Any]:
    options = _config(run).get(group)
    return options if isinstance(options, Mapping) else {}


def _config(run: Path) -> Mapping[str, Any]:
    return read_yaml(run / CONFIG) if (run / CONFIG).is_file() else {}
