"""Turns arranged sequences into batches of few shapes, shuffled anew each epoch.

Rows are arranged once and the sequences are shuffled, not the rows: the shapes are then the same
in every epoch and for every seed, so one compiled step a shape serves the whole run, and the
state of the iterator is one number. Rows in one sequence don't see each other, so which of them
share a sequence only says which share a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lora_jax.data.batch_plan import BatchPlan, Shape, next_is_trained
from lora_jax.data.packing import Packed
from lora_jax.errors import InputError

if TYPE_CHECKING:
    import grain


BATCHES_VERSION = 1
"""Raised when the same groups, plan and seed come to give other batches."""


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


def train_batches(
    groups: Sequence[Packed],
    plan: BatchPlan,
    *,
    seed: int,
    own: Sequence[int] | None = None,
    prefetch: int = 0,
) -> grain.DatasetIterator[Batch]:
    """All batches of a run, each sequence once an epoch, in an order drawn from (seed, epoch).

    The last batch of each group in an epoch is filled up with empty sequences of weight 0,
    which a loss weighted by tokens doesn't notice.

    Args:
      groups: sequences from ``arrange_rows``.
      plan: from ``plan_batches`` on the same groups.
      seed: 0 <= seed < 2**32.
      own: numbers of the micro-batches that this process builds, out of the plan's
        ``accumulate``; all by default. What the processes build are together the batches that
        one process alone builds.
      prefetch: batches that one other thread builds ahead. Building one of 16,000 tokens takes
        about a millisecond, and on a CPU the other thread contends with the step: leave it at 0
        there.

    Returns:
      An iterator over :class:`Batch` of ``plan.steps`` items. Its ``get_state()`` and
      ``set_state()`` stand between any two batches; the state is a ``dict`` that JSON can hold.

    Raises:
      InputError: the seed or a micro-batch's number is out of range.
    """
    return iter(train_dataset(groups, plan, seed=seed, own=own, prefetch=prefetch))


def train_dataset(
    groups: Sequence[Packed],
    plan: BatchPlan,
    *,
    seed: int,
    own: Sequence[int] | None = None,
    prefetch: int = 0,
) -> grain.IterDataset[Batch]:
    """What :func:`train_batches` iterates over, to be used with more of ``grain``."""
    import grain

    if not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed}: pass --seed 0 to {2**32 - 1}")
    own = _own_of(plan, own)
    parts = []
    for group, shape in zip(groups, plan.shapes, strict=True):
        order = grain.MapDataset.range(shape.sequences).seed(seed).shuffle()
        build = partial(_batch, _source(group), shape, plan, own)
        parts.append(order.batch(plan.sequences_per_step).map(build))
    batches = grain.MapDataset.concatenate(parts).seed(seed).shuffle() if parts[1:] else parts[0]
    # The data lies in memory: reading it in many threads would only contend with the step.
    reading = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
    return batches.repeat(plan.epochs).to_iter_dataset(reading)


def eval_batches(
    groups: Sequence[Packed], plan: BatchPlan, *, own: Sequence[int] | None = None
) -> Iterator[Batch]:
    """Each sequence once, in order, in batches of the same kind as :func:`train_batches`."""
    own = _own_of(plan, own)
    for group, shape in zip(groups, plan.shapes, strict=True):
        source = _source(group)
        for start in range(0, shape.sequences, plan.sequences_per_step):
            stop = min(start + plan.sequences_per_step, shape.sequences)
            yield _batch(source, shape, plan, own, np.arange(start, stop))


def example_batches(groups: Sequence[Packed], plan: BatchPlan) -> Iterator[Batch]:
    """One batch of each shape, to compile a step with."""
    for group, shape in zip(groups, plan.shapes, strict=True):
        first = np.arange(min(plan.sequences_per_step, shape.sequences))
        yield _batch(_source(group), shape, plan, _own_of(plan, None), first)


def digest(groups: Sequence[Packed], plan: BatchPlan, *, seed: int) -> str:
    """A sha256 of everything that decides the batches of a run, their number aside.

    It covers the encoded rows as they are arranged (so the data, the tokenizer, the chat
    template, the limit on length and what happens beyond it), the batch size, the
    accumulation and the seed. Runs with the same digest see the same batches, for as
    many epochs as the shorter has. It doesn't depend on the machine, the locale, or where files
    lie.

    Args:
      groups: sequences from ``arrange_rows``.
      plan: from ``plan_batches`` on the same groups.
      seed: of the order.
    """
    found = hashlib.sha256()
    numbers = (BATCHES_VERSION, seed, plan.batch_size, plan.accumulate or 0)
    found.update(" ".join(map(str, numbers)).encode())
    for group in groups:
        for leaf in group:
            little_endian = np.ascontiguousarray(leaf, leaf.dtype.newbyteorder("<"))
            found.update(f";{leaf.dtype.name} {leaf.shape}:".encode())
            found.update(little_endian.tobytes())
    return found.hexdigest()


class _Source(NamedTuple):
    tokens: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    next_is_trained: np.ndarray


def _source(packed: Packed) -> _Source:
    return _Source(*packed[:3], next_is_trained(packed))


def _own_of(plan: BatchPlan, own: Sequence[int] | None) -> tuple[int, ...]:
    """Checked numbers of micro-batches."""
    count = plan.accumulate or 1
    numbers = range(count) if own is None else [int(number) for number in own]
    if plan.accumulate is None and own is not None:
        raise InputError(
            "a batch without an axis of micro-batches can't be shared: plan_batches(..., "
            "accumulate=...) with at least one for each process"
        )
    if not numbers or not all(0 <= number < count for number in numbers):
        raise InputError(
            f"own is {list(numbers)}: give this process's micro-batches by number, 0 to {count - 1}"
        )
    return tuple(numbers)


def _batch(
    source: _Source, shape: Shape, plan: BatchPlan, own: tuple[int, ...], chosen: np.ndarray
) -> Batch:
    size = plan.batch_size
    micro_batches = [
        _micro_batch(source, size, shape.predictions, chosen[number * size : (number + 1) * size])
        for number in own
    ]
    if plan.accumulate is None:
        return micro_batches[0]
    return Batch(*map(np.stack, zip(*micro_batches, strict=True)))


def _micro_batch(source: _Source, size: int, predictions: int, chosen: np.ndarray) -> Batch:
    tokens, positions, segment_ids, wanted = (_filled_up(leaf[chosen], size) for leaf in source)
    at = np.flatnonzero(wanted)
    targets = tokens.reshape(-1)[at + 1]
    return Batch(
        tokens,
        positions,
        segment_ids,
        _filled_up(at.astype(np.int32), predictions),
        _filled_up(targets, predictions),
        _filled_up(np.ones(len(at), np.float32), predictions),
    )


def _filled_up(leaf: np.ndarray, count: int) -> np.ndarray:
    """The leaf with zeros after it, ``count`` entries along the first axis."""
    return np.pad(leaf, ((0, count - len(leaf)), *[(0, 0)] * (leaf.ndim - 1)))
