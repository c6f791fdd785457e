"""Fine-tune a model on chat rows with LoRA and write the adapter as a PEFT directory."""

from dataclasses import dataclass, field
from pathlib import Path

from lora_jax.cli.options import (
    DataOptions,
    DeviceOptions,
    LoraOptions,
    ModelOptions,
    OptimOptions,
    RunOptions,
)


@dataclass(frozen=True)
class Options:
    """What to train, on what, and where the run goes."""

    data: DataOptions
    out: Path
    """New directory for the run: adapter, checkpoints, config, metrics, loss curve, answers."""
    config: Path | None = None
    """YAML file with any of these options by group; flags win over it."""
    preset: tuple[str, ...] = ()
    """Recipes to start from, listed above, a later one before an earlier; the config file and flags
    win over them."""
    prompts: tuple[str, ...] = ()
    """Questions to answer before and after; by default the first of the held-out rows."""
    max_new_tokens: int = 40
    """Tokens in an answer, at most."""
    model: ModelOptions = field(default_factory=ModelOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    run: RunOptions = field(default_factory=RunOptions)
    devices: DeviceOptions = field(default_factory=DeviceOptions)


def run(options: Options) -> int:
    """Train.

    The exit status is 0 when the run is complete, 130 or 143 when Ctrl-C or SIGTERM ended it
    early (a checkpoint is kept, and --resume goes on from it), and 1 when too many updates in a
    row were not finite.
    """
    import sys

    from lora_jax.cli.runs import require_free, require_run
    from lora_jax.cli.stopping import Stopped, stop_on_signals

    if not options.devices.distributed:  # There the first process alone looks, once it knows.
        (require_run if options.run.resume else require_free)(options.out)
    with stop_on_signals() as stop:
        from lora_jax.cli.training import train

        try:
            return train(options, stop)
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            return stopped.status
