"""Tensor files <-> flat numpy dicts, safely: safetensors, sharded safetensors, torch pickles.

Reading safetensors maps the file into memory and copies nothing.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from lora_jax.errors import InputError
from lora_jax.files import atomic_file, existing_file, read_json, write_text

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

# In the order in which safetensors ranks them; its files hold the highest rank first.
_DTYPES: dict[str, Any] = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I16": np.int16,
    "U16": np.uint16,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I32": np.int32,
    "U32": np.uint32,
    "F32": np.float32,
    "F64": np.float64,
    "I64": np.int64,
    "U64": np.uint64,
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}

PICKLES = (".bin", ".pth", ".pt")

_OLDEST_SAFE_TORCH = (2, 10)


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
    path = existing_file(path)
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise InputError(f"{path}: can't read tensors from this; expected {', '.join(_READERS)}")
    return reader(path)


def metadata(path: str | os.PathLike) -> dict[str, str]:
    """The strings in the header of a safetensors file that `read` has accepted."""
    return _read_header(existing_file(path))[0].get("__metadata__", {})


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
    arrays = {name: np.asarray(array) for name, array in tensors.items()}
    arrays = {name: arrays[name] for name in sorted(arrays, key=lambda n: _file_order(n, arrays))}
    header = _header(arrays, dict(sorted((metadata or {"format": "pt"}).items())))
    with atomic_file(path) as file:
        file.write(header)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())


def write_pickle(path: str | os.PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a torch pickle of a plain dict of tensors, atomically; equal input, equal bytes.

    Raises:
      InputError: torch is missing, or a place that can't be written.
    """
    torch = _safe_torch(Path(path))
    state = {name: _to_torch(np.array(array, order="C")) for name, array in tensors.items()}
    with atomic_file(path) as file:
        torch.save(state, file)


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


def _read_safetensors(path: Path) -> Tensors:
    size = path.stat().st_size
    try:
        # The library checks header, offsets and coverage, so that the mapping below is safe.
        with safe_open(path, framework="np") as file:
            names = list(file.keys())
    except SafetensorError as error:
        raise InputError(f"{path} {_diagnosis(path, size)}: {error}") from error
    if not names:
        return {}
    entries, start = _read_header(path)
    mapped = np.memmap(path, mode="r")
    if unknown := [
        f"{n} is {entries[n]['dtype']}" for n in names if entries[n]["dtype"] not in _DTYPES
    ]:
        raise InputError(f"{path}: dtypes that NumPy doesn't have: {', '.join(unknown)}")
    return {name: _view(mapped, start, **entries[name]) for name in names}


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header's entries, and where the tensor data starts."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(min(length, path.stat().st_size))), 8 + length


def _view(
    mapped: np.ndarray, start: int, dtype: str, shape: list[int], data_offsets: list[int]
) -> np.ndarray:
    begin, end = data_offsets
    return mapped[start + begin : start + end].view(_DTYPES[dtype]).reshape(shape)


def _diagnosis(path: Path, size: int) -> str:
    """What is wrong with the size of a safetensors file, as far as its header can be read."""
    try:
        entries, start = _read_header(path)
        expected = start + max(e["data_offsets"][1] for n, e in entries.items() if n[0] != "_")
    except (ValueError, LookupError, TypeError, AttributeError, MemoryError, OverflowError):
        return f"is not a safetensors file or is cut short ({size} bytes)"
    if size < expected:
        return f"is cut short: {size} bytes, its header asks for {expected}"
    return f"is corrupt ({size} bytes, its header asks for {expected})"


def _read_pickle(path: Path) -> Tensors:
    torch = _safe_torch(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch raises for a damaged or refused file has no common base
        reason = str(error).strip().partition("\n")[0]
        size = path.stat().st_size
        raise InputError(
            f"{path} ({size} bytes) holds no tensors that can be read safely: {reason}"
        ) from error
    if not isinstance(loaded, dict):
        raise InputError(f"{path} holds {type(loaded).__name__}, expected a dict of tensors")
    if others := sorted(str(n) for n, t in loaded.items() if not isinstance(t, torch.Tensor)):
        raise InputError(f"{path}: not tensors: {', '.join(others)}")
    return {name: _to_numpy(tensor) for name, tensor in loaded.items()}


def _safe_torch(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        remedy = "install lora-jax[torch], or convert the file to .safetensors"
        raise InputError(f"{path} is a torch file and torch is missing: {remedy}") from error
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < _OLDEST_SAFE_TORCH:
        oldest = ".".join(map(str, _OLDEST_SAFE_TORCH))
        raise InputError(
            f"{path}: torch {torch.__version__} doesn't read pickles safely: install torch "
            f">= {oldest}, or convert the file to .safetensors"
        )
    return torch


def _to_numpy(tensor: Any) -> np.ndarray:
    """A torch tensor as numpy; bfloat16, which torch can't hand over, goes through its bits."""
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _to_torch(array: np.ndarray) -> Any:
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


_READERS: dict[str, Callable[[Path], Tensors]] = {
    ".safetensors": _read_safetensors,
    **dict.fromkeys(PICKLES, _read_pickle),
}


def _read_shards(index: Path) -> Tensors:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(f"{index} has no weight_map")
    names = sorted(set(weight_map.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise InputError(f"{index}: shards outside its directory: {', '.join(outside)}")
    if absent := [name for name in names if not (index.parent / name).is_file()]:
        raise InputError(f"{index}: missing shards: {', '.join(absent)}")
    shards = {name: read(index.parent / name) for name in names}
    found = {(tensor, name) for name, shard in shards.items() for tensor in shard}
    if disagreement := sorted(found ^ set(weight_map.items())):
        where = ", ".join(f"{tensor} in {name}" for tensor, name in disagreement)
        raise InputError(f"{index} and its shards disagree about {where}")
    return {tensor: array for shard in shards.values() for tensor, array in shard.items()}


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


def _file_order(name: str, arrays: Tensors) -> tuple[int, str]:
    """Highest rank first, so wide dtypes come first and every tensor is aligned."""
    if (dtype := arrays[name].dtype.newbyteorder("=")) not in _NAMES:
        raise InputError(f"{name} is {dtype}, which safetensors doesn't have; cast it first")
    return -list(_NAMES).index(dtype), name


def _header(arrays: Tensors, metadata: dict[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        dtype = _NAMES[array.dtype.newbyteorder("=")]
        entries[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": (begin, end)}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
