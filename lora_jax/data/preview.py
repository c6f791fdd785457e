"""Shows rows as the model will read them, with the tokens it is trained on marked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lora_jax.data.chat import ChatFormat, Encoded, encode_rows
from lora_jax.data.faults import printable
from lora_jax.data.formats import Row

if TYPE_CHECKING:
    from rich.text import Text
    from tokenizers import Tokenizer

TRAINED_STYLE = "bold green"
BEGIN_TRAINED, END_TRAINED = "⟦", "⟧"


def preview(rows: Sequence[Row], chat_format: ChatFormat, n: int, *, colour: bool) -> Text:
    """The first ``n`` rows as the model reads them, then statistics of all rows.

    Args:
      rows: from ``read_rows``.
      chat_format: tokenizer and template of the model.
      n: rows to show.
      colour: mark trained tokens by colour, or else by ⟦ ⟧, which survives a pipe and NO_COLOR;
        pass ``console.color_system is not None``.

    Returns:
      A ``rich`` text; ``str()`` of it is plain.

    Raises:
      InputError: the chat template can't express some rows.
    """
    from rich.text import Text

    encoded = encode_rows(chat_format, rows)
    shown = [_row(row, chat_format.tokenizer, colour) for row in encoded[:n]]
    return Text("\n").join([*shown, Text(summary(encoded))])


def summary(rows: Sequence[Encoded]) -> str:
    """Rows, tokens, the trained share, and how long the rows are.

    >>> print(summary([Encoded(np.zeros(4, np.int32), np.array([False, False, True, True]))]))
    1 rows, 4 tokens, 2 trained (50%)
    tokens a row: min 4, median 4, p95 4, max 4
    """
    lengths = np.array([len(row.ids) for row in rows])
    trained = sum(int(row.trained.sum()) for row in rows)
    # "higher" gives the length of some row, so that p95 can be passed as a limit.
    low, middle, high, most = np.percentile(lengths, [0, 50, 95, 100], method="higher")
    return (
        f"{len(rows)} rows, {lengths.sum()} tokens, {trained} trained "
        f"({trained / lengths.sum():.0%})\n"
        f"tokens a row: min {low}, median {middle}, p95 {high}, max {most}"
    )


def _row(row: Encoded, tokenizer: Tokenizer, colour: bool) -> Text:
    from rich.text import Text

    text = Text().append(
        f"{row.place}: {len(row.ids)} tokens, {row.trained.sum()} trained\n", "dim"
    )
    mark = _coloured if colour else _bracketed
    for trained, piece in _pieces(row, tokenizer):
        text.append(*(mark(piece) if trained else (piece, None)))
    return text.append("\n")


def _coloured(piece: str) -> tuple[str, str | None]:
    return piece, TRAINED_STYLE


def _bracketed(piece: str) -> tuple[str, str | None]:
    return f"{BEGIN_TRAINED}{piece}{END_TRAINED}", None


def _pieces(row: Encoded, tokenizer: Tokenizer) -> Iterator[tuple[bool, str]]:
    """The row's text cut where trained tokens begin or end, safe to print."""
    changes = np.flatnonzero(np.diff(row.trained)) + 1
    runs = np.split(row.ids, changes)
    for ids, trained in zip(runs, row.trained[[0, *changes]], strict=True):
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        yield bool(trained), "\n".join(map(printable, text.split("\n")))
