"""Tensor files <-> flat numpy dicts, safely: safetensors, sharded safetensors, torch pickles.

Reading safetensors maps the file into memory and copies nothing. Names of tensors are names only:
none becomes a path. Every file is taken for hostile: what it says of itself is checked against
its size before anything is made of it.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from interop import safetensors_file, torch_pickle
from lora_jax.errors import InputError, raise_listed
from lora_jax.files import existing_file, write_text
from lora_jax.manifest import read_small_json

Tensors = dict[str, np.ndarray]

SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
# What `read_directory` looks for, best first.
_WEIGHT_FILES = (
    SAFETENSORS,
    SAFETENSORS_INDEX,
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
PICKLES = (".bin", ".pth", ".pt")
_READERS: dict[str, Callable[[Path], tuple[Tensors, dict[str, str]]]] = {
    ".safetensors": safetensors_file.read_tensors,
    **dict.fromkeys(PICKLES, lambda path: (torch_pickle.read_tensors(path), {})),
}
_MAX_INDEX_BYTES = safetensors_file.MAX_HEADER_BYTES
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


def read(path: str | os.PathLike) -> Tensors:
    """The tensors of one file, by name; the suffix says how it is read.

    Args:
      path: a ``.safetensors`` file, or a torch pickle (``.bin``, ``.pth``, ``.pt``), which is
        read with ``weights_only=True`` and never otherwise.

    Returns:
      Arrays in the dtypes of the file (bfloat16 as ``ml_dtypes.bfloat16``). Those of a
      safetensors file are read-only views of the mapped file: copy what has to outlive it.

    Raises:
      InputError: the file isn't there, is cut short or corrupt, or has another suffix.
    """
    return read_all(path)[0]


def read_all(path: str | os.PathLike) -> tuple[Tensors, dict[str, str]]:
    """The tensors of one file as `read` gives them, and the strings beside them.

    Returns:
      The tensors by name; what a safetensors file has in its header beside them, which torch
      pickles don't have.

    Raises:
      InputError: as `read`.
    """
    path = existing_file(path)
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise InputError(f"{path}: can't read tensors from this; expected {', '.join(_READERS)}")
    return reader(path)


def read_directory(directory: str | os.PathLike) -> Tensors:
    """The tensors of a model directory, from one file or from the shards its index names.

    Raises:
      InputError: there are no weights, a shard is missing, or the shards and the index
        disagree about which tensor is where.
    """
    directory = Path(directory)
    for name in _WEIGHT_FILES:
        if (directory / name).is_file():
            whole = not name.endswith(".index.json")
            return read(directory / name) if whole else _read_shards(directory / name)
    raise InputError(f"{directory} holds no weights: expected one of {', '.join(_WEIGHT_FILES)}")


def write(
    path: str | os.PathLike,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file, atomically.

    Strided and big-endian arrays are written by value, one at a time, and the file's mode
    follows the umask. For contiguous input the bytes are those of ``safetensors.numpy.save``
    up to the order of ``metadata``, which is sorted here so that equal input gives equal files.

    Args:
      path: the file; one that exists is replaced.
      tensors: arrays by name.
      metadata: strings for the header, ``{"format": "pt"}`` by default, which Hugging Face
        readers ask for.

    Raises:
      InputError: a dtype that the format doesn't have, or a place that can't be written.

    References:
      https://github.com/huggingface/safetensors#format
    """
    safetensors_file.write_tensors(Path(path), tensors, metadata or {"format": "pt"})


def write_pickle(path: str | os.PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a torch pickle of a plain dict of tensors, atomically; equal input, equal bytes.

    Raises:
      InputError: torch is missing, or a place that can't be written.
    """
    torch_pickle.write_tensors(Path(path), tensors)


def write_directory(
    directory: str | os.PathLike,
    tensors: Mapping[str, np.ndarray],
    *,
    max_shard_bytes: int | None = None,
) -> None:
    """Write ``model.safetensors``, or shards of at most ``max_shard_bytes`` and their index.

    A tensor larger than the limit gets a shard of its own. The index is written last.
    """
    directory = Path(directory)
    shards = _shards(tensors, max_shard_bytes)
    if len(shards) == 1:
        return write(directory / SAFETENSORS, tensors)
    names = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        write(directory / name, {tensor: tensors[tensor] for tensor in shard})
    index = {
        "metadata": {"total_size": sum(array.nbytes for array in tensors.values())},
        "weight_map": {t: name for name, shard in zip(names, shards, strict=True) for t in shard},
    }
    write_text(directory / SAFETENSORS_INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")


def _read_shards(index: Path) -> Tensors:
    weight_map = read_small_json(index, max_bytes=_MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not all(map(_is_text, weight_map.values())):
        raise InputError(f"{index} has no weight_map of names")
    names = sorted(set(weight_map.values()))
    raise_listed(
        f"{index}: shards outside its directory", (n for n in names if not _SHARD_NAME.fullmatch(n))
    )
    present = set(os.listdir(index.parent))
    raise_listed(f"{index}: missing shards", (n for n in names if n not in present))
    paths = {name: index.parent / name for name in names}
    roots = _shard_roots(index.parent)
    raise_listed(
        f"{index}: shards that are links out of its directory",
        (n for n, path in paths.items() if not any(map(path.resolve().is_relative_to, roots))),
    )
    shards = {name: read(path) for name, path in paths.items()}
    found = {(tensor, name) for name, shard in shards.items() for tensor in shard}
    raise_listed(
        f"{index} and its shards disagree about",
        (f"{tensor} in {name}" for tensor, name in sorted(found ^ set(weight_map.items()))),
    )
    return {tensor: array for shard in shards.values() for tensor, array in shard.items()}


def _shard_roots(directory: Path) -> list[Path]:
    """Where shards may lie: here, and, for a snapshot in the hub's cache, in the cache's blobs."""
    directory = directory.resolve()
    snapshot = directory.parent.name == "snapshots"
    return [directory, *([directory.parent.parent / "blobs"] if snapshot else [])]


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _shards(tensors: Mapping[str, np.ndarray], max_bytes: int | None) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, array in tensors.items():
        if max_bytes is not None and shards[-1] and filled + array.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += array.nbytes
    return shards
