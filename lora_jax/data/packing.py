"""Packs encoded rows into sequences of one length, side by side and told apart by segments."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lora_jax.data.chat import Encoded
from lora_jax.data.faults import listed
from lora_jax.data.fitting import refuse_long
from lora_jax.errors import InputError


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


def pack_rows(rows: Sequence[Encoded], length: int, vocab_size: int) -> tuple[Packed]:
    """Packs rows into few sequences, each filled as well as the rows that are left allow.

    The same rows in the same order give the same sequences: there is no random choice.

    Args:
      rows: encoded rows of at most ``length`` tokens each.
      length: T, tokens in a sequence.
      vocab_size: rows of the model's embedding; out-of-range ids would be clamped in silence.

    Raises:
      InputError: a row is too long, an id is outside the vocabulary, or no token is trained.

    >>> row = Encoded(np.array([7, 8, 9], np.int32), np.array([False, False, True]))
    >>> [packed] = pack_rows([row, row, row], length=7, vocab_size=10)
    >>> packed.tokens
    array([[7, 8, 9, 7, 8, 9, 0],
           [7, 8, 9, 0, 0, 0, 0]], dtype=int32)
    >>> packed.segment_ids[0].tolist(), packed.positions[0].tolist()
    ([1, 1, 1, 2, 2, 2, 0], [0, 1, 2, 0, 1, 2, 0])
    """
    refuse_untrainable(rows, length, vocab_size)
    bins = fullest_bins([len(row.ids) for row in rows], length)
    return (filled_bins(rows, bins, length),)


def refuse_untrainable(rows: Sequence[Encoded], length: int, vocab_size: int) -> None:
    """Raise an InputError if a row is too long, an id is no token, or no token is trained."""
    refuse_long(rows, length)
    _check_ids(rows, vocab_size)
    if not any(row.trained[1:].any() for row in rows):
        raise InputError(
            f"no token of {len(rows)} rows can be trained: give rows with assistant turns that "
            "the chat template writes out"
        )


def filled_bins(rows: Sequence[Encoded], bins: Sequence[Sequence[int]], length: int) -> Packed:
    """One sequence of ``length`` tokens for each bin of row indices."""
    shape = len(bins), length
    packed = Packed(*(np.zeros(shape, dtype) for dtype in (np.int32, np.int32, np.int32, bool)))
    for sequence, members in enumerate(bins):
        start = 0
        for segment, row in enumerate((rows[member] for member in members), start=1):
            here = sequence, slice(start, start + len(row.ids))
            packed.tokens[here] = row.ids
            packed.positions[here] = np.arange(len(row.ids))
            packed.segment_ids[here] = segment
            packed.trained[here] = row.trained
            start += len(row.ids)
    return packed


def fullest_bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bin packing: each bin takes the longest item left, then those that fill it best.

    The fullest choice for each bin is found exactly, by dynamic programming over the lengths
    that are left (the "minimum bin slack" heuristic of Gupta and Ho 1999, "A new heuristic
    algorithm for the one-dimensional bin-packing problem"). Bins of equal lengths are made
    together, so the work grows with the different lengths rather than with the items.

    Args:
      lengths: item sizes, each at most ``capacity``; equal ones are taken in order.
      capacity: the size of a bin.

    Returns:
      The items' indices, bin by bin, ascending within a bin.

    >>> fullest_bins([2, 6, 4, 3, 1], capacity=8)
    [[0, 1], [2, 3, 4]]
    """
    items: dict[int, deque[int]] = defaultdict(deque)
    for item, length in enumerate(lengths):
        items[length].append(item)
    return [
        sorted(items[length].popleft() for length in bin_lengths)
        for bin_lengths, times in _contents(lengths, capacity)
        for _ in range(times)
    ]


def count_bins(lengths: Sequence[int], capacity: int) -> int:
    """How many bins :func:`fullest_bins` makes."""
    return sum(times for _, times in _contents(lengths, capacity))


def _contents(lengths: Sequence[int], capacity: int) -> Iterator[tuple[list[int], int]]:
    """The lengths in a bin, and how many bins hold the same."""
    left = dict(sorted(Counter(lengths).items(), reverse=True))
    while left:
        longest = next(iter(left))
        left[longest] -= 1
        chosen = Counter([longest, *_fullest(left, capacity - longest)])
        left[longest] += 1
        times = min(left[length] // count for length, count in chosen.items())
        for length, count in chosen.items():
            left[length] -= count * times
        left = {length: count for length, count in left.items() if count}
        yield list(chosen.elements()), times


def _fullest(counts: Mapping[int, int], room: int) -> Iterator[int]:
    """Lengths, each as often as there are items of it, whose sum is the largest up to ``room``.

    The sums that can be reached are the bits of one integer; shifting it adds an item.
    """
    reachable, steps = 1, []
    for length, count in counts.items():
        steps.append((length, reachable))
        reachable = _with_items(reachable, length, min(count, room // length), room)
        if reachable >> room:
            break
    total = reachable.bit_length() - 1
    for length, without in reversed(steps):
        while not without >> total & 1:
            yield length
            total -= length


def _with_items(reachable: int, length: int, count: int, room: int) -> int:
    """The sums reached once up to ``count`` items of a length may be added, doubling them."""
    up_to_room = (2 << room) - 1
    together = 1
    while count > 0:
        together = min(together, count)
        reachable |= reachable << together * length & up_to_room
        count -= together
        together *= 2
    return reachable


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
