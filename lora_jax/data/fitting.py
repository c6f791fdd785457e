"""Applies the policy for rows longer than the limit, and counts what it did."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from lora_jax.data.chat import Encoded
from lora_jax.data.faults import SHOWN_OFFENDERS
from lora_jax.errors import InputError

Truncate = Literal["error", "drop", "end", "split"]
"""What happens to a row that is too long: refuse the data, drop the row, cut its end off, or
split plain text into pieces."""


class Fitted(NamedTuple):
    """Rows that fit, and how many were dropped, cut or split to get there."""

    rows: tuple[Encoded, ...]
    dropped: int = 0
    cut: int = 0
    split: int = 0


def fit_rows(rows: Sequence[Encoded], max_length: int, truncate: Truncate = "error") -> Fitted:
    """Applies the policy for rows longer than ``max_length`` tokens.

    Args:
      rows: encoded rows.
      max_length: the most tokens a row may have.
      truncate: ``"error"`` refuses the data, ``"drop"`` leaves long rows out, ``"end"`` cuts
        them and leaves out rows that have no trained token then, ``"split"`` cuts plain text
        (rows trained from end to end) into pieces and refuses other long rows. A piece begins
        with the last token of the one before, so that still every token but a text's first
        is predicted once.

    Raises:
      InputError: rows are too long for the policy, no row is left, or the policy or the length
        makes no sense.

    >>> row = Encoded(np.arange(5, dtype=np.int32), np.array([False, True, True, True, True]))
    >>> fitted = fit_rows([row], max_length=3, truncate="end")
    >>> fitted.rows[0].ids.tolist(), fitted.dropped, fitted.cut
    ([0, 1, 2], 0, 1)
    >>> text = Encoded(np.arange(5, dtype=np.int32), np.ones(5, bool))
    >>> [piece.ids.tolist() for piece in fit_rows([text], max_length=3, truncate="split").rows]
    [[0, 1, 2], [2, 3, 4]]
    """
    if truncate not in _POLICIES:
        choices = "|".join(_POLICIES)
        raise InputError(f"truncate is {truncate!r}: pass --truncate {choices}")
    if max_length < 2:
        raise InputError(f"max_length is {max_length}: pass --max-length 2 or more")
    fitted = _POLICIES[truncate](rows, max_length)
    if rows and not fitted.rows:
        raise InputError(
            f"no row of {len(rows)} has a trained token within {max_length} tokens: "
            f"pass --max-length {_longest(rows)}"
        )
    return fitted


def refuse_long(rows: Sequence[Encoded], max_length: int) -> None:
    """Raise one InputError that names rows longer than ``max_length`` and how long they are."""
    long = [row for row in rows if len(row.ids) > max_length]
    if long:
        shown = ", ".join(f"{row.place} ({len(row.ids)})" for row in long[:SHOWN_OFFENDERS])
        more = ", ..." if len(long) > SHOWN_OFFENDERS else ""
        raise InputError(
            f"{len(long)} of {len(rows)} rows are longer than {max_length} tokens, the longest "
            f"{_longest(long)}: {shown}{more}: pass --max-length {_longest(long)}, or "
            "--truncate drop|end|split"
        )


def _longest(rows: Sequence[Encoded]) -> int:
    return max(len(row.ids) for row in rows)


def _error(rows: Sequence[Encoded], max_length: int) -> Fitted:
    refuse_long(rows, max_length)
    return Fitted(tuple(rows))


def _drop(rows: Sequence[Encoded], max_length: int) -> Fitted:
    kept = tuple(row for row in rows if len(row.ids) <= max_length)
    return Fitted(kept, dropped=len(rows) - len(kept))


def _cut(rows: Sequence[Encoded], max_length: int) -> Fitted:
    kept = [row for row in rows if row.trained[1:max_length].any()]
    cut = sum(len(row.ids) > max_length for row in kept)
    ends = (Encoded(row.ids[:max_length], row.trained[:max_length], row.place) for row in kept)
    return Fitted(tuple(ends), dropped=len(rows) - len(kept), cut=cut)


def _split(rows: Sequence[Encoded], max_length: int) -> Fitted:
    refuse_long([row for row in rows if not row.trained.all()], max_length)
    pieces = tuple(piece for row in rows for piece in _pieces(row, max_length))
    return Fitted(pieces, split=sum(len(row.ids) > max_length for row in rows))


def _pieces(row: Encoded, length: int) -> Iterator[Encoded]:
    yield Encoded(row.ids[:length], row.trained[:length], row.place)
    for start in range(length - 1, len(row.ids) - 1, length - 1):
        here = slice(start, start + length)
        is_new = np.arange(len(row.ids[here])) > 0
        yield Encoded(row.ids[here], row.trained[here] & is_new, row.place)


_POLICIES: dict[str, Callable[[Sequence[Encoded], int], Fitted]] = {
    "error": _error,
    "drop": _drop,
    "end": _cut,
    "split": _split,
}
