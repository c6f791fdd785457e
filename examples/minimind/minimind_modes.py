"""The two ways to train: the notebook's, to the digit, and the right one.

=================  ==============================  ========================================
                   ``faithful``                    ``default``
=================  ==============================  ========================================
target             the token after the next        the next token
learnt of a turn   all but its first token, and    the answer and its closing
                   one token after its closing
loss of a batch    sum / (count + 1e-8)            sum / count
accumulation       mean of the batches' means,     mean over the tokens of all batches
                   over ``accumulate`` though the
                   first update has a batch less
an update ends     after batch n of an epoch, n    after ``accumulate`` batches, or what is
                   from 1, if n + 1 divides        left
learning rate      1.1 to 0.1 of the peak, over    1 to 0.1 of the peak, over updates
                   batches counted from 1
between stages     weights rounded to float16      weights as they are
roles              by turn, the first the user's   as the row says
=================  ==============================  ========================================
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from lora_jax.train.losses import LossSum
from lora_jax.train.schedules import schedule

from minimind_rows import Mark, TokenRow


class Batch(NamedTuple):
    """Some rows, beside what each position of them should predict."""

    inputs: np.ndarray
    """(rows, length - 1) int32."""
    targets: np.ndarray
    """(rows, length - 1) int32."""
    weights: np.ndarray
    """(rows, length - 1) float32: 1 where the target is learnt."""
    share: np.ndarray
    """() float32: what the batch's mean counts as in an update of means."""


class Update(NamedTuple):
    """Which batches an update is made of."""

    batches: range
    share: float
    """Of each, where means are averaged: their shares are the update's divisor together."""
    count: int
    """What the schedule is asked for."""


@dataclass(frozen=True)
class Mode:
    """One way to train, as a row of the table above."""

    mark: Mark
    targets: Callable[[Sequence[TokenRow]], Batch]
    reduce: Callable[[LossSum, Any], LossSum]
    """``reduce(sum over a batch, share)``: what is summed over an update, and divided."""
    updates: Callable[[int, int, int], list[Update]]
    """``updates(batches, accumulate, batches an epoch)``."""
    rates: Callable[[float, int, Sequence[Update]], np.ndarray]
    """``rates(peak, batches, updates)``: the learning rate of each update."""
    saved_dtype: str
    roles_by_turn: bool


def learnt(offset: int, ids: Sequence[int], begin: Sequence[int], end: Sequence[int]) -> np.ndarray:
    """1 for each answer and its closing, all of it moved right by ``offset``.

    >>> learnt(0, [8, 7, 1, 2, 9, 0], begin=[8, 7], end=[9]).tolist()
    [0.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    >>> learnt(1, [8, 7, 1, 2, 9, 0], begin=[8, 7], end=[9]).tolist()
    [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    """
    marks = np.zeros(len(ids), np.float32)
    for first, last in _answers(list(ids), list(begin), list(end)):
        marks[first + offset : last + offset] = 1
    return marks


def _answers(ids: list[int], begin: list[int], end: list[int]) -> Iterator[tuple[int, int]]:
    """Where each answer begins, and where its closing ends; that of one cut off is the row's."""
    at = 0
    while (opening := _find(ids, begin, at)) is not None:
        first = opening + len(begin)
        closing = _find(ids, end, first)
        at = len(ids) if closing is None else closing + len(end)
        yield first, at


def _find(ids: list[int], wanted: list[int], start: int) -> int | None:
    places = range(start, len(ids) - len(wanted) + 1)
    return next((at for at in places if ids[at : at + len(wanted)] == wanted), None)


def next_token(rows: Sequence[TokenRow]) -> Batch:
    """Every position predicts the token after it."""
    ids, weights = (np.stack(part) for part in zip(*rows, strict=True))
    return Batch(ids[:, :-1], ids[:, 1:], weights[:, 1:], np.float32(1))


def token_after_next(rows: Sequence[TokenRow]) -> Batch:
    """Every position predicts the token two further on; the last one predicts nothing.

    The notebook's dataset moves the targets by one, and its loop by another one.
    """
    batch = next_token(rows)
    moved = (np.pad(part[:, 1:], ((0, 0), (0, 1))) for part in batch[1:3])
    return Batch(batch.inputs, *moved, batch.share)


def over_tokens(loss: LossSum, share: Any) -> LossSum:
    """Sums as they are: every token of an update weighs the same."""
    return loss


def over_means(loss: LossSum, share: Any) -> LossSum:
    """The batch's mean, with the notebook's guard against 0/0."""
    return LossSum(loss.total / (loss.tokens + 1e-8), share)


def whole_updates(batches: int, accumulate: int, per_epoch: int) -> list[Update]:
    """``accumulate`` batches each; the last has what is left."""
    firsts = range(0, batches, accumulate)
    groups = [range(first, min(first + accumulate, batches)) for first in firsts]
    return [Update(group, 1.0, count) for count, group in enumerate(groups)]


def updates_counted_from_one(batches: int, accumulate: int, per_epoch: int) -> list[Update]:
    """The notebook's: what an epoch leaves over goes to the next one's first update.

    >>> [list(update.batches) for update in updates_counted_from_one(8, 4, per_epoch=8)]
    [[0, 1, 2], [3, 4, 5, 6]]
    """
    lasts = [at for at in range(batches) if (at % per_epoch + 2) % accumulate == 0]
    firsts = [0, *(last + 1 for last in lasts)]
    groups = [range(first, last + 1) for first, last in zip(firsts, lasts, strict=False)]
    return [Update(group, accumulate / len(group), group[-1]) for group in groups]


def _rates(
    name: str, floor: float, by_batch: bool, peak: float, batches: int, updates: Sequence[Update]
) -> np.ndarray:
    rate = schedule(name, peak, batches if by_batch else len(updates), floor=floor)
    return rate(np.array([update.count for update in updates]))


MODES = {
    "default": Mode(
        mark=partial(learnt, 0),
        targets=next_token,
        reduce=over_tokens,
        updates=whole_updates,
        rates=partial(_rates, "cosine", 0.1, False),
        saved_dtype="float32",
        roles_by_turn=False,
    ),
    "faithful": Mode(
        mark=partial(learnt, 1),
        targets=token_after_next,
        reduce=over_means,
        updates=updates_counted_from_one,
        rates=partial(_rates, "minimind", 0.0, True),
        saved_dtype="float16",
        roles_by_turn=True,
    ),
}
