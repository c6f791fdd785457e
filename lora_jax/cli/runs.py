"""A run directory: what training leaves behind, and where other commands find it.

adapter/         a PEFT directory: adapter_config.json, adapter_model.safetensors, manifest.json
config.yaml      every option as it was resolved; lora-jax train --config reads it back
metrics.jsonl    one line an update
loss.png         the loss over the run
answers.json     the prompts, answered before and after
"""

import tempfile
from pathlib import Path

from lora_jax.cli.parsing import read_yaml
from lora_jax.errors import InputError

ADAPTER, CONFIG, METRICS, LOSS_PLOT, ANSWERS = (
    "adapter",
    "config.yaml",
    "metrics.jsonl",
    "loss.png",
    "answers.json",
)


def require_free(directory: Path) -> None:
    """Raise unless a new run can be written to ``directory``; nothing is left behind.

    Raises:
      InputError: something is there already, or the disk can't be written to.
    """
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise InputError(f"{directory} already holds something: name a new directory with --out")
    path = directory.absolute()
    parent = next(each for each in (path, *path.parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=parent) as probe:
            probe.write(b"lora-jax")
    except OSError as error:
        raise InputError(
            f"can't write to {parent}: {error.strerror}; choose another --out"
        ) from error


def adapter_directory(run: Path) -> Path:
    """The PEFT directory of a run, or ``run`` itself where it is one.

    Raises:
      InputError: neither.
    """
    for directory in (run / ADAPTER, run):
        if (directory / "adapter_config.json").is_file():
            return directory
    raise InputError(
        f"{run} is no run and no adapter: expected {run / ADAPTER / 'adapter_config.json'}; "
        "make one with lora-jax train"
    )


def model_of(run: Path, model: str | None) -> str:
    """The base model of a run: the one given, or the one that the run was trained on.

    Raises:
      InputError: no model is given and the directory doesn't say.
    """
    if model is not None:
        return model
    config = run / CONFIG
    if config.is_file():
        return read_yaml(config)["model"]["model"]
    raise InputError(f"{run} doesn't say which base it belongs to: give --model")


def prompts_of(run: Path) -> tuple[str, ...]:
    """The prompts that a run was sampled with; none where it wasn't."""
    config = run / CONFIG
    return tuple(read_yaml(config).get("prompts") or ()) if config.is_file() else ()
