"""What a checkpoint has to agree with before a run goes on from it."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from lora_jax.cli import runs
from lora_jax.cli.history import History
from lora_jax.cli.options import DeviceOptions
from lora_jax.cli.tasks import Task
from lora_jax.cli.train import Options
from lora_jax.data.batches import digest
from lora_jax.errors import InputError
from lora_jax.files import remove_unfinished, require_writable
from lora_jax.train import checkpoint
from lora_jax.train.checkpoint import Checkpoint
from lora_jax.train.distributed import is_main

DECIDING = ("data", "lora", "optim", "model")
"""Groups of options that decide what is computed."""

FREE = {"data", "heldout", "skip_bad_lines", "model", "accumulate"}
"""Options in them that don't: rows and base are known by their digests, updates by their size."""

ROUNDING = "devices."
"""How names begin of what decides no more than the order of sums."""


def identity(options: Options, task: Task) -> dict[str, Any]:
    """Everything that decides a run, to the last bit, as JSON values by name."""
    groups = {name: dataclasses.asdict(getattr(options, name)) for name in DECIDING}
    config = {
        f"{group}.{key}": list(value) if isinstance(value, tuple) else value
        for group, values in groups.items()
        for key, value in values.items()
        if key not in FREE
    }
    return {
        **config,
        **_devices(options.devices),
        "micro-batches an update (--accumulate times devices)": task.rows.batches.accumulate,
        "digest of the rows": digest(*task.rows, seed=options.data.seed),
        "digest of the base": task.base.digest,
    }


def _devices(options: DeviceOptions) -> dict[str, Any]:
    sizes = (options.mesh_data, options.mesh_fsdp, options.mesh_tensor)
    values = {
        "placement": options.placement,
        "mesh": list(sizes) if options.placement == "mesh" else None,
        "count": jax.device_count(),
        "kind": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    return {f"{ROUNDING}{name}": value for name, value in values.items()}


def checkpoint_of(options: Options, now: Mapping[str, Any], console: Console) -> Checkpoint | None:
    """The newest checkpoint of the run, if it is to be resumed and there is one.

    Raises:
      InputError: the checkpoint is damaged, or something that decides the run differs.
    """
    root = options.out / runs.CHECKPOINTS
    if is_main():
        require_writable(root)
    for name in _remove_unfinished(options.out, root) if is_main() else ():
        console.print(f"removed   {name}, which a killed run left unfinished", soft_wrap=True)
    if not options.run.resume:
        return None
    found = checkpoint.latest(root)
    if found is None:
        console.print(f"resuming  no checkpoint in {root} yet: starting from the first update")
        return None
    _require_progress(found)
    changes = dict(_changes(found.progress["identity"], now))
    differences = [change for name, change in changes.items() if not name.startswith(ROUNDING)]
    if differences and not options.run.force:
        raise InputError(
            f"{found.directory} is of another run: {'; '.join(differences)}; set them back, or "
            "--force"
        )
    for difference in differences:
        console.print(f"forced    {difference}", markup=False, soft_wrap=True)
    for name in sorted(name for name in changes if name.startswith(ROUNDING)):
        told = f"rounding  {changes[name]}: from here on the same run, but not bitwise"
        console.print(told, markup=False, soft_wrap=True)
    console.print(f"resuming  after update {found.step} ({found.directory})", soft_wrap=True)
    return found


def _remove_unfinished(*directories: Path) -> list[Path]:
    return [each / name for each in directories for name in remove_unfinished(each)]


def _require_progress(found: Checkpoint) -> None:
    """Raise an InputError unless progress.json holds what a run writes into it."""
    path, values = found.directory / checkpoint.PROGRESS, found.progress
    names = ("identity", "batches", "history")
    if wrong := [name for name in names if not isinstance(values.get(name), dict)]:
        raise InputError(f"{path} has no object as {', '.join(wrong)}: it is of no run from here")
    try:
        losses = History.from_json(values["history"]).losses
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} holds no history of a run: {error!r}") from error
    if len(losses) != found.step:
        raise InputError(f"{path} holds {len(losses)} losses, expected one of {found.step} updates")


def resume_hint(options: Options) -> str:
    """The command that goes on."""
    out = options.out
    return f"lora-jax train --config {Path(out) / runs.CONFIG} --out {out} --resume"


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in sorted({*before, *now}):
        was, is_now = before.get(name), now.get(name)
        if was != is_now:
            yield name, f"{name} was {was!r}, is {is_now!r}"
