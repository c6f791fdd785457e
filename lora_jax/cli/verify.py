"""Compare a run with torch + PEFT: layers, logits, greedy answers; gradients and training too."""

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
    gradients: bool = False
    """Compare the gradients of A and B as well."""
    steps: int = 0
    """Updates to train on both sides, from the adapter on, with AdamW on the same batches."""
    data: Path | None = None
    """Rows for --steps; by default those that the run was trained on."""
    learning_rate: float = 1e-4
    """Of every one of those updates."""
    batch_size: int = 2
    """Packed sequences in each."""
    max_length: int = 256
    """Tokens in each sequence, and the most that one row may have."""
    plot: Path | None = None
    """Where a picture of the training side by side goes (PNG)."""


def run(options: Options) -> int:
    """Print the comparison; the exit status is 1 if the two sides disagree."""
    from lora_jax.cli.runs import adapter_directory, data_of, model_of

    adapter_directory(options.run)
    model_of(options.run, options.model)
    _require_sound(options)
    if options.steps:
        data_of(options.run, options.data)
    from lora_jax.cli.verifying import verify_run

    return verify_run(options)


def _require_sound(options: Options) -> None:
    """Raise one InputError for everything about the training that can't be done."""
    from lora_jax.errors import InputError

    given = {"--data": options.data, "--plot": options.plot}
    idle = [flag for flag, value in given.items() if value is not None and not options.steps]
    problems = [f"{', '.join(idle)} without --steps: say how many updates to train"] if idle else []
    counts = {"--batch-size": options.batch_size, "--max-length": options.max_length}
    problems += [f"{flag} is {n}, expected at least 1" for flag, n in counts.items() if n < 1]
    if options.steps < 0:
        problems.append(f"--steps is {options.steps}, expected 0 or more")
    if not 0 < options.learning_rate < float("inf"):
        problems.append(f"--learning-rate is {options.learning_rate}, expected a positive number")
    if problems:
        raise InputError("; ".join(problems))
