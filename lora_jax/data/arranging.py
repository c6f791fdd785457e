"""Arranges rows in sequences of few lengths: packed together, in length buckets, or padded."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from lora_jax.data.chat import Encoded
from lora_jax.data.packing import Packed, count_bins, filled_bins, fullest_bins, refuse_untrainable
from lora_jax.errors import InputError

Packing = Literal["packed", "buckets", "padded"]
"""Several rows a sequence; or one, in sequences of a few lengths; or one, all of one length."""

LENGTH_MULTIPLE = 8
MAX_BUCKETS = 4


def arrange_rows(
    rows: Sequence[Encoded],
    *,
    packing: Packing = "packed",
    max_length: int,
    vocab_size: int,
    sequences_per_step: int = 1,
) -> tuple[Packed, ...]:
    """Puts each row into one sequence, in one group for each length of sequences.

    Each group is a shape that a training step is compiled for. The loss doesn't depend on the
    arrangement, the time does:

    - ``"packed"``: as many rows side by side as fit, in the shortest length that takes no more
      steps than ``max_length`` does. One group.
    - ``"buckets"``: one row a sequence, in at most ``MAX_BUCKETS`` lengths that together have
      the fewest positions. For models that know no segments.
    - ``"padded"``: one row a sequence, all as long as the longest row. One group.

    Lengths are multiples of ``LENGTH_MULTIPLE`` or ``max_length``. The same rows in the same
    order are always arranged alike.

    Args:
      rows: encoded rows of at most ``max_length`` tokens.
      packing: one of the above.
      max_length: the most tokens in a sequence.
      vocab_size: rows of the model's embedding; out-of-range ids would be clamped in silence.
      sequences_per_step: how many a training step takes; the last step of an epoch is filled up
        with empty ones, and they count.

    Raises:
      InputError: a row is too long, an id is outside the vocabulary, no token is trained, or
        there is no such packing.

    >>> def row(length):
    ...     return Encoded(np.ones(length, np.int32), np.ones(length, bool))
    >>> rows = [row(length) for length in (5, 30, 6, 31)]
    >>> for packing in ("packed", "buckets", "padded"):
    ...     groups = arrange_rows(rows, packing=packing, max_length=64, vocab_size=2)
    ...     print(packing, [group.tokens.shape for group in groups])
    packed [(2, 40)]
    buckets [(2, 8), (2, 32)]
    padded [(4, 32)]
    """
    if packing not in _ARRANGEMENTS:
        choices = "|".join(_ARRANGEMENTS)
        raise InputError(f"packing is {packing!r}: pass --packing {choices}")
    refuse_untrainable(rows, max_length, vocab_size)
    return _ARRANGEMENTS[packing](rows, max_length, sequences_per_step)


def shortest_length(lengths: Sequence[int], max_length: int, sequences_per_step: int) -> int:
    """The shortest length of packed sequences that takes no more steps than ``max_length``.

    The last sequences of an epoch are rarely full, and the last step rarely is: what is empty
    there is spread over all sequences and cut off. Found by bisection.

    >>> shortest_length([30, 30, 30], 64, sequences_per_step=3)
    32
    """
    steps = _steps(lengths, max_length, sequences_per_step)
    positions = sum(lengths) / (steps * sequences_per_step)
    lowest = _rounded_up(max(*lengths, int(positions), 1), LENGTH_MULTIPLE)
    shorter = range(lowest, max_length, LENGTH_MULTIPLE)
    fitting = bisect_left(
        shorter, True, key=lambda length: _steps(lengths, length, sequences_per_step) <= steps
    )
    return [*shorter, max_length][fitting]


def bucket_lengths(
    lengths: Sequence[int], max_length: int, sequences_per_step: int, most: int = MAX_BUCKETS
) -> list[int]:
    """The at most ``most`` lengths whose buckets have the fewest positions, empty ones counted.

    Found exactly, by dynamic programming over the lengths that occur.

    >>> bucket_lengths([5, 7, 8, 30, 31, 60], max_length=64, sequences_per_step=1, most=2)
    [8, 64]
    """
    rounded = np.minimum(_rounded_up(np.asarray(lengths), LENGTH_MULTIPLE), max_length)
    choices, counts = np.unique(rounded, return_counts=True)
    up_to = np.concatenate([[0], np.cumsum(counts)])
    # fewest[k][j] and before[k][j]: the first j lengths in k buckets, the last from before[k][j].
    fewest = np.full((most + 1, len(choices) + 1), np.inf)
    before = np.zeros_like(fewest, int)
    fewest[:, 0] = 0
    for k in range(1, most + 1):
        for j in range(1, len(choices) + 1):
            sequences = _rounded_up(up_to[j] - up_to[:j], sequences_per_step)
            positions = fewest[k - 1, :j] + sequences * choices[j - 1]
            before[k, j] = np.argmin(positions)
            fewest[k, j] = positions[before[k, j]]
    found, j = [], len(choices)
    for k in range(int(np.argmin(fewest[:, j])), 0, -1):
        found.append(int(choices[j - 1]))
        j = before[k, j]
    return found[::-1]


def _packed(rows: Sequence[Encoded], max_length: int, per_step: int) -> tuple[Packed, ...]:
    lengths = _lengths(rows)
    length = shortest_length(lengths, max_length, per_step)
    return (filled_bins(rows, fullest_bins(lengths, length), length),)


def _buckets(rows: Sequence[Encoded], max_length: int, per_step: int) -> tuple[Packed, ...]:
    lengths = bucket_lengths(_lengths(rows), max_length, per_step)
    bucket = np.searchsorted(lengths, _lengths(rows))
    return tuple(
        filled_bins(rows, [[int(row)] for row in np.flatnonzero(bucket == index)], length)
        for index, length in enumerate(lengths)
    )


def _padded(rows: Sequence[Encoded], max_length: int, per_step: int) -> tuple[Packed, ...]:
    length = min(_rounded_up(max(_lengths(rows)), LENGTH_MULTIPLE), max_length)
    return (filled_bins(rows, [[row] for row in range(len(rows))], length),)


_ARRANGEMENTS: dict[str, Callable[[Sequence[Encoded], int, int], tuple[Packed, ...]]] = {
    "packed": _packed,
    "buckets": _buckets,
    "padded": _padded,
}


def _lengths(rows: Sequence[Encoded]) -> list[int]:
    return [len(row.ids) for row in rows]


def _steps(lengths: Sequence[int], length: int, sequences_per_step: int) -> int:
    return -(-count_bins(lengths, length) // sequences_per_step)


def _rounded_up(count, multiple: int):
    return -(-count // multiple) * multiple
