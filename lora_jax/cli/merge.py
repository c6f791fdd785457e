"""Fold a run's adapter into its base and write the result as a Hugging Face directory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Options:
    """What to merge, and where to."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run of lora-jax train, or a PEFT directory (then give --model too)."""
    out: Annotated[Path, tyro.conf.Positional]
    """New directory: config.json, model.safetensors, tokenizer, chat template."""
    model: str | None = None
    """Base model, if not the one the run was trained on."""
    base_only: bool = False
    """Write the base without the adapter, for PEFT to load the adapter on."""


def run(options: Options) -> int:
    """Write the merged model; the run and the base stay as they are."""
    from lora_jax.cli.runs import adapter_directory, model_of, require_free

    require_free(options.out)
    adapter_directory(options.run)
    model_of(options.run, options.model)
    from lora_jax.cli.exporting import write_merged

    return write_merged(options)
