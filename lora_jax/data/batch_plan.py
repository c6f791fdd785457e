"""Counts what a run over arranged sequences will see, and fixes the shapes of its batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lora_jax.data.packing import Packed
from lora_jax.errors import InputError

PREDICTIONS_MULTIPLE = 32


class Shape(NamedTuple):
    """Batches of one shape, and what an epoch has of them.

    Attributes:
      sequences: in the group, each once an epoch.
      length: T, positions in a sequence.
      predictions: N, the same for every batch of the group.
    """

    sequences: int
    length: int
    predictions: int


@dataclass(frozen=True)
class BatchPlan:
    """The shapes and counts of a run over arranged sequences, all known before it starts.

    Attributes:
      rows: conversations and texts.
      shapes: of the groups of sequences, shortest first.
      tokens: tokens of all rows, padding not counted.
      trained_tokens: tokens that are predicted, each once an epoch.
      batch_size: B, sequences in a (micro-)batch.
      accumulate: A, micro-batches in a step, or None for batches without that axis.
      epochs: how often each sequence is seen.
    """

    rows: int
    shapes: tuple[Shape, ...]
    tokens: int
    trained_tokens: int
    batch_size: int
    accumulate: int | None
    epochs: int

    @property
    def sequences(self) -> int:
        return sum(shape.sequences for shape in self.shapes)

    @property
    def length(self) -> int:
        """The longest sequence's."""
        return max(shape.length for shape in self.shapes)

    @property
    def sequences_per_step(self) -> int:
        return self.batch_size * (self.accumulate or 1)

    @property
    def positions_per_step(self) -> int:
        """Positions computed in a step of the longest sequences, padding included."""
        return self.sequences_per_step * self.length

    @property
    def steps_per_epoch(self) -> int:
        return sum(-(-shape.sequences // self.sequences_per_step) for shape in self.shapes)

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    @property
    def positions(self) -> int:
        """Positions computed in an epoch, padding and empty sequences included."""
        return sum(
            -(-shape.sequences // self.sequences_per_step) * self.sequences_per_step * shape.length
            for shape in self.shapes
        )

    @property
    def padding_share(self) -> float:
        """The share of computed positions that hold no token, empty sequences included."""
        return 1 - self.tokens / self.positions

    def __str__(self) -> str:
        lengths = ", ".join(str(shape.length) for shape in self.shapes)
        return (
            f"{self.rows} rows, {self.tokens} tokens, {self.trained_tokens} trained "
            f"({self.trained_tokens / self.tokens:.0%}), in {self.sequences} sequences of "
            f"{lengths} ({self.padding_share:.0%} padding); {self.sequences_per_step} "
            f"sequences a step, {self.steps_per_epoch} steps an epoch, {self.steps} in all"
            f"{_room_to_spare(self)}"
        )


def plan_batches(
    groups: Sequence[Packed],
    *,
    batch_size: int,
    epochs: int = 1,
    accumulate: int | None = None,
) -> BatchPlan:
    """Counts what a run will see and fixes the shapes of its batches.

    A batch has room for the most predictions that any ``batch_size`` of its group's sequences can
    hold, rounded up to a multiple of 32. That doesn't depend on the seed or on the epochs.

    Args:
      groups: sequences from ``arrange_rows``.
      batch_size: B, sequences in a (micro-)batch.
      epochs: how often each sequence is seen.
      accumulate: A, micro-batches in a step, or None for batches without that axis.

    Raises:
      InputError: a count is less than 1, or there is no sequence.

    >>> from lora_jax.data.arranging import arrange_rows
    >>> from lora_jax.data.chat import Encoded
    >>> row = Encoded(np.array([7, 8, 9], np.int32), np.array([False, False, True]))
    >>> groups = arrange_rows([row] * 4, max_length=6, vocab_size=10)
    >>> print(plan_batches(groups, batch_size=2, epochs=3))
    4 rows, 12 tokens, 4 trained (33%), in 2 sequences of 6 (0% padding); 2 sequences a step, \
1 steps an epoch, 3 in all
    """
    _refuse_below_one({"batch_size": batch_size, "epochs": epochs, "accumulate": accumulate})
    if not any(len(group.tokens) for group in groups):
        raise InputError("there is no sequence to make batches of: give at least one row")
    return BatchPlan(
        rows=sum(int(group.segment_ids.max(axis=1).sum()) for group in groups),
        shapes=tuple(_shape(group, batch_size) for group in groups),
        tokens=sum(int(np.count_nonzero(group.segment_ids)) for group in groups),
        trained_tokens=sum(int(next_is_trained(group).sum()) for group in groups),
        batch_size=batch_size,
        accumulate=accumulate,
        epochs=epochs,
    )


def next_is_trained(packed: Packed) -> np.ndarray:
    """(S, T) bool: the next position holds a trained token of the same row."""
    same_row = packed.segment_ids[:, 1:] == packed.segment_ids[:, :-1]
    return np.pad(packed.trained[:, 1:] & same_row, ((0, 0), (0, 1)))


def _shape(packed: Packed, batch_size: int) -> Shape:
    trained = np.sort(next_is_trained(packed).sum(axis=1))
    most = int(trained[-batch_size:].sum())
    predictions = -(-most // PREDICTIONS_MULTIPLE) * PREDICTIONS_MULTIPLE
    sequences, length = packed.tokens.shape
    return Shape(sequences, length, predictions)


def _room_to_spare(plan: BatchPlan) -> str:
    """A word about steps that no epoch can fill."""
    short = [shape for shape in plan.shapes if shape.sequences < plan.sequences_per_step]
    if not short:
        return ""
    missing = sum(plan.sequences_per_step - shape.sequences for shape in short)
    return (
        f"; a step has room for {plan.sequences_per_step}, so {missing} stay empty in every "
        "epoch: lower --batch-size or --accumulate"
    )


def _refuse_below_one(counts: dict[str, int | None]) -> None:
    faults = [f"{name} is {n}" for name, n in counts.items() if n is not None and n < 1]
    if faults:
        raise InputError(f"{', '.join(faults)}: pass 1 or more")
