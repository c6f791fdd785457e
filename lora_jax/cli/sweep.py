"""Train adapters of several settings at once over one base, and rank them.

The settings are every combination of the learning rates, ranks, alphas and seeds given. All
adapters see the same rows in the same order, that of --seed, so that their losses can be compared
update by update; a seed of --seeds decides an adapter's first values and its dropout.
"""

from dataclasses import dataclass, field
from pathlib import Path

from lora_jax.cli.options import DataOptions, LoraOptions, ModelOptions, OptimOptions


@dataclass(frozen=True)
class Options:
    """What to train, on what, and what to vary."""

    data: DataOptions
    out: Path
    """New directory: a run directory for each adapter, sweep.json, sweep.png."""
    config: Path | None = None
    """YAML file with any of these options by group; flags win over it."""
    learning_rates: tuple[float, ...] = ()
    """Peak learning rates; by default that of --learning-rate alone."""
    ranks: tuple[int, ...] = ()
    """Ranks; by default that of --rank alone."""
    alphas: tuple[float, ...] = ()
    """Alphas; by default that of --alpha alone."""
    seeds: tuple[int, ...] = ()
    """Seeds of the adapters' first values and dropout; by default that of --seed alone."""
    model: ModelOptions = field(default_factory=ModelOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)


def run(options: Options) -> int:
    """Sweep.

    The exit status is 0 when all updates are done, 130 or 143 when Ctrl-C or SIGTERM ended them
    early (what was trained is written all the same), and 1 when no adapter had a finite loss at
    the end.
    """
    import sys

    from lora_jax.cli.runs import require_free
    from lora_jax.cli.stopping import Stopped, stop_on_signals

    require_free(options.out)
    with stop_on_signals() as stop:
        from lora_jax.cli.sweeping import sweep

        try:
            return sweep(options, stop)
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            return stopped.status
