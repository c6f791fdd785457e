"""Adapters by torch module -> llama.cpp adapter files.

The runtime's only scale is alpha / rank, of one alpha for all. Where the scales of an adapter
come from one alpha they are kept; else alpha is the largest rank and B takes up the rest::

    B' = B · scale · rank / alpha
"""

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np

from interop.adapter_file import FileAdapter, ModuleAdapter, checked, raise_all
from interop.gguf_adapter import ALPHA, ARCHITECTURE, IDENTITY
from interop.gguf_adapter_names import Place, architecture_of, modules_of_tables, places
from interop.gguf_writing import write_gguf
from interop.halves import to_neighbours
from lora_jax.models.config import DecoderConfig

Dtype = Literal["float32", "float16"]


def write(
    path: str | os.PathLike,
    adapter: FileAdapter,
    config: DecoderConfig,
    *,
    dtype: Dtype = "float32",
) -> tuple[str, ...]:
    """Write an adapter as a GGUF file that llama.cpp loads for a base of that config.

    Equal input gives equal bytes, in whatever order the modules come; one of rank 0 is left out.

    Args:
      path: the file; one that exists is replaced, and it appears whole or not at all.
      adapter: pairs of linear layers, and of the embedding table if the head has its own.
      config: of the base, of a family in `interop.gguf_adapter_names.ARCHITECTURES`.
      dtype: of A and B. With ``float16`` the file is half as large, and llama.cpp rounds the
        layers' inputs to float16 as well.

    Returns:
      What was multiplied into B, a sentence for each factor.

    Raises:
      InputError: everything that the format or llama.cpp can't hold, by name; the adapter
        doesn't fit the base; the file can't be written.
    """
    known = {place.module: place for place in places(config) if place.kind != "norm"}
    modules = {name: module for name, module in adapter.modules.items() if module.rank}
    raise_all("a GGUF file can't hold the adapter", _problems(adapter, modules, config))
    raise_all("the adapter does not fit the model", _misfits(modules, known))
    checked(adapter._replace(modules=modules), "the adapter")
    alpha, factors = _alpha_and_factors(modules)
    tensors = {
        f"{place.tensor}.lora_{part}": array
        for name, place in known.items()
        if name in modules
        for part, array in _factors(modules[name], factors[name], place, dtype).items()
    }
    raise_all(f"values overflow {dtype}", _overflowing(tensors))
    metadata = {ARCHITECTURE: architecture_of(config).name, **IDENTITY, ALPHA: alpha}
    write_gguf(path, metadata, tensors)
    return tuple(_notes(factors))


def _alpha_and_factors(modules: Mapping[str, ModuleAdapter]) -> tuple[float, dict[str, float]]:
    """The alpha to write, and by what B of each module is to be multiplied."""
    with np.errstate(over="ignore"):
        found = {float(np.float32(module.scale * module.rank)) for module in modules.values()}
    alpha = found.pop()
    if not found and 0 < alpha < np.inf:  # llama.cpp computes alpha / rank in float32 as well
        return alpha, dict.fromkeys(modules, 1.0)
    alpha = float(max(module.rank for module in modules.values()))
    return alpha, {name: m.scale * m.rank / alpha for name, m in modules.items()}


def _factors(
    module: ModuleAdapter, factor: float, place: Place, dtype: Dtype
) -> dict[str, np.ndarray]:
    """A and B as the file has them."""
    a, b = module.a, module.b
    b = b if factor == 1 else b.astype(np.float64) * factor  # rounded once, at the end
    b = to_neighbours(b, place.head_dim) if place.head_dim else b
    with np.errstate(over="ignore"):
        return {
            "a": (a.T if place.kind == "embedding" else a).astype(dtype),
            "b": b.astype(dtype),
        }


def _overflowing(tensors: Mapping[str, np.ndarray]) -> Iterator[str]:
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            yield repr(name)


def _notes(factors: Mapping[str, float]) -> Iterator[str]:
    by_factor = defaultdict(list)
    for name, factor in factors.items():
        by_factor[factor].append(name)
    for factor, names in sorted(by_factor.items()):
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        if factor != 1:
            yield f"{names[0]!r}{more}: {factor:g} multiplied into B"


def _problems(
    adapter: FileAdapter, modules: Mapping[str, ModuleAdapter], config: DecoderConfig
) -> Iterator[str]:
    """What the format, or the runtime, has no place for."""
    if not modules:
        yield "it has no low-rank pair"
    for name in adapter.whole:
        yield f"{name!r} is trained whole, and llama.cpp reads pairs alone"
    for name in adapter.rows:
        yield f"rows of {name!r} are trained, and llama.cpp reads pairs alone"
    for name, module in modules.items():
        if module.magnitude is not None:
            yield f"{name!r} has a DoRA magnitude: merge the adapter into the base"
        if module.bias is not None:
            yield f"{name!r} has a bias on B: merge the adapter into the base"
    for name in sorted(modules.keys() & modules_of_tables(config)):
        yield (
            f"{name!r} is of the table that embedding and head share, and llama.cpp fails to "
            "apply one pair to both: merge the adapter, or untie the base"
        )


def _misfits(modules: Mapping[str, ModuleAdapter], known: Mapping[str, Place]) -> Iterator[str]:
    for name, module in modules.items():
        place = known.get(name)
        if place is None:
            yield f"{name!r} is no linear layer or embedding of the model"
        elif module.kind != place.kind:
            yield f"{name!r} is {module.kind} in the adapter and {place.kind} in the model"
        elif place.sizes != (sizes := (*module.a.shape[1:], module.b.shape[0])):
            yield f"{name!r} has inputs and outputs {sizes}, the model has {place.sizes}"
