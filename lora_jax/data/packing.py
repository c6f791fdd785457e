"""Fits encoded rows to a length and packs them into sequences of exactly that length."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from lora_jax.data.chat import Encoded
from lora_jax.data.formats import SHOWN_OFFENDERS, listed
from lora_jax.errors import InputError

Truncate = Literal["error", "drop", "end"]
"""What happens to a row that is too long: refuse the data, drop the row, or cut its end off."""


class Fitted(NamedTuple):
    """Rows that fit, and how many were dropped or cut to get there."""

    rows: tuple[Encoded, ...]
    dropped: int
    cut: int


class Packed(NamedTuple):
    """Sequences of several rows each, side by side and told apart by segment ids.

    Attributes:
      tokens: (S, T) int32, 0 where there is none.
      positions: (S, T) int32, counted from 0 anew in each row.
      segment_ids: (S, T) int32, 1, 2, ... for the rows of a sequence and 0 for padding.
      trained: (S, T) bool, whether the token is one that the model has to produce.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    trained: np.ndarray


def fit_rows(rows: Sequence[Encoded], max_length: int, truncate: Truncate = "error") -> Fitted:
    """Applies the policy for rows longer than ``max_length`` tokens.

    Args:
      rows: encoded rows.
      max_length: the most tokens a row may have.
      truncate: ``"error"`` refuses the data, ``"drop"`` leaves long rows out, ``"end"`` cuts
        them and leaves out rows that have no trained token then.

    Raises:
      InputError: rows are too long and the policy is ``"error"``, no row is left, or the
        policy or the length makes no sense.

    >>> row = Encoded(np.arange(5, dtype=np.int32), np.array([False, True, True, True, True]))
    >>> fitted = fit_rows([row], max_length=3, truncate="end")
    >>> fitted.rows[0].ids, fitted.dropped, fitted.cut
    (array([0, 1, 2], dtype=int32), 0, 1)
    """
    if truncate not in _POLICIES:
        choices = "|".join(get_args(Truncate))
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


def pack_rows(rows: Sequence[Encoded], length: int, vocab_size: int) -> Packed:
    """Packs rows into as few sequences as best-fit decreasing finds.

    The same rows in the same order give the same sequences: there is no random choice.

    Args:
      rows: encoded rows of at most ``length`` tokens each.
      length: T, tokens in a sequence.
      vocab_size: rows of the model's embedding; out-of-range ids would be clamped in silence.

    Raises:
      InputError: a row is too long, an id is outside the vocabulary, or no token is trained.

    >>> row = Encoded(np.array([7, 8, 9], np.int32), np.array([False, False, True]))
    >>> packed = pack_rows([row, row, row], length=7, vocab_size=10)
    >>> packed.tokens
    array([[7, 8, 9, 7, 8, 9, 0],
           [7, 8, 9, 0, 0, 0, 0]], dtype=int32)
    >>> packed.segment_ids[0], packed.positions[0]
    (array([1, 1, 1, 2, 2, 2, 0], dtype=int32), array([0, 1, 2, 0, 1, 2, 0], dtype=int32))
    """
    _refuse_long(rows, length)
    _check_ids(rows, vocab_size)
    if not any(row.trained[1:].any() for row in rows):
        raise InputError(
            f"no token of {len(rows)} rows can be trained: give rows with assistant turns that "
            "the chat template writes out"
        )
    bins = best_fit_decreasing([len(row.ids) for row in rows], length)
    return Packed(*map(np.stack, zip(*(_sequence(rows, b, length) for b in bins), strict=True)))


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bin packing: longest first, each into the fullest bin that still has room.

    Args:
      lengths: item sizes, each at most ``capacity``; equal ones are taken in order.
      capacity: the size of a bin.

    Returns:
      The items' indices, bin by bin, ascending within a bin. At most 11/9 of the fewest bins
      possible, plus 4 (Johnson, Demers, Ullman, Garey and Graham 1974, "Worst-case performance
      bounds for simple one-dimensional packing algorithms").

    >>> best_fit_decreasing([2, 6, 4, 3], capacity=8)
    [[0, 1], [2, 3]]
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        room, bin_index = _take_tightest(rooms, lengths[item]) or (capacity, len(bins))
        if bin_index == len(bins):
            bins.append([])
        bins[bin_index].append(item)
        if room > lengths[item]:
            insort(rooms, (room - lengths[item], bin_index))
    return [sorted(items) for items in bins]


def _take_tightest(rooms: list[tuple[int, int]], size: int) -> tuple[int, int] | None:
    found = bisect_left(rooms, (size, 0))
    return rooms.pop(found) if found < len(rooms) else None


def _sequence(rows: Sequence[Encoded], members: Sequence[int], length: int) -> Packed:
    packed = Packed(*(np.zeros(length, dtype) for dtype in (np.int32, np.int32, np.int32, bool)))
    start = 0
    for segment, row in enumerate((rows[member] for member in members), start=1):
        here = slice(start, start + len(row.ids))
        packed.tokens[here] = row.ids
        packed.positions[here] = np.arange(len(row.ids))
        packed.segment_ids[here] = segment
        packed.trained[here] = row.trained
        start = here.stop
    return packed


def _refuse_long(rows: Sequence[Encoded], max_length: int) -> None:
    long = [row for row in rows if len(row.ids) > max_length]
    if long:
        shown = ", ".join(f"{row.place} ({len(row.ids)})" for row in long[:SHOWN_OFFENDERS])
        more = ", ..." if len(long) > SHOWN_OFFENDERS else ""
        raise InputError(
            f"{len(long)} of {len(rows)} rows are longer than {max_length} tokens, the longest "
            f"{_longest(long)}: {shown}{more}: pass --max-length {_longest(long)}, or "
            "--truncate drop|end"
        )


def _check_ids(rows: Sequence[Encoded], vocab_size: int) -> None:
    faults = [fault for row in rows for fault in _outside(row, vocab_size)]
    if faults:
        raise InputError(
            f"{len(faults)} of {len(rows)} rows hold token ids outside the model's vocabulary "
            f"[0, {vocab_size}): use the tokenizer that came with the model: {listed(faults)}"
        )


def _outside(row: Encoded, vocab_size: int) -> Iterator[str]:
    outside = row.ids[(row.ids < 0) | (row.ids >= vocab_size)]
    if len(outside):
        yield f"{row.place}: id {outside[0]}"


def _longest(rows: Sequence[Encoded]) -> int:
    return max(len(row.ids) for row in rows)


def _error(rows: Sequence[Encoded], max_length: int) -> Fitted:
    _refuse_long(rows, max_length)
    return Fitted(tuple(rows), dropped=0, cut=0)


def _drop(rows: Sequence[Encoded], max_length: int) -> Fitted:
    kept = tuple(row for row in rows if len(row.ids) <= max_length)
    return Fitted(kept, dropped=len(rows) - len(kept), cut=0)


def _cut(rows: Sequence[Encoded], max_length: int) -> Fitted:
    kept = [row for row in rows if row.trained[1:max_length].any()]
    cut = sum(len(row.ids) > max_length for row in kept)
    ends = (Encoded(row.ids[:max_length], row.trained[:max_length], row.place) for row in kept)
    return Fitted(tuple(ends), dropped=len(rows) - len(kept), cut=cut)


_POLICIES: dict[str, Callable[[Sequence[Encoded], int], Fitted]] = {
    "error": _error,
    "drop": _drop,
    "end": _cut,
}
