"""Compare a run with torch + PEFT: every layer, every logit, and the greedy answers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

DISAGREES = 1


@dataclass(frozen=True)
class Options:
    """What to compare, and how closely it has to agree."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run of lora-jax train, or a PEFT directory (then give --model too)."""
    model: str | None = None
    """Base model, if not the one the run was trained on."""
    prompts: tuple[str, ...] = ()
    """Questions to answer on both sides; by default those of the run and a few everyday ones.
    A pass takes at least 5 of them and 256 compared positions."""
    max_new_tokens: int = 64
    """Greedy tokens compared for each prompt."""
    max_logit_difference: float = 1e-3
    """Largest difference of any logit, for base and adapted model."""
    min_effect: float = 1.0
    """The least by which the adapter has to move some logit: the negative control."""


def run(options: Options) -> int:
    """Print the comparison; the exit status is 1 if the two sides disagree."""
    from lora_jax.cli.runs import adapter_directory, model_of

    adapter_directory(options.run)
    model_of(options.run, options.model)
    from lora_jax.cli.verifying import verify_run

    return verify_run(options)
