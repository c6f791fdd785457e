"""Answer prompts with a run's adapter, without it, or both side by side."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Options:
    """What to answer, and how."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run of lora-jax train, or a PEFT directory (then give --model too)."""
    prompts: tuple[str, ...] = ()
    """Questions; without any, they are read from standard input, one a line."""
    adapter: Literal["with", "without", "both"] = "both"
    """Answer with the adapter, without it, or both ways."""
    model: str | None = None
    """Base model, if not the one the run was trained on."""
    max_new_tokens: int = 128
    """Tokens in an answer, at most."""
    temperature: float = 0.0
    """0 takes the likeliest token; above, tokens are drawn."""
    top_k: int = 0
    """Draw from the k likeliest tokens only; 0 for all."""
    top_p: float = 1.0
    """Draw from the fewest tokens whose probabilities reach this sum."""
    seed: int = 0
    """Of the draws."""


def run(options: Options) -> int:
    """Print the answers."""
    from lora_jax.cli.generating import generate_answers

    return generate_answers(options)
