"""The same training in JAX and in torch, update by update: loss, gradient norm, parameters.

A run is an iterator over what it has come to after each update. One of ours goes beside any number
in torch, on the same batches in the same order::

    start = our_tensors(adapter, plan, params, keymap)
    load(torch_model, start)
    ours = jax_run(jax_loss, params, adapter, plan, batches, recipe, keymap=keymap)
    theirs = {"PEFT + AdamW": adamw_run(torch_model, torch_loss, batches, recipe)}
    found = compare_runs(ours, theirs, start)

Adam divides a gradient by its own size: an entry whose gradient is as small as its rounding error
may go either way, by up to the learning rate. It shows most in a B that has just left zero, whose
norm is no larger than a few updates.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from interop import trained_tensors
from interop.differences import Difference, differences, furthest
from interop.keymaps import Keymap
from interop.torch_training import Recipe, Update, training
from lora_jax.adapter import Adapter
from lora_jax.errors import InputError
from lora_jax.site import Plan
from lora_jax.train.gradients import LossFn
from lora_jax.train.optim import adamw
from lora_jax.train.step import init_state, make_step

if TYPE_CHECKING:
    from torch import Tensor, nn

Arrays = dict[str, np.ndarray]
TorchLoss = Callable[[Any, Any], "Tensor"]
"""``torch_loss(module, batch)``: the mean over the batch's trained positions."""


class Snapshot(NamedTuple):
    """A run after an update."""

    loss: float
    """Of this update's batch, before it."""
    grad_norm: float
    """Before clipping."""
    tensors: Arrays
    """What trains, by its name in a PEFT file."""


Run = Iterator[Snapshot]


@dataclass(frozen=True)
class UpdateDifference:
    """One update on both sides.

    Attributes:
      loss: ours.
      their_loss: torch's.
      grad_norm: ours, before clipping.
      their_grad_norm: torch's.
      parameters: the trained tensor that is relatively furthest apart after the update.
    """

    loss: float
    their_loss: float
    grad_norm: float
    their_grad_norm: float
    parameters: Difference

    @property
    def loss_gap(self) -> float:
        """|ours - torch's|."""
        return abs(self.loss - self.their_loss)

    @property
    def grad_norm_gap(self) -> float:
        """|ours - torch's| / torch's."""
        return abs(self.grad_norm - self.their_grad_norm) / max(self.their_grad_norm, 1e-30)

    @property
    def parameter_gap(self) -> float:
        """‖ours - torch's‖ / ‖torch's‖ of the furthest tensor."""
        return self.parameters.relative


@dataclass(frozen=True)
class TrainingComparison:
    """One run of ours beside one in torch.

    Attributes:
      updates: each of them.
      final: every trained tensor after the last.
      moved: ‖last - first‖ / ‖last‖ over all trained tensors of ours: two runs that both do
        nothing would agree.
    """

    updates: tuple[UpdateDifference, ...]
    final: tuple[Difference, ...]
    moved: float

    @property
    def loss_gap(self) -> float:
        """The largest of any update; not a number if one is."""
        return float(np.max([update.loss_gap for update in self.updates]))

    @property
    def parameter_gap(self) -> float:
        """Of the furthest tensor after the last update."""
        return furthest(self.final).relative


def compare_runs(
    ours: Run, theirs: Mapping[str, Run], start: Arrays
) -> dict[str, TrainingComparison]:
    """Run all side by side, one update of each at a time.

    Args:
      ours: from `jax_run`.
      theirs: runs in torch by name, of as many updates.
      start: what all have started from, by its name in a PEFT file.

    Raises:
      InputError: there is no update, or the runs train different tensors.
    """
    updates: dict[str, list[UpdateDifference]] = {name: [] for name in theirs}
    last: dict[str, tuple[Difference, ...]] = {}
    here = None
    for here, *there in zip(ours, *theirs.values(), strict=True):
        for name, other in zip(theirs, there, strict=True):
            last[name] = differences(here.tensors, other.tensors)
            numbers = here.loss, other.loss, here.grad_norm, other.grad_norm
            updates[name].append(UpdateDifference(*numbers, furthest(last[name])))
    if here is None:
        raise InputError("there is no update to compare: give at least one batch")
    moved = _moved(start, here.tensors)
    return {n: TrainingComparison(tuple(updates[n]), last[n], moved) for n in theirs}


def jax_run(
    loss_fn: LossFn,
    params: Any,
    adapter: Adapter,
    plan: Plan,
    batches: Sequence[Any],
    recipe: Recipe,
    *,
    keymap: Keymap,
) -> Run:
    """Train with `lora_jax.train`: AdamW of its optim, one compiled step.

    Args:
      loss_fn: ``loss_fn(adapter, params, batch) -> LossSum``.
      params: the base.
      adapter: where it starts; it is not changed.
      plan: of the adapter.
      batches: one an update, all of one shape or few.
      recipe: in float32.
      keymap: which torch module holds which leaf.

    Raises:
      InputError: the recipe is in another precision; a leaf that the keymap has no module for.
    """
    if recipe.precision != "float32":
        raise InputError(f"the comparison is in float32, the recipe in {recipe.precision}")
    rates = jnp.array([recipe.schedule(count) for count in range(len(batches))], jnp.float32)
    decay, clip = recipe.weight_decay, recipe.clip_norm
    tx = adamw(lambda count: rates[count], weight_decay=decay, clip_norm=clip)
    step = jax.jit(make_step(loss_fn, tx))
    state = init_state(jax.tree.map(jnp.asarray, adapter), tx)
    for batch in batches:
        with jax.default_matmul_precision("highest"):
            state, metrics = step(state, params, batch)
        tensors = trained_tensors.our_tensors(state.adapter, plan, params, keymap)
        yield Snapshot(float(metrics.loss), float(metrics.grad_norm), tensors)


def adamw_run(
    module: "nn.Module", loss_fn: TorchLoss, batches: Sequence[Any], recipe: Recipe
) -> Run:
    """Train any torch module as its users write it: backward, clip, ``torch.optim.AdamW``.

    Args:
      module: a PEFT model, or any other; whatever requires a gradient is trained in place. It is
        put in eval mode, so that nothing is dropped.
      loss_fn: of the module and a batch whose arrays are tensors.
      batches: the same as ours.
      recipe: its precision is not looked at.
    """
    import torch
    from torch.nn.utils import clip_grad_norm_

    trained = [p for p in module.eval().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=recipe.weight_decay)
    for count, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = recipe.schedule(count)
        optimizer.zero_grad()
        loss = loss_fn(module, as_tensors(batch))
        loss.backward()
        norm = clip_grad_norm_(trained, recipe.clip_norm)
        optimizer.step()
        yield Snapshot(loss.item(), norm.item(), trained_tensors.values(module))


def torch_lora_run(
    module: "nn.Module", loss_fn: TorchLoss, batches: Sequence[Any], recipe: Recipe
) -> Run:
    """Train with the loop of `interop.torch_training`, one batch an update.

    Args:
      module: after `interop.torch_lora.apply_lora` without dropout; trained in place.
      loss_fn, batches, recipe: as for `adamw_run`. Batches are NamedTuples.
    """
    updates = [Update([as_tensors(batch)], [1.0], count) for count, batch in enumerate(batches)]
    for record in training(module, updates, recipe, loss_fn=loss_fn):
        yield Snapshot(record.loss, record.grad_norm, trained_tensors.values(module))


def as_tensors(batch: Any) -> Any:
    """The same tree with torch tensors in the place of its arrays, integers as int64.

    >>> as_tensors({"x": np.ones(2, np.int32)})
    {'x': tensor([1, 1])}
    """
    import torch

    def tensor(array: Any) -> "Tensor":
        found = torch.from_numpy(np.array(array))
        return found if found.is_floating_point() else found.long()

    return jax.tree.map(tensor, batch)


def _moved(start: Arrays, end: Arrays) -> float:
    square = sum(float(np.sum((end[name] - start[name]) ** 2)) for name in end)
    return (square / max(sum(float(np.sum(array**2)) for array in end.values()), 1e-30)) ** 0.5
