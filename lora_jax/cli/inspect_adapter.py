"""Show what is in an adapter: modules, ranks, scales, norms and spectra of the updates, warnings.

The path is a run directory, a PEFT directory, or a file of another library: loralib, MiniMind,
kohya, diffusers, mlx-lm, torchtune, llama.cpp. (lora-jax inspect data and lora-jax inspect plan
show rows and targets; a path that is called so needs ./ before it.)
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Options:
    """What to look at, and how closely."""

    adapter: Annotated[Path, tyro.conf.Positional]
    """A run, a PEFT directory, or an adapter file of any format."""
    every: bool = False
    """A line for every module; by default one for those that differ in the layer alone."""
    alpha: float | None = None
    """lora_alpha of training, for files that hold A and B alone."""
    format: str | None = None
    """Of the file, where its content doesn't tell: an error lists them."""
    form: Literal["table", "json"] = "table"
    """For a reader, or for a program: with --form json nothing but JSON is printed."""


def run(options: Options) -> int:
    """Print it."""
    from lora_jax.cli.inspecting import show

    return show(options)
