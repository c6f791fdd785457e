"""Training an adapted torch model: mixed precision, accumulation, clipping, cosine schedules.

The loop reads a list of updates that is made beforehand, so that the right accumulation and that
of MiniMind's notebook, which differ in what an update holds, are two functions and one loop::

    updates = accumulated(batches, 4)
    recipe = Recipe(cosine_schedule(1e-4, steps=len(updates), warmup=10))
    records = train(model, updates, recipe)
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_jax.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Schedule = Callable[[int], float]
"""The learning rate by how many updates were before."""

PRECISIONS = ("float32", "bfloat16", "float16")


class Batch(NamedTuple):
    """A micro-batch."""

    inputs: "Tensor"
    """What the model is called with."""
    targets: "Tensor"
    """(...) int64: what each position should predict."""
    weights: "Tensor"
    """(...) float, 1 at positions that are trained and 0 elsewhere."""


class Update(NamedTuple):
    """What one step of the optimizer is made of."""

    batches: Sequence[Batch]
    shares: Sequence[float]
    """Of each batch's mean loss in the loss of the update."""
    count: int
    """What the schedule is asked for."""


class Record(NamedTuple):
    """What an update came to."""

    loss: float
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    skipped: bool
    """Whether a gradient overflowed in float16, and the update was left out."""


LossFn = Callable[["nn.Module", Batch], "Tensor"]
"""``loss_fn(model, batch)``: the mean over the batch's trained positions."""


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Args:
      schedule: learning rates, see `cosine_schedule` and `minimind_schedule`.
      clip_norm: largest global norm of the gradient; infinity for none.
      weight_decay: of AdamW.
      precision: of the products: ``float32``; ``bfloat16`` or ``float16`` under autocast.
        Parameters keep their dtype. float16 has a gradient scaler, which the others don't need.

    Raises:
      InputError: naming every value that is out of range.
    """

    schedule: Schedule
    clip_norm: float = 1.0
    weight_decay: float = 0.01
    precision: str = "float32"

    def __post_init__(self):
        problems = []
        if self.precision not in PRECISIONS:
            problems.append(f"no precision {self.precision!r}: there are {', '.join(PRECISIONS)}")
        if not self.clip_norm > 0:
            problems.append(f"clip_norm must be positive, got {self.clip_norm}")
        if not 0 <= self.weight_decay < math.inf:
            problems.append(f"weight_decay must be finite and not negative: {self.weight_decay}")
        if problems:
            raise InputError("Recipe: " + "; ".join(problems))


def cosine_schedule(peak: float, steps: int, warmup: int = 0) -> Schedule:
    """A linear warm-up from 0, then half a cosine down to 0 at update ``steps``.

    Source: `transformers.get_cosine_schedule_with_warmup`.

    >>> [round(cosine_schedule(1.0, 6, warmup=2)(i), 3) for i in range(7)]
    [0.0, 0.5, 1.0, 0.854, 0.5, 0.146, 0.0]
    """

    def rate(count: int) -> float:
        if count < warmup:
            return peak * count / warmup
        progress = (count - warmup) / max(steps - warmup, 1)
        return peak * 0.5 * (1 + math.cos(math.pi * progress))

    return rate


def minimind_schedule(peak: float, steps: int) -> Schedule:
    """MiniMind's cosine, from nearly 1.1 peaks to a tenth of it: its notebook counts from 1.

    >>> [f"{minimind_schedule(5e-4, 5)(i):.8f}" for i in range(5)]
    ['0.00050225', '0.00037725', '0.00022275', '0.00009775', '0.00005000']
    """
    return lambda count: peak / 10 + 0.5 * peak * (1 + math.cos(math.pi * (count + 1) / steps))


def shifted_twice(batch: Batch) -> Batch:
    """The batch as MiniMind's notebook trains it: position t on token t + 2.

    Its dataset shifts the targets, and its loop shifts them again. To compare with it, and for
    nothing else.

    >>> import torch
    >>> ids = torch.tensor([[5, 6, 7, 8]])
    >>> shifted_twice(Batch(ids[:, :-1], ids[:, 1:], torch.ones(1, 3))).targets.tolist()
    [[7, 8]]
    """
    return Batch(batch.inputs[..., :-1], batch.targets[..., 1:], batch.weights[..., 1:])


def accumulated(batches: Sequence[Batch], accumulate: int = 1) -> list[Update]:
    """Updates of ``accumulate`` batches each, in which every trained position weighs the same.

    The last update takes what is left.

    Raises:
      InputError: ``accumulate`` is below 1, or there are updates without a trained position.
    """
    _require_positive("accumulate", accumulate)
    cut = [batches[start : start + accumulate] for start in range(0, len(batches), accumulate)]
    tokens = [[batch.weights.sum().item() for batch in group] for group in cut]
    if empty := [str(count) for count, group in enumerate(tokens) if not sum(group)]:
        raise InputError(f"no position is trained in updates {', '.join(empty)}: leave them out")
    shares = [[count / sum(group) for count in group] for group in tokens]
    return [Update(*both, count) for count, both in enumerate(zip(cut, shares, strict=True))]


def accumulated_as_minimind(
    batches: Sequence[Batch], accumulate: int, batches_per_epoch: int
) -> list[Update]:
    """Updates as MiniMind's notebook makes them; the same as `accumulated` for single batches.

    Batches are counted from 1 within an epoch, and the optimizer steps after number n if n + 1 is
    a multiple of ``accumulate``: the first update lacks a batch, and the end of an epoch goes to
    the first update of the next one, or to none. Each batch has a share of 1/``accumulate``,
    however many positions it trains. The learning rate advances with every batch.

    Raises:
      InputError: a number is below 1.
    """
    _require_positive("accumulate", accumulate)
    _require_positive("batches_per_epoch", batches_per_epoch)
    numbers = [index % batches_per_epoch + 1 for index in range(len(batches))]
    last = [index for index, number in enumerate(numbers) if (number + 1) % accumulate == 0]
    first = [0, *(index + 1 for index in last)]
    groups = [(batches[a : b + 1], b) for a, b in zip(first, last, strict=False)]
    return [Update(group, [1 / accumulate] * len(group), index) for group, index in groups]


def mean_cross_entropy(model: "nn.Module", batch: Batch) -> "Tensor":
    """Cross-entropy of the model's logits (..., vocab), averaged over the trained positions."""
    from torch.nn import functional

    logits = model(batch.inputs).float()
    each = functional.cross_entropy(
        logits.flatten(0, -2), batch.targets.flatten(), reduction="none"
    )
    weights = batch.weights.flatten()
    # A batch without a trained position has a loss of 0, not of 0/0.
    return (each * weights).sum() / weights.sum().clamp(min=1)


def train(
    model: "nn.Module",
    updates: Sequence[Update],
    recipe: Recipe,
    *,
    loss_fn: LossFn = mean_cross_entropy,
    observe: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """Train whatever of the model requires gradients, with AdamW, in place.

    Args:
      model: after `interop.torch_lora.apply_lora`; it is left in training mode.
      updates: from `accumulated` or `accumulated_as_minimind`; batches are moved to the model's
        device.
      recipe: the rest.
      loss_fn: may add to the cross-entropy, such as the auxiliary loss of experts.
      observe: called after every update, to log or to save.

    Returns:
      A record for every update.

    Raises:
      RuntimeError: a gradient is not finite, in another precision than float16.
    """
    records = []
    for record in training(model, updates, recipe, loss_fn=loss_fn):
        records.append(record)
        observe(record)
    return records


def training(
    model: "nn.Module",
    updates: Sequence[Update],
    recipe: Recipe,
    *,
    loss_fn: LossFn = mean_cross_entropy,
) -> Iterator[Record]:
    """`train`, one update each time that the next record is asked for."""
    trainer = _Trainer.for_model(model.train(), recipe, loss_fn)
    for update in updates:
        yield _step(trainer, update)


class _Trainer(NamedTuple):
    model: Any
    trained: "list[nn.Parameter]"
    optimizer: "torch.optim.Optimizer"
    scaler: "torch.amp.GradScaler"
    recipe: Recipe
    loss_fn: LossFn

    @classmethod
    def for_model(cls, model: "nn.Module", recipe: Recipe, loss_fn: LossFn) -> "_Trainer":
        import torch

        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trained:
            raise InputError("the model has nothing to train: adapt it with apply_lora")
        optimizer = torch.optim.AdamW(trained, weight_decay=recipe.weight_decay)
        scaled = recipe.precision == "float16"
        scaler = torch.amp.GradScaler(trained[0].device.type, enabled=scaled)
        return cls(model, trained, optimizer, scaler, recipe, loss_fn)

    @property
    def device(self) -> "torch.device":
        return self.trained[0].device


def _step(trainer: _Trainer, update: Update) -> Record:
    """Gradients of every batch, summed; then unscaled, clipped and applied."""
    from torch.nn.utils import clip_grad_norm_

    _, trained, optimizer, scaler, recipe, _ = trainer
    rate = recipe.schedule(update.count)
    for group in optimizer.param_groups:
        group["lr"] = rate
    parts = zip(update.batches, update.shares, strict=True)
    loss = sum(_backward(trainer, *part) for part in parts)
    scaler.unscale_(optimizer)  # so that the clipping sees the gradients as they are
    strict = not scaler.is_enabled()
    norm = clip_grad_norm_(trained, recipe.clip_norm, error_if_nonfinite=strict)
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return Record(loss, norm.item(), rate, skipped=scaler.get_scale() < scale)


def _backward(trainer: _Trainer, batch: Batch, share: float) -> float:
    """Add the gradients of the batch's share of the loss, and return that share."""
    import torch

    precision, device = trainer.recipe.precision, trainer.device
    placed = batch._make(tensor.to(device) for tensor in batch)
    reduced = precision != "float32"
    dtype = getattr(torch, precision) if reduced else None
    with torch.autocast(device.type, dtype, enabled=reduced):
        loss = share * trainer.loss_fn(trainer.model, placed)
    trainer.scaler.scale(loss).backward()
    return loss.item()


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise InputError(f"{name} must be at least 1, got {value}")
