"""What a checkpoint has to agree with before a run goes on from it."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from lora_jax.cli import runs
from lora_jax.cli.tasks import Task
from lora_jax.cli.train import Options
from lora_jax.data.batches import digest
from lora_jax.errors import InputError
from lora_jax.train import checkpoint
from lora_jax.train.checkpoint import Checkpoint
from lora_jax.train.distributed import is_main

DECIDING = ("data", "lora", "optim", "model", "devices")
"""Groups of options that decide what is computed."""

FREE = {"data", "heldout", "skip_bad_lines", "model"}
FREE |= {"distributed", "coordinator", "num_processes", "process_id"}
"""Options in them that don't: the rows and the base are known by their digests."""


def identity(options: Options, task: Task) -> dict[str, Any]:
    """Everything that decides a run, as JSON values by name."""
    groups = {name: dataclasses.asdict(getattr(options, name)) for name in DECIDING}
    config = {
        f"{group}.{key}": list(value) if isinstance(value, tuple) else value
        for group, values in groups.items()
        for key, value in values.items()
        if key not in FREE
    }
    rows = digest(*task.rows, seed=options.data.seed)
    return {**config, "digest of the rows": rows, "digest of the base": task.base.digest}


def checkpoint_of(options: Options, now: Mapping[str, Any], console: Console) -> Checkpoint | None:
    """The newest checkpoint of the run, if it is to be resumed and there is one.

    Raises:
      InputError: the checkpoint is damaged, or something that decides the run differs.
    """
    root = options.out / runs.CHECKPOINTS
    for name in checkpoint.remove_unfinished(root) if is_main() else ():
        console.print(f"removed   {name}, which a killed run left unfinished")
    if not options.run.resume:
        return None
    found = checkpoint.latest(root)
    if found is None:
        console.print(f"resuming  no checkpoint in {root} yet: starting from the first update")
        return None
    differences = list(_differences(found.progress["identity"], now))
    if differences and not options.run.force:
        raise InputError(
            f"{found.directory} is of another run: {'; '.join(differences)}; set them back, or "
            "--force"
        )
    for difference in differences:
        console.print(f"forced    {difference}", markup=False, soft_wrap=True)
    console.print(f"resuming  after update {found.step} ({found.directory})", soft_wrap=True)
    return found


def resume_hint(options: Options) -> str:
    """The command that goes on."""
    out = options.out
    return f"lora-jax train --config {Path(out) / runs.CONFIG} --out {out} --resume"


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted({*before, *now}):
        was, is_now = before.get(name), now.get(name)
        if was != is_now:
            yield f"{name} was {was!r}, is {is_now!r}"
