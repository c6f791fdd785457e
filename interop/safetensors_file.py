"""One safetensors file: read by mapping it into memory, and written a tensor at a time.

=========  =========================================================
bytes      what
=========  =========================================================
8          the header's length, little-endian
that many  JSON: name -> dtype, shape, [begin, end) of its data
the rest   the data, without a gap
=========  =========================================================

Source: https://github.com/huggingface/safetensors#format
"""

import contextlib
import gc
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from interop.copying import in_pieces
from lora_jax.errors import InputError, listed
from lora_jax.files import atomic_file

Tensors = dict[str, np.ndarray]

MAX_HEADER_BYTES = 32 << 20
"""A third of what the format allows; 100,000 tensors take 10 MiB."""

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
_SCRATCH_BYTES = (1 << 16, 2 << 20)
"""At least and at most: more leaves the processor's cache between being filled and being written,
less cuts matrices into parts too narrow to be transposed in blocks."""
_METADATA = "__metadata__"
_KEYS = {"dtype", "shape", "data_offsets"}


def read_tensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors of an existing file, views of it, and the strings beside them in its header.

    Raises:
      InputError: it is cut short or corrupt, or its header lies.
    """
    entries, start = _checked_header(path)
    metadata = dict(entries.pop(_METADATA, None) or {})
    return _views(path, entries, start), metadata


def _views(path: Path, entries: Mapping[str, Any], start: int) -> Tensors:
    if unknown := [f"{n} is {e['dtype']}" for n, e in entries.items() if e["dtype"] not in _DTYPES]:
        raise InputError(f"{path}: dtypes that NumPy doesn't have: {listed(unknown)}")
    if more := [f"{name} has {key}" for name, e in entries.items() for key in e.keys() - _KEYS]:
        raise InputError(f"{path}: keys that the format doesn't have: {listed(sorted(more))}")
    if not entries:
        return {}
    mapped = np.memmap(path, mode="r").view(np.ndarray)
    return {name: _view(mapped, start, entry) for name, entry in entries.items()}


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Write the file atomically; beside ``tensors`` two pieces of one are held.

    Raises:
      InputError: a dtype that the format doesn't have, or a place that can't be written.
    """
    arrays = in_file_order(tensors)
    with atomic_file(path) as file:
        write_to(file, arrays, metadata)


def in_file_order(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """The arrays as the reference writer orders them.

    Wide dtypes come first, so that every tensor is aligned; a dtype's tensors go by name.
    """
    arrays = {name: np.asarray(array) for name, array in tensors.items()}
    lacking = [
        f"{name} is {array.dtype}"
        for name, array in arrays.items()
        if array.dtype.newbyteorder("=") not in _NAMES
    ]
    if lacking:
        raise InputError(f"dtypes that safetensors doesn't have: {listed(lacking)}: cast first")
    ranks = {dtype: -rank for rank, dtype in enumerate(_NAMES)}
    order = sorted(arrays, key=lambda name: (ranks[arrays[name].dtype.newbyteorder("=")], name))
    return {name: arrays[name] for name in order}


def write_to(file: BinaryIO, arrays: Tensors, metadata: Mapping[str, str]) -> None:
    """Write header and data of arrays that are in the file's order to an open file."""
    file.write(_header(arrays, dict(sorted(metadata.items()))))
    _write_behind(file, _pieces(arrays))


def _pieces(arrays: Tensors) -> Iterator[np.ndarray]:
    """The data in order; a piece may lie where the one before the last did."""
    least, most = _SCRATCH_BYTES
    largest = max((array.nbytes for array in arrays.values()), default=0)
    size = min(max(largest // 4, least), most)  # two of them are less than a tensor
    scratches = itertools.cycle([np.empty(size, np.uint8) for _ in range(2)])
    for array in arrays.values():
        yield from in_pieces(array, size, scratches)


def _write_behind(file: BinaryIO, pieces: Iterator[np.ndarray]) -> None:
    """Write each piece while the next one is made."""
    with ThreadPoolExecutor(1) as writer:
        written = writer.submit(int)
        for piece in pieces:
            written.result()
            written = writer.submit(file.write, piece.view(np.uint8).data)
        written.result()


def _view(mapped: np.ndarray, start: int, entry: Mapping[str, Any]) -> np.ndarray:
    offset = start + entry["data_offsets"][0]
    return np.ndarray(entry["shape"], _DTYPES[entry["dtype"]], mapped, offset)


def _checked_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header's entries and where the data starts, when the file is all that they say."""
    size = path.stat().st_size
    entries, start = _read_header(path, size)
    try:
        # The library checks types, shapes and offsets, and that they cover the file.
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        raise InputError(f"{path} {_diagnosis(entries, start, size)}: {error}") from error
    return entries, start


def _read_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            raise InputError(f"{path} is not a safetensors file or is cut short ({size} bytes)")
        if length > MAX_HEADER_BYTES:
            raise InputError(
                f"{path} has a header of {length} bytes, more than {MAX_HEADER_BYTES}: "
                "split it into several files"
            )
        text = file.read(length)
    return _parsed(path, text, size), 8 + length


def _parsed(path: Path, text: bytes, size: int) -> dict[str, Any]:
    try:
        with _garbage_left():
            entries = json.loads(text.decode("utf-8"))
        if isinstance(entries, dict) and _may_repeat(entries, text):
            json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        reason = "its header is nested too deeply" if isinstance(error, RecursionError) else error
        raise InputError(
            f"{path} is not a safetensors file or is corrupt ({size} bytes): {reason}"
        ) from error
    if not isinstance(entries, dict):
        raise InputError(f"{path} ({size} bytes) has a header that is no object")
    return entries


@contextlib.contextmanager
def _garbage_left() -> Iterator[None]:
    """No search for cycles meanwhile: JSON has none, and it takes longer than to parse it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _may_repeat(entries: Mapping[str, Any], text: bytes) -> bool:
    """Whether there are more tensors than names, or less: to look at each pair takes far longer."""
    return text.count(b'"data_offsets"') != len(entries.keys() - {_METADATA})


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        repeated = [name for name, count in counts.items() if count > 1]
        raise ValueError(f"names that stand twice in its header: {listed(repeated)}")
    return found


def _diagnosis(entries: Mapping[str, Any], start: int, size: int) -> str:
    """What is wrong with the size of a file, as far as its header says."""
    try:
        ends = [e["data_offsets"][1] for name, e in entries.items() if name != _METADATA]
        expected = start + max(ends)
    except (ValueError, LookupError, TypeError):
        return f"is not a safetensors file or is corrupt ({size} bytes)"
    if size < expected:
        return f"is cut short: {size} bytes, its header asks for {expected}"
    return f"is corrupt ({size} bytes, its header asks for {expected})"


def _header(arrays: Tensors, metadata: dict[str, str]) -> bytes:
    entries: dict[str, Any] = {_METADATA: metadata} if metadata else {}
    end = 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        dtype = _NAMES[array.dtype.newbyteorder("=")]
        entries[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": (begin, end)}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
