"""llama.cpp adapter files <-> adapters by torch module.

=======================  ===================================================================
torch                    in the file
=======================  ===================================================================
A (rank, in)             ``blk.{i}.attn_q.weight.lora_a``, as it is
B (out, rank)            ``blk.{i}.attn_q.weight.lora_b``; rows of q and k as in base files
A (rank, vocabulary)     ``token_embd.weight.lora_a``, transposed
B (features, rank)       ``token_embd.weight.lora_b``, as it is
scale                    ``adapter.lora.alpha`` / rank, one alpha for all; 1 where that is 0
=======================  ===================================================================

Source: convert_lora_to_gguf.py, src/llama-adapter.cpp and src/llama-graph.cpp of
https://github.com/ggml-org/llama.cpp
"""

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from interop.adapter_file import FileAdapter, ModuleAdapter, checked, raise_all
from interop.gguf_adapter_names import (
    Place,
    architecture_of,
    expected_shapes,
    own_place,
    places,
)
from interop.gguf_file import GgufFile, dequantised, open_gguf, require_dequantisable
from interop.halves import to_halves
from lora_jax.models.config import DecoderConfig

FORMAT = "gguf"
ARCHITECTURE, ALPHA = "general.architecture", "adapter.lora.alpha"
# What a file must say beside its architecture, and what it may say without effect.
IDENTITY = {"general.type": "adapter", "adapter.type": "lora"}
_WITHOUT_EFFECT = ("general.", "adapter.lora.task_name", "adapter.lora.prompt_prefix")
_PARTS = ("a", "b")
_SHOWN_AT_MOST = 80
_LARGEST = float(np.finfo(np.float32).max)

_ALPHA_OF_ZERO = f"{ALPHA} is 0 or absent: the scale is then 1"
_NORMS = "norms are trained too: llama.cpp itself doesn't read them, and keeps the base's"
_OWN_NAMES = "names and the order of rows are the file's own: a base's config gives torch's"


def read(path: str | os.PathLike, config: DecoderConfig) -> FileAdapter:
    """The adapter in a GGUF file, for a base of that config.

    Args:
      path: a file as llama.cpp's converter writes it, of any tensor type that the ``gguf``
        package dequantises.
      config: of the base, which says how tensors are named, how large they are, and how many
        rows of q and k make a head.

    Returns:
      The adapter, float32. Its modules are in the order of the model.

    Raises:
      InputError: no GGUF file or a damaged one, no LoRA adapter, one of another architecture, a
        value that isn't implemented; every tensor that is unknown, mis-shaped, without its
        partner or not finite.
    """
    file = open_gguf(path)
    _require_identity(file, {**IDENTITY, ARCHITECTURE: architecture_of(config).name})
    return _adapter(file, {place.tensor: place for place in places(config)})


def read_for_inspection(path: str | os.PathLike) -> FileAdapter:
    """The adapter in a GGUF file by the file's own names, of any architecture: to be looked at.

    Which modules of torch these are, and whose rows llama.cpp has in another order, only a base
    says. Neither changes a rank, a norm or a singular value.

    Raises:
      InputError: as `read` does, as far as the file alone shows it.
    """
    file = open_gguf(path)
    _require_identity(file, IDENTITY)
    axes = {tensor: len(file.tensors[[*parts.values()][-1]].shape)
            for tensor, parts in _pairs(file.tensors).items()}  # fmt: skip
    found = _adapter(file, {tensor: own_place(tensor, n) for tensor, n in axes.items()})
    return found._replace(notes=(*found.notes, _OWN_NAMES))


def _require_identity(file: GgufFile, identity: Mapping[str, str]) -> None:
    """Raise an InputError unless the metadata are of a LoRA adapter and all understood."""
    metadata = file.metadata
    problems = [
        f"{key} is {_shown(metadata.get(key))}, expected {value!r}"
        for key, value in identity.items()
        if not _is(metadata.get(key), value)
    ]
    alpha = metadata.get(ALPHA, 0.0)
    if not (type(alpha) is float and 0 <= alpha < math.inf):
        problems.append(f"{ALPHA} is {_shown(alpha)}, expected a finite float, 0 or more")
    problems += [
        f"{_shown(key)}={_shown(value)} is not implemented"
        for key, value in metadata.items()
        if key not in (*IDENTITY, ALPHA) and not key.startswith(_WITHOUT_EFFECT)
    ]
    raise_all(f"{file.path} can't be read as an adapter", problems)


def _is(value: Any, expected: str) -> bool:
    return isinstance(value, str) and value == expected


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_AT_MOST else f"{text[:_SHOWN_AT_MOST]}..."


def _adapter(file: GgufFile, known: Mapping[str, Place]) -> FileAdapter:
    pairs = _pairs(file.tensors)
    raise_all(f"{file.path} does not fit", _tensor_problems(file, pairs, known))
    require_dequantisable(file)
    found = [place for place in known.values() if place.tensor in pairs]
    alpha = _shortest(file.metadata.get(ALPHA, 0.0))
    norms = {f"{p.module}.weight": _values(file, p.tensor) for p in found if p.kind == "norm"}
    modules = {p.module: _module(file, p, alpha) for p in found if p.kind != "norm"}
    remarks = {_ALPHA_OF_ZERO: not alpha, _NORMS: bool(norms)}
    notes = tuple(note for note, holds in remarks.items() if holds)
    adapter = checked(FileAdapter(FORMAT, modules, norms, notes=notes), file.path)
    raise_all(f"{file.path} overflows float32", _overflows(modules))
    return adapter


def _pairs(tensors: Iterable[str]) -> dict[str, dict[str, str]]:
    """By tensor of the base, the tensors of the file by part: ``a`` and ``b``, or ``""``."""
    pairs = defaultdict(dict)
    for name in tensors:
        base, _, part = name.rpartition(".lora_")
        is_factor = base and part in _PARTS
        pairs[base if is_factor else name][part if is_factor else ""] = name
    return pairs


def _tensor_problems(
    file: GgufFile, pairs: Mapping[str, Mapping[str, str]], known: Mapping[str, Place]
) -> Iterator[str]:
    size = sum(tensor.nbytes for tensor in file.tensors.values())
    if size > len(file.data):
        yield f"tensors of {size} bytes in a file of {len(file.data)}: they overlap"
    for tensor, parts in pairs.items():
        place = known.get(tensor)
        wanted = ("",) if place and place.kind == "norm" else _PARTS
        if place is None:
            yield f"{tensor!r} is no tensor of the base that can be adapted"
        elif missing := [part for part in wanted if part not in parts]:
            yield f"{tensor!r} has no {', '.join(f'lora_{part}' for part in missing)}"
        elif len(parts) > len(wanted):
            yield f"{tensor!r} itself is in the file beside its factors"
        elif place.sizes:
            yield from _shape_problems(place, [file.tensors[parts[part]].shape for part in wanted])


def _shape_problems(place: Place, shapes: list[tuple[int, ...]]) -> Iterator[str]:
    """Where the shapes of A and B, or of a norm, are not those of the model."""
    expected = expected_shapes(place, shapes[-1][-1])
    if shapes != expected:
        yield f"{place.tensor!r} has {_joined(shapes)}, expected {_joined(expected)}"


def _joined(shapes: Iterable[tuple[int, ...]]) -> str:
    return " and ".join(map(str, shapes))


def _module(file: GgufFile, place: Place, alpha: float) -> ModuleAdapter:
    a, b = (_values(file, f"{place.tensor}.lora_{part}") for part in _PARTS)
    kind = "linear" if place.kind == "norm" else place.kind
    scale = alpha / b.shape[-1] if alpha else 1.0
    b = to_halves(b, place.head_dim) if place.head_dim else b
    return ModuleAdapter(a.T if kind == "embedding" else a, b, scale, kind)


def _overflows(modules: Mapping[str, ModuleAdapter]) -> Iterator[str]:
    for name, module in modules.items():
        if module.scale * float(np.abs(module.b).max()) > _LARGEST:
            yield f"B of {name!r} times its scale {module.scale}"


def _values(file: GgufFile, name: str) -> np.ndarray:
    return np.array(dequantised(file, name), np.float32)


def _shortest(value: float) -> float:
    """The shortest decimal with that float32 value: 0.8, and not 0.800000011920929."""
    return float(str(np.float32(value)))
