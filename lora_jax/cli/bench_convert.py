"""Time conversions between a torch state dict and a parameter tree, beside memcpy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_jax.errors import InputError


@dataclass(frozen=True)
class Options:
    """The state dict: a decoder of 2,048 features with random weights."""

    megabytes: int = 1024
    """Its size, at least."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of all its tensors."""
    rounds: int = 3
    """Of all measurements in turns; the best of each counts."""
    directory: Path | None = None
    """Where the file is written, on the disk that is to be measured; by default a temporary one."""


def run(options: Options) -> int:
    """Print the rates beside memcpy's, and the memory held beyond source and target."""
    from rich.console import Console
    from rich.table import Table

    _check(options)
    from lora_jax.cli.convert_times import conversions

    report = conversions(options)
    memcpy = report.rows[0].rate
    table = Table(title=f"{report.gigabytes:.2f} GB of {options.dtype}")
    for heading in ("what", "GB/s of\nprocessor", "of memcpy", "MB beyond\nboth"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for row in report.rows:
        beyond = "" if row.beyond is None else f"{row.beyond / 1e6:.0f}"
        table.add_row(row.name, f"{row.rate:.2f}", f"{row.rate / memcpy:.2f}", beyond)
    console = Console()
    console.print(table)
    console.print(f"beyond source and target: the largest tensor has {report.largest / 1e6:.0f} MB")
    return 0


def _check(options: Options) -> None:
    low = [n for n in ("megabytes", "rounds") if getattr(options, n) < 1]
    if low:
        raise InputError(", ".join(f"--{n} {getattr(options, n)}" for n in low) + ": at least 1")
    if options.directory is not None and not options.directory.is_dir():
        raise InputError(f"--directory {options.directory}: no such directory")
