"""Time the training step beside torch with PEFT, on the same weights, in the same run."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Options:
    """The step to time; both sides compute logits at every position, in float32."""

    model: Literal["smollm2-135m", "tiny"] = "smollm2-135m"
    """Shapes only: weights are random, nothing is downloaded."""
    rank: int = 16
    """Inner size of A and B, on all linear layers."""
    batch_size: int = 8
    """Sequences."""
    length: int = 64
    """Tokens in a sequence, all of them trained."""
    rounds: int = 5
    """Steps of each side, taken in turns after one to warm up."""


def run(options: Options) -> int:
    """Print seconds a step of both sides and their ratio."""
    from rich.console import Console
    from rich.table import Table

    from lora_jax.cli.step_times import step_times

    times = step_times(options)
    tokens = options.batch_size * options.length
    table = Table("one update of the adapter", "median s", "tokens/s", "loss")
    for name, (seconds, loss) in times.items():
        table.add_row(name, f"{seconds:.2f}", f"{tokens / seconds:,.0f}", f"{loss:.4f}")
    ours, theirs = (seconds for seconds, _ in times.values())
    console = Console()
    console.print(table)
    console.print(f"time against torch + PEFT: {ours / theirs:.2f}")
    return 0
