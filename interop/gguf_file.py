"""The GGUF container: its metadata and where each tensor lies, read in one pass.

A reader of our own, because it takes a tenth of the second or two that the ``gguf`` package
needs for a vocabulary, never trusts a length in the file, and can say how much is missing.
"""

import math
import mmap
import os
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGMLQuantizationType,
    GGUFValueType,
)
from gguf.quants import dequantize

from lora_jax.errors import InputError
from lora_jax.files import existing_file

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_AXES = 4
_MAX_NAME = 63
_MAX_ENTRIES = 50_000  # the largest models have some 2,000
_NAMED_AT_MOST = 8


class GgufTensor(NamedTuple):
    """Where a tensor lies: ``shape`` in NumPy's order, ``offset`` and ``nbytes`` in the file."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    nbytes: int


class GgufFile(NamedTuple):
    """A parsed GGUF file; ``data`` maps all of it, read-only."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    data: np.ndarray

    def rows(self, name: str) -> np.ndarray:
        """The tensor's bytes, one row per row of the tensor: uint8 (..., bytes per row)."""
        tensor = self.tensors[name]
        raw = self.data[tensor.offset : tensor.offset + tensor.nbytes]
        return raw.reshape(*tensor.shape[:-1], -1)


def open_gguf(path: str | os.PathLike) -> GgufFile:
    """Parse the header of a GGUF file (version 2 or 3, little-endian) and map its tensors.

    Returns:
      The file. Metadata values are Python scalars, strings, lists of strings, and NumPy arrays
      of numbers.

    Raises:
      InputError: not a GGUF file, or one that is cut short, with expected and actual size.

    References:
      https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    path = existing_file(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        if file.read(4) != _MAGIC:
            raise InputError(f"{path} is not a GGUF file: it doesn't start with 'GGUF'")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    cursor = _Cursor(mapped, len(_MAGIC))
    try:
        metadata, tensors = _parse(cursor)
    except _CutShortError as error:
        expected = f"its header alone needs {error.needed} or more"
        raise InputError(f"{path} is cut short: {size} bytes, {expected}") from None
    except ValueError as error:
        raise InputError(f"{path} is a damaged GGUF file: {error}") from error
    expected = max((t.offset + t.nbytes for t in tensors.values()), default=cursor.offset)
    if size < expected:
        raise InputError(f"{path} is cut short: {size} bytes, its tensors end at {expected}")
    return GgufFile(path, metadata, tensors, np.frombuffer(mapped, np.uint8))


def require_dequantisable(file: GgufFile) -> None:
    """Raise an InputError that names the types of tensors which `dequantised` can't read."""
    kinds = sorted({tensor.kind for tensor in file.tensors.values()})
    if unknown := [kind.name for kind in kinds if not _dequantisable(kind)]:
        raise InputError(f"{file.path}: tensor types that can't be read: {', '.join(unknown)}")


def dequantised(file: GgufFile, name: str) -> np.ndarray:
    """The values of one tensor, float32; a view of the file where they are stored so."""
    return dequantize(file.rows(name), file.tensors[name].kind)


def _dequantisable(kind: GGMLQuantizationType) -> bool:
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


class _CutShortError(Exception):
    def __init__(self, needed: int):
        self.needed = needed


@dataclass
class _Cursor:
    """A place in the mapped file; every read moves it on, and none goes past the end."""

    data: mmap.mmap
    offset: int

    def take(self, size: int) -> bytes:
        begin, self.offset = self.offset, self.offset + size
        if self.offset > len(self.data):
            raise _CutShortError(self.offset)
        return self.data[begin : self.offset]


def _number(cursor: _Cursor, layout: struct.Struct) -> Any:
    return layout.unpack(cursor.take(layout.size))[0]


_uint32 = partial(_number, layout=struct.Struct("<I"))
_uint64 = partial(_number, layout=struct.Struct("<Q"))


def _string(cursor: _Cursor) -> str:
    return cursor.take(_uint64(cursor)).decode()


_NUMBERS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}


def _numbers(cursor: _Cursor, kind: GGUFValueType, count: int) -> np.ndarray:
    dtype = np.dtype(_NUMBERS[kind])
    return np.frombuffer(cursor.take(count * dtype.itemsize), dtype)


def _array(cursor: _Cursor) -> list[str] | np.ndarray:
    kind, count = GGUFValueType(_uint32(cursor)), _uint64(cursor)
    if kind == GGUFValueType.STRING:
        return [_string(cursor) for _ in range(count)]
    if kind not in _NUMBERS:
        raise ValueError("an array of arrays")
    return _numbers(cursor, kind, count)


_VALUES: dict[GGUFValueType, Callable[[_Cursor], Any]] = {
    GGUFValueType.STRING: _string,
    GGUFValueType.ARRAY: _array,
    **{kind: lambda cursor, kind=kind: _numbers(cursor, kind, 1)[0].item() for kind in _NUMBERS},
}


def _parse(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    if (version := _uint32(cursor)) not in _VERSIONS:
        raise ValueError(f"version {version}, expected one of {_VERSIONS} (little-endian)")
    tensor_count, value_count = _uint64(cursor), _uint64(cursor)
    if max(tensor_count, value_count) > _MAX_ENTRIES:
        raise ValueError(f"{tensor_count} tensors and {value_count} keys, at most {_MAX_ENTRIES}")
    metadata = _unique([_key_value(cursor) for _ in range(value_count)], "metadata keys")
    located = _unique([_tensor(cursor) for _ in range(tensor_count)], "tensors")
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = -(-cursor.offset // alignment) * alignment
    return metadata, {n: GgufTensor(s, k, start + o, b) for n, (s, k, o, b) in located.items()}


def _unique(pairs: list[tuple[str, Any]], what: str) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        raise ValueError(f"repeated {what}: {', '.join(names[:_NAMED_AT_MOST])}")
    return found


def _key_value(cursor: _Cursor) -> tuple[str, Any]:
    key = _string(cursor)
    return key, _VALUES[GGUFValueType(_uint32(cursor))](cursor)


# By number of axes: their sizes, the type, the offset.
_ENTRIES = [struct.Struct(f"<{axes}QIQ") for axes in range(_MAX_AXES + 1)]


def _tensor(cursor: _Cursor) -> tuple[str, GgufTensor]:
    """One tensor's entry, its offset still counted from the start of the data."""
    name, axes = _string(cursor), _uint32(cursor)
    if len(name) > _MAX_NAME:
        raise ValueError(f"a tensor name of {len(name)} characters: {name[:_MAX_NAME]}...")
    if not 1 <= axes <= _MAX_AXES:
        raise ValueError(f"tensor {name} has {axes} axes")
    layout = _ENTRIES[axes]
    *sizes, number, offset = layout.unpack(cursor.take(layout.size))
    shape = tuple(sizes[::-1])
    if 0 in shape:
        raise ValueError(f"tensor {name} is empty: {shape}")
    kind = GGMLQuantizationType(number)
    return name, GgufTensor(shape, kind, offset, _nbytes(name, shape, kind))


def _nbytes(name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    block_elements, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block_elements:
        raise ValueError(
            f"rows of {name} hold {shape[-1]} values, {kind.name} packs {block_elements} a block"
        )
    return math.prod(shape) // block_elements * block_bytes
