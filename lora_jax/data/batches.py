"""Turns packed sequences into batches of fixed shape, shuffled anew each epoch.

Rows are packed once and the sequences are shuffled, not the rows: the shapes are then the same
in every epoch and for every seed, so one compiled step serves the whole run, and the state of
the iterator is one number. Rows in one sequence don't see each other, so which of them share a
sequence only says which share a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lora_jax.data.packing import Packed
from lora_jax.errors import InputError

if TYPE_CHECKING:
    import grain

PREDICTIONS_MULTIPLE = 32


class Batch(NamedTuple):
    """One batch; with accumulation each leaf has a leading axis of micro-batches.

    The loss is ``sum(weights * cross_entropy(logits[predict_at], targets)) / sum(weights)``
    with the logits of all B*T positions flattened, so that only positions whose next token is
    trained need logits at all. A micro-batch may be all padding: divide once, by the sum of the
    weights over all micro-batches.

    Attributes:
      tokens: (B, T) int32.
      positions: (B, T) int32, counted from 0 anew in each row.
      segment_ids: (B, T) int32, 1, 2, ... for rows and 0 for padding.
      predict_at: (N,) int32, indices into the B*T positions.
      targets: (N,) int32, the token after each of those positions, of the same row.
      weights: (N,) float32, 1, and 0 for the entries that fill up N (index 0, target 0).
    """

    tokens: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    predict_at: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class BatchPlan:
    """The shapes and counts of a run over packed sequences, all known before it starts.

    Attributes:
      rows: conversations.
      sequences: packed sequences.
      length: T, positions in a sequence.
      tokens: tokens of all rows, padding not counted.
      trained_tokens: tokens that are predicted, each once an epoch.
      batch_size: B, sequences in a (micro-)batch.
      accumulate: A, micro-batches in a step, or None for batches without that axis.
      epochs: how often each sequence is seen.
      predictions: N, the same for every batch.
    """

    rows: int
    sequences: int
    length: int
    tokens: int
    trained_tokens: int
    batch_size: int
    accumulate: int | None
    epochs: int
    predictions: int

    @property
    def sequences_per_step(self) -> int:
        return self.batch_size * (self.accumulate or 1)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.sequences // self.sequences_per_step)

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    @property
    def padding_share(self) -> float:
        """The share of computed positions that hold no token, empty sequences included."""
        computed = self.steps_per_epoch * self.sequences_per_step * self.length
        return 1 - self.tokens / computed

    def __str__(self) -> str:
        return (
            f"{self.rows} rows, {self.tokens} tokens, {self.trained_tokens} trained "
            f"({self.trained_tokens / self.tokens:.0%}), in {self.sequences} sequences of "
            f"{self.length} ({self.padding_share:.0%} padding); {self.sequences_per_step} "
            f"sequences a step, {self.steps_per_epoch} steps an epoch, {self.steps} in all"
        )


def plan_batches(
    packed: Packed, *, batch_size: int, epochs: int = 1, accumulate: int | None = None
) -> BatchPlan:
    """Counts what a run will see and fixes the shapes of its batches.

    N is the most predictions that any ``batch_size`` of the sequences can hold, rounded up to
    a multiple of 32. It doesn't depend on the seed or on the number of epochs.

    Args:
      packed: sequences from ``pack_rows``.
      batch_size: B, sequences in a (micro-)batch.
      epochs: how often each sequence is seen.
      accumulate: A, micro-batches in a step, or None for batches without that axis.

    Raises:
      InputError: a count is less than 1.

    >>> from lora_jax.data.chat import Encoded
    >>> from lora_jax.data.packing import pack_rows
    >>> row = Encoded(np.array([7, 8, 9], np.int32), np.array([False, False, True]))
    >>> print(plan_batches(pack_rows([row] * 4, length=6, vocab_size=10), batch_size=2, epochs=3))
    4 rows, 12 tokens, 4 trained (33%), in 2 sequences of 6 (0% padding); 2 sequences a step, \
1 steps an epoch, 3 in all
    """
    _refuse_below_one({"batch_size": batch_size, "epochs": epochs, "accumulate": accumulate})
    trained = np.sort(_next_is_trained(packed).sum(axis=1))
    return BatchPlan(
        rows=int(packed.segment_ids.max(axis=1).sum()),
        sequences=packed.tokens.shape[0],
        length=packed.tokens.shape[1],
        tokens=int(np.count_nonzero(packed.segment_ids)),
        trained_tokens=int(trained.sum()),
        batch_size=batch_size,
        accumulate=accumulate,
        epochs=epochs,
        predictions=_rounded_up(int(trained[-batch_size:].sum()), PREDICTIONS_MULTIPLE),
    )


def train_batches(packed: Packed, plan: BatchPlan, *, seed: int) -> grain.DatasetIterator[Batch]:
    """All batches of a run, each sequence once an epoch, in an order drawn from (seed, epoch).

    The last batch of an epoch is filled up with empty sequences of weight 0, which a loss
    weighted by tokens doesn't notice.

    Args:
      packed: the sequences.
      plan: from :func:`plan_batches` on the same sequences.
      seed: 0 <= seed < 2**32.

    Returns:
      An iterator over :class:`Batch` of ``plan.steps`` items. Its ``get_state()`` and
      ``set_state()`` stand between any two batches.

    Raises:
      InputError: the seed is out of range.
    """
    import grain

    if not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed}: pass --seed 0 to {2**32 - 1}")
    order = grain.MapDataset.range(plan.sequences).seed(seed).shuffle()
    groups = order.batch(plan.sequences_per_step).map(partial(_batch, _source(packed), plan))
    # The data lies in memory: reading it in other threads would only contend with the step.
    reading = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(groups.repeat(plan.epochs).to_iter_dataset(reading))


def eval_batches(packed: Packed, plan: BatchPlan) -> Iterator[Batch]:
    """Each sequence once, in order, in batches of the same kind as :func:`train_batches`."""
    source = _source(packed)
    for start in range(0, plan.sequences, plan.sequences_per_step):
        stop = min(start + plan.sequences_per_step, plan.sequences)
        yield _batch(source, plan, np.arange(start, stop))


class _Source(NamedTuple):
    tokens: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    next_is_trained: np.ndarray


def _source(packed: Packed) -> _Source:
    return _Source(*packed[:3], _next_is_trained(packed))


def _next_is_trained(packed: Packed) -> np.ndarray:
    """(S, T) bool: the next position holds a trained token of the same row."""
    same_row = packed.segment_ids[:, 1:] == packed.segment_ids[:, :-1]
    return np.pad(packed.trained[:, 1:] & same_row, ((0, 0), (0, 1)))


def _batch(source: _Source, plan: BatchPlan, chosen: np.ndarray) -> Batch:
    if plan.accumulate is None:
        return _micro_batch(source, plan, chosen)
    parts = np.split(chosen, range(plan.batch_size, plan.sequences_per_step, plan.batch_size))
    micro_batches = (_micro_batch(source, plan, part) for part in parts)
    return Batch(*map(np.stack, zip(*micro_batches, strict=True)))


def _micro_batch(source: _Source, plan: BatchPlan, chosen: np.ndarray) -> Batch:
    tokens, positions, segment_ids, wanted = (
        _filled_up(leaf[chosen], plan.batch_size) for leaf in source
    )
    at = np.flatnonzero(wanted)
    targets = tokens.reshape(-1)[at + 1]
    return Batch(
        tokens,
        positions,
        segment_ids,
        _filled_up(at.astype(np.int32), plan.predictions),
        _filled_up(targets, plan.predictions),
        _filled_up(np.ones(len(at), np.float32), plan.predictions),
    )


def _filled_up(leaf: np.ndarray, count: int) -> np.ndarray:
    """The leaf with zeros after it, ``count`` entries along the first axis."""
    return np.pad(leaf, ((0, count - len(leaf)), *[(0, 0)] * (leaf.ndim - 1)))


def _rounded_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _refuse_below_one(counts: dict[str, int | None]) -> None:
    faults = [f"{name} is {n}" for name, n in counts.items() if n is not None and n < 1]
    if faults:
        raise InputError(f"{', '.join(faults)}: pass 1 or more")
