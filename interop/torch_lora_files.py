"""Adapter files of the LoRA tutorials: A and B alone, under the names that each tutorial gives."""

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from interop import torch_io
from interop.torch_lora import lora_layers
from lora_jax.errors import InputError
from lora_jax.files import atomic_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class FileFormat(NamedTuple):
    """How a tutorial's adapter file names and turns A and B."""

    a: str
    """What follows the layer's name."""
    b: str
    in_first: bool
    """A is stored as (in, rank) and B as (rank, out), for x @ A @ B."""
    any_scaling: bool
    """Whether its readers are told alpha; else the file means a scaling of 1."""


FORMATS = {
    "lora_linear": FileFormat(".lora_A", ".lora_B", in_first=False, any_scaling=True),
    "lora_layer": FileFormat(".lora.lora_A", ".lora.lora_B", in_first=True, any_scaling=True),
    "minimind": FileFormat(".lora.A.weight", ".lora.B.weight", in_first=False, any_scaling=False),
}
"""``lora_linear``: parameters of a LoRALinear, and loralib's; ``lora_layer``: those of a LoRALayer
within it, input axis first; ``minimind``: two bias-free linears. None of them holds alpha."""


def save_adapter(
    model: "nn.Module",
    path: str | os.PathLike,
    format: str = "lora_linear",
    dtype: "torch.dtype | None" = None,
) -> None:
    """Write A and B of every adapted layer, and nothing else, with ``torch.save``.

    Args:
      model: adapted by `apply_lora`; merged or not.
      path: the file; one that exists is replaced.
      format: a key of `FORMATS`.
      dtype: of the file, such as ``torch.float16`` for MiniMind's; None for the factors' own.

    Raises:
      InputError: the format can't hold the scaling or the dtype a value; the file can't be
        written.
    """
    import torch

    factors = _stored(model, format)
    state = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in factors.items()}
    if broken := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise InputError(f"{path} would hold values that are not finite in {', '.join(broken)}")
    with atomic_file(path) as file:
        torch.save(state, file)


def load_adapter(model: "nn.Module", path: str | os.PathLike, format: str = "lora_linear") -> None:
    """Read what `save_adapter` wrote into a model that was adapted in the same way.

    Raises:
      InputError: naming every tensor that is missing, unexpected, of another shape or not
        finite; the file can't be read safely; a layer is merged. The model is then as it was.
    """
    import torch

    targets, loaded = _stored(model, format), torch_io.read(path)
    merged = [name for name, layer in lora_layers(model).items() if layer.merged]
    problems = [f"{name} is merged: unmerge first" for name in merged]
    if problems := [*problems, *_misfits(targets, loaded)]:
        raise InputError(f"{path} doesn't fit the model: {'; '.join(problems)}")
    for name, target in targets.items():
        target.copy_(torch.from_numpy(np.array(loaded[name], np.float64)))


def _stored(model: "nn.Module", format: str) -> "dict[str, Tensor]":
    """Every factor under its name in the file, as a view of the parameter turned as the file is."""
    if format not in FORMATS:
        raise InputError(f"no adapter format {format!r}: there are {', '.join(FORMATS)}")
    form, layers = FORMATS[format], lora_layers(model)
    scaled = [f"{n} has {layer.scaling}" for n, layer in layers.items() if layer.scaling != 1]
    if scaled and not form.any_scaling:
        raise InputError(
            f"{format} files mean a scaling of 1: {', '.join(scaled)}; adapt with alpha=None"
        )
    pairs = [
        (name + suffix, parameter.detach())
        for name, layer in layers.items()
        for suffix, parameter in ((form.a, layer.lora_A), (form.b, layer.lora_B))
    ]
    return {name: factor.T if form.in_first else factor for name, factor in pairs}


def _misfits(targets: "Mapping[str, Tensor]", loaded: Mapping[str, np.ndarray]) -> Iterator[str]:
    for name in sorted(targets.keys() | loaded.keys()):
        if name not in loaded:
            yield f"{name} is missing"
        elif name not in targets:
            yield f"{name} is unexpected"
        elif (found := loaded[name].shape) != (expected := tuple(targets[name].shape)):
            yield f"{name} has shape {found}, expected {expected}"
        elif not np.isfinite(loaded[name].astype(np.float64)).all():
            yield f"{name} is not finite"
