"""Fine-tune a model on chat rows with LoRA and write the adapter as a PEFT directory."""

from dataclasses import dataclass, field
from pathlib import Path

from lora_jax.cli.options import DataOptions, LoraOptions, ModelOptions, OptimOptions


@dataclass(frozen=True)
class Options:
    """What to train, on what, and where the run goes."""

    data: DataOptions
    out: Path
    """New directory for the run: adapter, config, metrics, loss curve, answers."""
    config: Path | None = None
    """YAML file with any of these options by group; flags win over it."""
    prompts: tuple[str, ...] = ()
    """Questions to answer before and after; by default the first of the held-out rows."""
    max_new_tokens: int = 40
    """Tokens in an answer, at most."""
    model: ModelOptions = field(default_factory=ModelOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)


def run(options: Options) -> int:
    """Train; the exit status is 130 if Ctrl-C ended it early (what was learned is kept)."""
    from lora_jax.cli.runs import require_free

    require_free(options.out)
    from lora_jax.cli.training import train

    return train(options)
