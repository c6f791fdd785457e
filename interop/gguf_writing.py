"""GGUF files from named values and float arrays: equal input gives equal bytes."""

import os
import struct
from collections.abc import Iterable, Mapping

import numpy as np
from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from lora_jax.files import atomic_file

Value = str | int | float

_MAGIC, _VERSION = b"GGUF", 3
_KINDS = {
    np.dtype(np.float32): GGMLQuantizationType.F32,
    np.dtype(np.float16): GGMLQuantizationType.F16,
}


def write_gguf(
    path: str | os.PathLike, metadata: Mapping[str, Value], tensors: Mapping[str, np.ndarray]
) -> None:
    """Write a little-endian GGUF file of version 3; it appears whole or not at all.

    Args:
      path: the file; one that exists is replaced.
      metadata: strings, unsigned 32-bit integers and floats, which become float32.
      tensors: float32 or float16, at most four axes and none of them empty; one is copied at a
        time where it isn't contiguous.

    Raises:
      InputError: the file can't be written there.

    References:
      https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    counts = struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))
    values = (_string(key) + _VALUES[type(value)](value) for key, value in metadata.items())
    header = b"".join([_MAGIC, counts, *values, *_entries(tensors)])
    with atomic_file(path) as file:
        file.write(_padded(header))
        for array in tensors.values():
            little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
            file.write(_padded(little.tobytes()))


def _entries(tensors: Mapping[str, np.ndarray]) -> Iterable[bytes]:
    """Name, axes from the fastest on, type and place of each tensor."""
    offset = 0
    for name, array in tensors.items():
        axes = struct.pack(f"<I{array.ndim}Q", array.ndim, *array.shape[::-1])
        yield _string(name) + axes + struct.pack("<IQ", _KINDS[array.dtype], offset)
        offset += array.nbytes + -array.nbytes % GGUF_DEFAULT_ALIGNMENT


def _padded(raw: bytes) -> bytes:
    return raw + bytes(-len(raw) % GGUF_DEFAULT_ALIGNMENT)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


_VALUES = {
    str: lambda value: struct.pack("<I", GGUFValueType.STRING) + _string(value),
    int: lambda value: struct.pack("<II", GGUFValueType.UINT32, value),
    float: lambda value: struct.pack("<If", GGUFValueType.FLOAT32, value),
}
