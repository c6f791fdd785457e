"""A mesh of devices with the axes data, fsdp and tensor."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from lora_jax.errors import InputError
from lora_jax.train.sharding_rules import DATA, FSDP, MESH_AXES, TENSOR


def make_mesh(
    *,
    data: int | None = None,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh of Auto axes ``data``, ``fsdp`` and ``tensor``; the last has the closest neighbours.

    Args:
      data: copies of the weights that see different rows; what the others leave if not given.
      fsdp: parts into which each weight is split, each of which sees different rows.
      tensor: parts into which each product is split.
      devices: all devices of all processes if not given.

    Raises:
      InputError: the sizes are not positive or do not multiply to the number of devices.

    >>> dict(make_mesh(devices=jax.devices()[:1]).shape)
    {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    devices = jax.devices() if devices is None else list(devices)
    rest = len(devices) // max(fsdp * tensor, 1)
    sizes = {DATA: rest if data is None else data, FSDP: fsdp, TENSOR: tensor}
    if min(sizes.values()) < 1 or math.prod(sizes.values()) != len(devices):
        given = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise InputError(
            f"mesh {given} does not fit {len(devices)} devices: give positive sizes that multiply "
            f"to {len(devices)}, or leave data out"
        )
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=kinds, devices=devices)


def require_auto_axes(mesh: Mesh) -> None:
    """Raise an InputError naming the axes of ``mesh`` that XLA may not use as it sees fit."""
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    others = [f"{name} is {kind.name}" for name, kind in kinds.items() if kind != AxisType.Auto]
    if others:
        raise InputError(
            f"the mesh's axis {', '.join(others)}, under which a product over a split axis is an "
            "error: use make_mesh, or axis_types=(AxisType.Auto, ...)"
        )
