"""Time tracing and lowering of the rewrite beside LoRA written by hand, on one plain decoder."""

from dataclasses import dataclass

from lora_jax.errors import InputError


@dataclass(frozen=True)
class Options:
    """The decoder to trace; shapes only, nothing is compiled or computed."""

    layers: int = 32
    """Layers of the unrolled decoder."""
    scanned: tuple[int, ...] = (4, 64)
    """Layers of the decoders that scan over them."""
    rounds: int = 5
    """Of all sides in turns, after one to warm up."""


def run(options: Options) -> int:
    """Print CPU seconds of both sides, their ratio and its floor."""
    from rich.console import Console
    from rich.table import Table

    from lora_jax.cli.trace_times import trace_times

    _check(options)
    programs = [(f"{options.layers} layers, unrolled", options.layers, False)]
    programs += [(f"{layers} layers, scanned", layers, True) for layers in options.scanned]
    columns = "by hand, s", "rewrite, s", "ratio", "floor"
    table = Table("median of CPU time", *columns, title="tracing and lowering the gradient")
    for name, layers, scanned in programs:
        times = trace_times(layers, options.rounds, scanned=scanned)
        numbers = times.hand_written, times.rewrite, times.ratio, times.floor / times.hand_written
        table.add_row(name, *(f"{number:.2f}" for number in numbers))
    Console().print(table)
    return 0


def _check(options: Options) -> None:
    counts = {"layers": (options.layers,), "scanned": options.scanned, "rounds": (options.rounds,)}
    low = {f"--{name} {count}" for name, counts in counts.items() for count in counts if count < 1}
    if low:
        raise InputError(f"{', '.join(sorted(low))}: give at least 1")
