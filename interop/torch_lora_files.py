"""Adapter files of the LoRA tutorials: A and B alone, under the names that each tutorial gives."""

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from interop import torch_io
from interop.lora_pth import LAYOUTS
from interop.torch_lora import lora_layers
from lora_jax.errors import InputError
from lora_jax.files import atomic_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def save_adapter(
    model: "nn.Module",
    path: str | os.PathLike,
    format: str = "loralib",
    dtype: "torch.dtype | None" = None,
) -> None:
    """Write A and B of every adapted layer, and nothing else, with ``torch.save``.

    Args:
      model: adapted by `apply_lora`; merged or not.
      path: the file; one that exists is replaced.
      format: a key of `lora_pth.LAYOUTS`.
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


def load_adapter(model: "nn.Module", path: str | os.PathLike, format: str = "loralib") -> None:
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
    if format not in LAYOUTS:
        raise InputError(f"no adapter format {format!r}: there are {', '.join(LAYOUTS)}")
    form, layers = LAYOUTS[format], lora_layers(model)
    scaled = [f"{n} has {layer.scaling}" for n, layer in layers.items() if layer.scaling != 1]
    if scaled and not form.any_scale:
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
