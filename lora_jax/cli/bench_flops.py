"""Count the training step's FLOPs as XLA does, beside what the theory says they should be."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Options:
    """The step to count."""

    model: Literal["smollm2-135m", "tiny"] = "smollm2-135m"
    """Shapes only: nothing is downloaded and nothing is computed."""
    rank: int = 16
    """Inner size of A and B, on all linear layers."""
    batch_size: int = 2
    """Sequences."""
    length: int = 256
    """Tokens in a sequence."""
    predictions: int = 160
    """Positions at which the head is computed."""


def run(options: Options) -> int:
    """Print the two counts and their ratio."""
    from rich.console import Console
    from rich.table import Table

    from lora_jax.cli.flops import step_flops

    counted, parts = step_flops(options)
    expected = sum(parts.values())
    table = Table("part of the step", "GFLOP", title="one update of the adapter")
    table.columns[1].justify = "right"
    for name, flops in parts.items():
        table.add_row(name, f"{flops / 1e9:,.2f}")
    table.add_section()
    table.add_row("theory: sum of these", f"{expected / 1e9:,.2f}")
    table.add_row("XLA: the compiled step", f"{counted / 1e9:,.2f}")
    table.add_row("ratio", f"{counted / expected:.4f}")
    Console().print(table)
    return 0
