"""From files of rows to arranged sequences and the batches of a run."""

from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from lora_jax.cli.base import Base
from lora_jax.cli.options import DataOptions
from lora_jax.cli.terminal import open_console
from lora_jax.data.arranging import arrange_rows
from lora_jax.data.batch_plan import BatchPlan, plan_batches
from lora_jax.data.chat import encode_rows
from lora_jax.data.faults import listed
from lora_jax.data.fitting import fit_rows
from lora_jax.data.formats import Row, read_file
from lora_jax.data.packing import Packed
from lora_jax.errors import InputError

SAMPLED_QUESTIONS = 6


class Rows(NamedTuple):
    """The rows of the files, as read."""

    train: tuple[Row, ...]
    heldout: tuple[Row, ...]


class Sequences(NamedTuple):
    """Rows arranged in sequences, a group for each length, and the shapes of their batches."""

    packed: tuple[Packed, ...]
    batches: BatchPlan


def read(options: DataOptions) -> Rows:
    """Read both files; nothing else is needed to find what is wrong with them."""
    heldout = options.heldout
    return Rows(_read(options.data, options), _read(heldout, options) if heldout else ())


def _read(path: Path, options: DataOptions) -> tuple[Row, ...]:
    found = read_file(
        path, skip_bad_lines=options.skip_bad_lines, ignore_fields=options.ignore_fields
    )
    if found.skipped:
        message = f"skipped   {len(found.skipped)} rows of {path}: {listed(found.skipped)}"
        open_console().print(message, markup=False, soft_wrap=True)
    return found.rows


def pack(
    options: DataOptions, rows: tuple[Row, ...], base: Base, console: Console, shards: int = 1
) -> Sequences:
    """Encode rows in the base's chat format and arrange them; say what the length limit cost.

    A step has ``accumulate`` micro-batches for each of ``shards`` groups of devices.

    Raises:
      InputError: rows longer than the limit, without a trained token, or not expressible.
    """
    if options.max_length > base.config.max_positions:
        raise InputError(
            f"max_length is {options.max_length}, but {base.name} has {base.config.max_positions} "
            "positions: lower --max-length"
        )
    encoded = encode_rows(base.chat, rows, options.assistant_turns)
    fitted = fit_rows(encoded, options.max_length, options.truncate)
    if fitted.dropped or fitted.cut or fitted.split:
        console.print(
            f"too long  {fitted.dropped} rows left out, {fitted.cut} cut, {fitted.split} split "
            f"at {options.max_length} tokens (--truncate {options.truncate})"
        )
    packed = arrange_rows(
        fitted.rows,
        packing=options.packing,
        max_length=options.max_length,
        vocab_size=base.config.vocab_size,
        sequences_per_step=options.batch_size * options.accumulate * shards,
    )
    batches = plan_batches(
        packed,
        batch_size=options.batch_size,
        epochs=options.epochs,
        accumulate=options.accumulate * shards,
    )
    return Sequences(packed, batches)


def questions(rows: Rows, given: tuple[str, ...]) -> tuple[str, ...]:
    """The prompts given, or the first user turns of the held-out (else the training) rows.

    There are none in plain text, and then nothing is asked.
    """
    return given or _first_questions(rows.heldout) or _first_questions(rows.train)


def _first_questions(rows: tuple[Row, ...]) -> tuple[str, ...]:
    firsts = (next((m["content"] for m in row.messages if m["role"] == "user"), "") for row in rows)
    return tuple(dict.fromkeys(filter(None, firsts)))[:SAMPLED_QUESTIONS]
