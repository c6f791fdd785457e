"""Where a step runs: on one device, on replicas (pmap), or on a mesh (jit over shardings).

The step is the same pure function each time. A batch is a list of micro-batches, a leading axis
on every leaf: each device (or group of devices that shares its rows) takes as many of them as
there are passes, and losses, tokens and gradients are summed over all of them before anything is
divided. So how many devices there are changes where the sums are made, not what they are.

>>> import jax, jax.numpy as jnp, optax
>>> from functools import partial
>>> from lora_jax.train.losses import LossSum
>>> from lora_jax.train.step import init_state, make_step
>>> def loss_fn(adapter, params, batch):
...     return LossSum(((adapter["w"] * params - batch) ** 2).sum(), jnp.float32(batch.size))
>>> tx = optax.sgd(0.1)
>>> here = on_one_device()
>>> step = here.compile_step(partial(make_step, tx=tx), loss_fn)
>>> state = here.put_state(init_state({"w": jnp.float32(0)}, tx))
>>> two_micro_batches = here.put_batch(jnp.ones((2, 3)))
>>> state, metrics = step(state, here.put_params(jnp.float32(1)), two_micro_batches)
>>> float(metrics.loss), float(metrics.tokens)
(1.0, 6.0)
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.sharding import (
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)

from lora_jax.train.losses import LossSum
from lora_jax.train.mesh import require_auto_axes
from lora_jax.train.micro_batches import Deal, LossFn, one_after_another, side_by_side
from lora_jax.train.sharding import Roles, adapter_specs, param_specs, state_specs
from lora_jax.train.sharding_rules import BATCH_AXES, Rule

REPLICAS = "replicas"
"""The name of the mapped axis under pmap."""

_PURE: dict[str, Any] = {"accumulate": True, "axis_name": None}
"""How a step is made that sums over a list of micro-batches and knows of no devices."""

Step = Callable[[Any, Any, Any], tuple[Any, Any]]
Put = Callable[[Any], Any]


class Placement(NamedTuple):
    """How the arguments of a step are laid out and how the step is compiled for that.

    Batches have a leading axis of micro-batches on every leaf, a multiple of ``shards``.
    """

    shards: int
    """Micro-batches that all devices together compute side by side."""
    own: Put
    """Of a batch that is the same in every process: the micro-batches of this process."""
    put_batch: Put
    """This process's micro-batches, as NumPy arrays, on the devices."""
    put_params: Put
    """The base on the devices; in every process the same arrays go in."""
    put_state: Put
    """The state on the devices; the step donates it, so keep no use for what went in."""
    compile_step: Callable[[Callable[..., Step], LossFn], Step]
    """``(make, loss_fn) -> step``; ``make(loss_fn, accumulate=True, axis_name=...)`` makes the
    pure step. The compiled one donates its state."""
    compile_loss: Callable[[LossFn], Callable[[Any, Any, Any], LossSum]]
    """``loss_fn -> eval_step(adapter, params, batch)``, summed over the batch."""
    fetch: Put
    """A placed tree as NumPy arrays, whole in every process, which must all call it."""


def on_one_device(device: Any = None) -> Placement:
    """One device, the default one if none is given; all micro-batches are its passes."""
    put = partial(jax.device_put, device=SingleDeviceSharding(device or jax.local_devices()[0]))
    return Placement(
        shards=1,
        own=lambda batch: batch,
        put_batch=put,
        put_params=put,
        put_state=put,
        compile_step=lambda make, loss_fn: jax.jit(make(loss_fn, **_PURE), donate_argnums=0),
        compile_loss=lambda loss_fn: jax.jit(one_after_another(loss_fn)),
        fetch=jax.device_get,
    )


def on_replicas(devices: Sequence[Any] | None = None) -> Placement:
    """pmap: every device holds the whole base and state, and computes its own micro-batches.

    Sums are made by psum, inside the step. The replicated arrays have no axis of devices: a state
    reads, saves and evaluates as on one device. A script with its own ``jax.pmap`` needs only
    ``make_step(..., axis_name=...)``.

    Args:
      devices: all devices of all processes if not given.
    """
    devices = jax.devices() if devices is None else list(devices)
    mesh = Mesh(np.array(devices), (REPLICAS,), axis_types=(AxisType.Auto,))
    rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((REPLICAS,), ()))
    mapped = partial(jax.pmap, axis_name=REPLICAS, in_axes=(None, None, 0), devices=devices)
    put = partial(_put, shardings=whole)

    def compile_step(make: Callable[..., Step], loss_fn: LossFn) -> Step:
        step = make(loss_fn, **_PURE | {"axis_name": REPLICAS})
        return mapped(step, out_axes=(None, None), donate_argnums=0)

    def compile_loss(loss_fn: LossFn) -> Callable[[Any, Any, Any], LossSum]:
        def summed(adapter: Any, params: Any, batch: Any) -> LossSum:
            return lax.psum(one_after_another(loss_fn)(adapter, params, batch), REPLICAS)

        return mapped(summed, out_axes=None)

    return Placement(
        **_dealt(Deal(rows, len(devices), axis=0)),
        put_params=put,
        put_state=put,
        compile_step=compile_step,
        compile_loss=compile_loss,
        fetch=partial(_fetch, whole=whole),
    )


def on_mesh(
    mesh: Mesh, params: Any, adapter: Any, plan: Mapping[str, Roles], rules: Sequence[Rule] = ()
) -> Placement:
    """jit over a mesh: rows over data and fsdp, the base over fsdp and tensor.

    The micro-batches of an update are computed side by side under vmap, one for each shard of the
    rows: nothing in one refers to another, and so indices into a micro-batch's tokens stay on
    their device. XLA adds the communication.

    Args:
      mesh: from `make_mesh`, or any mesh of Auto axes, some of them data, fsdp and tensor.
      params: the base, as arrays or shapes.
      adapter: the adapter, as arrays or shapes.
      plan: ``{path: site}``.
      rules: how leaves are split, before the defaults; see `leaf_shardings`.

    Raises:
      InputError: the mesh has other than Auto axes, or a rule doesn't fit.
    """
    require_auto_axes(mesh)
    base = param_specs(params, mesh.shape, rules)
    layout = _MeshLayout(mesh, adapter, adapter_specs(adapter, plan, base))
    loss_over_rows = partial(side_by_side, rows=layout.rows())

    def compile_loss(loss_fn: LossFn) -> LossFn:
        summed = one_after_another(loss_over_rows(loss_fn))
        return jax.jit(summed, out_shardings=layout.whole())

    return Placement(
        **_dealt(layout.deal()),
        put_params=lambda tree: _put(tree, layout.named(base)),
        put_state=lambda state: _put(state, layout.of_state(state)),
        compile_step=lambda make, loss_fn: layout.compiled(make(loss_over_rows(loss_fn), **_PURE)),
        compile_loss=compile_loss,
        fetch=partial(_fetch, whole=layout.whole()),
    )


class _MeshLayout(NamedTuple):
    mesh: Mesh
    adapter: Any
    factors: Any
    """Specs of the adapter."""

    def row_axes(self) -> tuple[str, ...]:
        return tuple(name for name in BATCH_AXES if name in self.mesh.shape)

    def rows(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(self.row_axes()))

    def whole(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def deal(self) -> Deal:
        shards = math.prod(self.mesh.shape[name] for name in self.row_axes())
        return Deal(NamedSharding(self.mesh, PartitionSpec(None, self.row_axes())), shards, axis=1)

    def named(self, specs: Any) -> Any:
        return jax.tree.map(partial(NamedSharding, self.mesh), specs)

    def of_state(self, state: Any) -> Any:
        return self.named(state_specs(state, self.adapter, self.factors))

    def compiled(self, step: Step) -> Step:
        def placed(state: Any, params: Any, batch: Any) -> tuple[Any, Any]:
            state, metrics = step(state, params, batch)
            state = lax.with_sharding_constraint(state, self.of_state(state))
            return state, lax.with_sharding_constraint(metrics, self.whole())

        return jax.jit(placed, donate_argnums=0)


def _dealt(deal: Deal) -> dict[str, Any]:
    return {"shards": deal.shards, "own": deal.own, "put_batch": deal.put}


def _put(tree: Any, shardings: Any) -> Any:
    """Arrays that are the same in every process under the given sharding or tree of them."""
    shared = isinstance(shardings, Sharding)
    each = jax.tree.map(lambda _: shardings, tree) if shared else shardings
    return jax.tree.map(_put_leaf, tree, each)


def _put_leaf(leaf: Any, sharding: Sharding) -> jax.Array:
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    return jax.make_array_from_process_local_data(sharding, np.asarray(leaf), np.shape(leaf))


def _fetch(tree: Any, *, whole: NamedSharding) -> Any:
    return jax.device_get(jax.jit(lambda same: same, out_shardings=whole)(tree))
