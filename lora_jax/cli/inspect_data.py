"""Show the first rows of a file as the model reads them, with the trained tokens marked."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Options:
    """What to show."""

    data: Annotated[Path, tyro.conf.Positional]
    """JSON Lines file of chat rows."""
    model: str = "smollm2-135m"
    """Whose tokenizer and chat template are used."""
    rows: int = 5
    """Rows to show; the statistics count all of them."""


def run(options: Options) -> int:
    """Print the rows."""
    from lora_jax.data.formats import read_rows

    rows = read_rows(options.data)
    from lora_jax.cli.base import load_base
    from lora_jax.cli.terminal import open_console
    from lora_jax.data.preview import preview

    console = open_console()
    chat = load_base(options.model, None, console).chat
    colour = console.color_system is not None
    console.print(preview(rows, chat, options.rows, colour=colour), soft_wrap=True)
    return 0
