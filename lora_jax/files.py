"""Small files read strictly, and writes that appear whole or not at all.

A write goes to a temporary sibling that is synced and then renamed, with the mode that the
umask gives.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from lora_jax.errors import InputError, listed

LOCK = ".lock"
_UNFINISHED = re.compile(r"\..+\.(tmp-\d+-[0-9a-f]{8}|(new|old)-\d+)")


def existing_file(path: str | os.PathLike) -> Path:
    """``path``, if it is a file that can be read; an InputError otherwise."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path} can't be read: permission denied")
    return path


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      InputError: the file isn't there, isn't JSON (with the line), has a key twice, or holds no
        object.
    """
    path = existing_file(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    except RecursionError as error:
        raise InputError(f"{path} is nested too deeply") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds {type(value).__name__}, expected an object")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object; a key that is there twice means something else to every reader."""
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"it has twice {listed(sorted(key for key in counts if counts[key] > 1))}")
    return value


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_file(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file opened for writing that appears under ``path`` when the block ends without error.

    Raises:
      InputError: the file can't be written there; nothing is left behind.
    """
    path = Path(path)
    temporary = _sibling(path)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except OSError as error:
        raise InputError(f"can't write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike) -> Iterator[Path]:
    """A new directory to fill, which appears under ``path`` when the block ends without error.

    Raises:
      InputError: ``path`` already holds something, or can't be written.
    """
    path = Path(path).absolute()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path} already exists: name another directory or remove it first")
    temporary = _sibling(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _sync_directory(temporary)
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except OSError as error:
        raise InputError(f"can't write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold ``directory`` for this process; the system lets go of it however the process ends.

    Raises:
      InputError: another process holds it; the message names it.
    """
    import fcntl

    with _opened_lock(directory) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise InputError(f"{directory} is in use by {holder}: wait, or stop it") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _opened_lock(directory: Path) -> TextIO:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return open(directory / LOCK, "a+", encoding="utf-8")
    except OSError as error:
        raise InputError(f"can't write to {directory}: {error.strerror or error}") from error


def require_writable(directory: Path) -> None:
    """Raise an InputError unless a file can be made in ``directory``, which is made if need be."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(b"lora-jax")
    except OSError as error:
        raise InputError(f"can't write to {directory}: {error.strerror or error}") from error


def is_unfinished(name: str) -> bool:
    """Whether a file or directory of this name is what a killed process left half written.

    >>> is_unfinished(".config.yaml.tmp-812-0a1b2c3d"), is_unfinished(".config.yaml")
    (True, False)
    """
    return bool(_UNFINISHED.fullmatch(name))


def remove_unfinished(directory: Path) -> list[str]:
    """Delete what killed processes left half written in ``directory``; the names of it."""
    entries = list(directory.iterdir()) if directory.is_dir() else []
    unfinished = sorted(entry for entry in entries if is_unfinished(entry.name))
    for entry in unfinished:
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return [entry.name for entry in unfinished]


def remove_directory(directory: Path) -> None:
    """Delete a directory, which is whole or gone at every moment."""
    retired = _sibling(directory)
    os.replace(directory, retired)
    shutil.rmtree(retired)


def sync_tree(directory: Path) -> None:
    """Have every file and directory below ``directory`` on the disk before returning."""
    for path in sorted(directory.rglob("*"), reverse=True):
        if path.is_dir():
            _sync_directory(path)
        else:
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def _sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
