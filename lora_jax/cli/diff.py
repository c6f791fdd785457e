"""Compare two adapters of any format by what they compute: the update of each module."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lora_jax.errors import InputError

DIFFERS = 1


@dataclass(frozen=True)
class Options:
    """The two, and how close they have to be."""

    first: Annotated[Path, tyro.conf.Positional]
    """A run, a PEFT directory, or an adapter file of any format."""
    second: Annotated[Path, tyro.conf.Positional]
    """Likewise."""
    tolerance: float = 1e-6
    """Largest relative difference of a module's update; of float32 about 1e-7 is rounding, of
    float16 1e-3."""
    model: str | None = None
    """Base model, for formats whose names or rows are the base's: .gguf, kohya, and PEFT's of
    experts beside any other."""
    alpha: float | None = None
    """lora_alpha of training, for files that hold A and B alone."""
    every: bool = False
    """Show every module; by default those that differ."""
    form: Literal["table", "json"] = "table"
    """For a reader, or for a program: with --form json nothing but JSON is printed."""


def run(options: Options) -> int:
    """Print the differences and a verdict; the exit status is 1 if the two differ."""
    if not 0 <= options.tolerance < float("inf"):
        raise InputError(f"--tolerance {options.tolerance}: expected a finite number of at least 0")
    from lora_jax.cli.diffing import show

    return show(options)
