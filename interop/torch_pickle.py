"""Torch's own files, read without running what they say.

A ``.pth`` is a pickle, which can name any function to call. torch reads it here with its list of
harmless ones and never otherwise. Before that the zip archive around it must be as torch writes
it, uncompressed; after it no tensor may be larger than what the file holds.
"""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from interop.dlpack import as_numpy, as_torch
from interop.pickle_cost import slowness
from lora_jax.errors import InputError, listed, raise_listed
from lora_jax.files import atomic_file

_OLDEST_SAFE_TORCH = (2, 10)
_LEGACY_PICKLES = 5
_MOST_ENTRIES = 20_000
_LONGEST_ZIP_END = 22 + 2**16
_SLOW = "it would take too long; if it is what it should be, save it as .safetensors"


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of an existing torch file, sharing memory with what torch loaded.

    Raises:
      InputError: torch is missing or too old, the file is damaged, or it holds anything but
        tensors by name.
    """
    torch = _safe_torch(path)
    size = path.stat().st_size
    if problem := _archive_problem(path, size):
        raise InputError(f"{path} ({size} bytes) {problem}")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch raises for a damaged or refused file has no common base
        raise InputError(
            f"{path} ({size} bytes) holds no tensors that can be read safely: {_reason(error)}"
        ) from error
    if not isinstance(loaded, dict):
        raise InputError(f"{path} holds {type(loaded).__name__}, expected a dict of tensors")
    raise_listed(f"{path}: not tensors", (_shown(n) for n, t in loaded.items() if not _named(n, t)))
    raise_listed(
        f"{path}: larger than what the file holds of them",
        (name for name, tensor in loaded.items() if _is_larger_than_stored(tensor)),
    )
    arrays = {name: _array_or_problem(tensor) for name, tensor in loaded.items()}
    odd = (f"{name} ({a})" for name, a in arrays.items() if not isinstance(a, np.ndarray))
    raise_listed(f"{path}: tensors that NumPy has no form for", odd)
    return arrays


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write the file atomically; each tensor is stored by its values, whatever it shares.

    Raises:
      InputError: torch is missing, or a place that can't be written.
    """
    torch = _safe_torch(path)
    state = {name: as_torch(np.array(array, order="C")) for name, array in tensors.items()}
    with atomic_file(path) as file:
        torch.save(state, file)


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


def _archive_problem(path: Path, size: int) -> str | None:
    """What torch has not written: it would fill the memory, or take for ever, when unpacked."""
    try:
        if not zipfile.is_zipfile(path):
            return _legacy_problem(path)
        if (count := _entry_count(path, size)) > _MOST_ENTRIES:
            return f"holds {count:,} entries or more: {_SLOW}"
        with zipfile.ZipFile(path) as archive:
            return _entries_problem(archive, size) or _slow_problem(archive)
    except Exception as error:  # what zipfile raises for a damaged archive has no common base
        return f"is a damaged archive: {listed([str(error)])}"


def _entry_count(path: Path, size: int) -> int:
    """What the end of the archive says, up to 65,535: it can lie, but is there at once."""
    with open(path, "rb") as file:
        file.seek(max(size - _LONGEST_ZIP_END, 0))
        end = file.read().rpartition(b"PK\x05\x06")[2]
    return int.from_bytes(end[6:8], "little")


def _entries_problem(archive: zipfile.ZipFile, size: int) -> str | None:
    entries = archive.infolist()
    if len(entries) > _MOST_ENTRIES:
        return f"holds {len(entries):,} entries: {_SLOW}"
    if packed := [e.filename for e in entries if e.compress_type != zipfile.ZIP_STORED]:
        return f"holds compressed entries, which torch doesn't write: {listed(packed)}"
    if len({entry.filename for entry in entries}) < len(entries):
        return "holds entries of one name"
    unpacked = sum(entry.file_size for entry in entries)
    return f"unpacks to {unpacked} bytes, more than it has" if unpacked > size else None


def _slow_problem(archive: zipfile.ZipFile) -> str | None:
    for name in archive.namelist():
        if name.rpartition("/")[2] == "data.pkl":
            with archive.open(name) as file:
                if reason := slowness(file):
                    return f"{reason}: {_SLOW}"
    return None


def _legacy_problem(path: Path) -> str | None:
    """torch's older format has several pickles one after the other, or is none of its formats."""
    with open(path, "rb") as file:
        reasons = (slowness(file) for _ in range(_LEGACY_PICKLES))
        reason = next(filter(None, reasons), None)
    return reason and f"{reason}: {_SLOW}"


def _named(name: Any, tensor: Any) -> bool:
    import torch

    return isinstance(name, str) and isinstance(tensor, torch.Tensor)


def _reason(error: Exception) -> str:
    """torch's, without its advice to run what the file says."""
    if asked := re.search(r"GLOBAL (\S+)", str(error)):
        return f"it would run {listed(asked.groups())}: ask for its state dict, as .safetensors"
    if "weights_only" in str(error):
        return "it is more than a state dict, or damaged"
    return listed([str(error).strip().partition("\n")[0] or "it is empty or cut short"])


def _array_or_problem(tensor: Any) -> Any:
    try:
        return as_numpy(tensor)
    except InputError as error:
        return error


def _shown(name: Any) -> str:
    return name if isinstance(name, str) else f"a {type(name).__name__}"


def _is_larger_than_stored(tensor: Any) -> bool:
    """Whether a tensor repeats its memory, as an expanded one does: a file of a few bytes could
    ask for any size so."""
    import torch

    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
