"""From files of chat rows to packed sequences and the batches of a run."""

from typing import NamedTuple

from rich.console import Console

from lora_jax.cli.base import Base
from lora_jax.cli.options import DataOptions
from lora_jax.data.batches import BatchPlan, plan_batches
from lora_jax.data.chat import encode_rows
from lora_jax.data.formats import Row, read_rows
from lora_jax.data.packing import Packed, fit_rows, pack_rows
from lora_jax.errors import InputError

SAMPLED_QUESTIONS = 6


class Rows(NamedTuple):
    """The rows of the files, as read."""

    train: tuple[Row, ...]
    heldout: tuple[Row, ...]


class Sequences(NamedTuple):
    """Packed rows and the shapes of their batches."""

    packed: Packed
    batches: BatchPlan


def read(options: DataOptions) -> Rows:
    """Read both files; nothing else is needed to find what is wrong with them."""
    return Rows(read_rows(options.data), read_rows(options.heldout) if options.heldout else ())


def pack(options: DataOptions, rows: tuple[Row, ...], base: Base, console: Console) -> Sequences:
    """Encode rows in the base's chat format and pack them; say what the length limit cost.

    Raises:
      InputError: rows longer than the limit, without a trained token, or not expressible.
    """
    if options.max_length > base.config.max_positions:
        raise InputError(
            f"max_length is {options.max_length}, but {base.name} has {base.config.max_positions} "
            "positions: lower --max-length"
        )
    fitted = fit_rows(encode_rows(base.chat, rows), options.max_length, options.truncate)
    if fitted.dropped or fitted.cut:
        console.print(
            f"too long  {fitted.dropped} rows left out, {fitted.cut} cut at {options.max_length} "
            f"tokens (--truncate {options.truncate})"
        )
    packed = pack_rows(fitted.rows, options.max_length, base.config.vocab_size)
    batches = plan_batches(
        packed,
        batch_size=options.batch_size,
        epochs=options.epochs,
        accumulate=options.accumulate if options.accumulate != 1 else None,
    )
    return Sequences(packed, batches)


def questions(rows: Rows, given: tuple[str, ...]) -> tuple[str, ...]:
    """The prompts given, or the first user turns of the held-out (else the training) rows."""
    firsts = (
        next((m["content"] for m in row.messages if m["role"] == "user"), "")
        for row in rows.heldout or rows.train
    )
    return given or tuple(dict.fromkeys(filter(None, firsts)))[:SAMPLED_QUESTIONS]
