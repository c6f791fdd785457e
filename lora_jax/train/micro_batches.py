"""Micro-batches: dealt to the devices that compute them side by side, and their losses summed."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.errors import InputError
from lora_jax.train.gradients import LossFn
from lora_jax.train.losses import LossSum


class Deal(NamedTuple):
    """How a list of micro-batches is dealt to the shards of the rows."""

    sharding: NamedSharding
    """Of leaves (passes, shards, ...), or (shards, passes, ...)."""
    shards: int
    """Micro-batches that are computed side by side."""
    axis: int
    """Which of the two leading axes is that of the shards."""

    def own_shards(self) -> np.ndarray:
        """Which shards the devices of this process compute."""
        shape = (self.shards, 1) if self.axis == 0 else (1, self.shards)
        places = self.sharding.addressable_devices_indices_map(shape).values()
        held = (np.arange(self.shards)[place[self.axis]] for place in places if place)
        return np.unique(np.concatenate([*held]))

    def own(self, batch: Any) -> Any:
        """This process's part of a batch that is the same in every process.

        Args:
          batch: leaves (passes * shards, ...).
        """
        require_multiple(batch, self.shards)
        mine = self.own_shards()

        def cut(leaf: Any) -> np.ndarray:
            passes = np.reshape(leaf, (-1, self.shards, *np.shape(leaf)[1:]))
            return passes[:, mine].reshape(-1, *np.shape(leaf)[1:])

        return jax.tree.map(cut, batch)

    def put(self, batch: Any) -> Any:
        """This process's part as part of global arrays.

        Args:
          batch: leaves (passes * own shards, ...).
        """
        own = len(self.own_shards())
        require_multiple(batch, own)

        def put(leaf: Any) -> jax.Array:
            passes = np.reshape(leaf, (-1, own, *np.shape(leaf)[1:]))
            dealt = np.moveaxis(passes, 1, self.axis)
            shape = (*dealt.shape[: self.axis], self.shards, *dealt.shape[self.axis + 1 :])
            return jax.make_array_from_process_local_data(self.sharding, dealt, shape)

        return jax.tree.map(put, batch)


def require_multiple(batch: Any, shards: int) -> None:
    """Raise an InputError unless all leaves have one multiple of ``shards`` micro-batches."""
    counts = {(*np.shape(leaf), 0)[0] for leaf in jax.tree.leaves(batch)}
    if len(counts) != 1 or 0 in counts or any(count % shards for count in counts):
        found = " and ".join(map(str, sorted(counts)))
        raise InputError(
            f"the batch's leaves have {found} micro-batches along their first axis, expected one "
            f"multiple of {shards}: plan_batches(..., accumulate={shards})"
        )


def one_after_another(loss_fn: LossFn) -> LossFn:
    """The loss of a list of micro-batches, one at a time."""

    def summed(adapter: Any, params: Any, batches: Any) -> LossSum:
        return _sum(lax.map(partial(loss_fn, adapter, params), batches))

    return summed


def side_by_side(loss_fn: LossFn, rows: NamedSharding) -> LossFn:
    """The loss of a list of micro-batches, each on its own shard of the rows.

    Each has its own copy of the adapter, as under pmap. That ties every product with the adapter,
    and so the base's product that it is added to, to the devices that hold the rows. Without it
    XLA may split a scanned residual stream by features over fsdp, and then it moves activations
    where it should gather weights.

    Args:
      loss_fn: of one micro-batch.
      rows: what splits the leading axis of the list.
    """
    [axes] = rows.spec

    def copies(factor: jax.Array, count: int) -> jax.Array:
        spec = PartitionSpec(axes, *[PartitionSpec.UNCONSTRAINED] * factor.ndim)
        each = jnp.broadcast_to(factor, (count, *factor.shape))
        return lax.with_sharding_constraint(each, NamedSharding(rows.mesh, spec))

    def summed(adapter: Any, params: Any, batches: Any) -> LossSum:
        count = jax.tree.leaves(batches)[0].shape[0]
        adapters = jax.tree.map(partial(copies, count=count), adapter)
        each = jax.vmap(loss_fn, in_axes=(0, None, 0), spmd_axis_name=axes or None)
        return _sum(each(adapters, params, batches))

    return summed


def _sum(losses: LossSum) -> LossSum:
    return jax.tree.map(partial(jnp.sum, axis=0), losses)
