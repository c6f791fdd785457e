"""manifest.json: the digest of every file of a directory, so that damage and edits are noticed."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_jax.errors import InputError
from lora_jax.files import atomic_directory, existing_file, read_json, write_text

MANIFEST = "manifest.json"

_FORMAT_VERSION = 1
_MAX_JSON_BYTES = 1 << 20


def write_manifest(directory: Path, names: Collection[str], base: Mapping[str, Any]) -> None:
    """Record size and sha256 of the named files, and what the caller knows of the base."""
    files = {name: _fingerprint(directory / name) for name in names}
    content = {"format_version": _FORMAT_VERSION, "files": files, "base": dict(base)}
    write_text(directory / MANIFEST, to_json({**content, "sha256": _own_digest(content)}))


def checked_base(directory: Path, names: Collection[str]) -> dict[str, Any]:
    """The ``base`` of a manifest that lists exactly ``names`` and whose digests hold.

    Raises:
      InputError: naming every file that is absent or differs, with both digests.
    """
    path = directory / MANIFEST
    manifest = read_small_json(path)
    if problems := list(_problems(directory, manifest, set(names))):
        raise InputError(f"{directory} is damaged or was edited: " + "; ".join(problems))
    if not _is_whole(path, manifest):
        raise InputError(f"{path} is damaged or was edited: its own sha256 is another")
    return manifest["base"]


def _is_whole(path: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest is byte for byte what its own digest says it was."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    whole = to_json({**content, "sha256": _own_digest(content)})
    return path.read_text(encoding="utf-8") == whole


def _own_digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(to_json(content).encode()).hexdigest()


def read_small_json(path: Path, *, max_bytes: int = _MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file of bounded size, by default 1 MiB, from whomever it came.

    Raises:
      InputError: the file isn't there, is larger, nested too deeply, or holds no object.
    """
    size = existing_file(path).stat().st_size
    if size > max_bytes:
        raise InputError(f"{path} has {size} bytes, more than the {max_bytes} it may have")
    return read_json(path)


def to_json(value: Mapping[str, Any]) -> str:
    """JSON in one spelling only: keys sorted, two spaces, a last newline."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


@contextlib.contextmanager
def new_or_replaced(directory: Path, replaceable: Collection[str] = ()) -> Iterator[Path]:
    """A folder to fill, which appears as ``directory`` when the block ends without error.

    Args:
      directory: absent, empty, or holding nothing but files named in ``replaceable``; those
        stay where they are until the new folder is complete.

    Raises:
      InputError: it holds something else, or can't be written.
    """
    if not directory.is_dir() or not replaceable:
        with atomic_directory(directory) as folder:
            yield folder
        return
    if others := sorted({entry.name for entry in directory.iterdir()} - set(replaceable)):
        raise InputError(f"{directory} can't be replaced, it also holds {others}: move them away")
    fresh = directory.with_name(f".{directory.name}.new-{os.getpid()}")
    with atomic_directory(fresh) as folder:
        yield folder
    _swap(fresh, directory)


def _swap(fresh: Path, directory: Path) -> None:
    retired = directory.with_name(f".{directory.name}.old-{os.getpid()}")
    try:
        os.replace(directory, retired)
        os.replace(fresh, directory)
    except OSError as error:
        raise InputError(f"can't replace {directory}: {error.strerror}; see {fresh}") from error
    shutil.rmtree(retired)


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(existing_file(path), "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": digest, "size": path.stat().st_size}


def _problems(directory: Path, manifest: Mapping[str, Any], names: set[str]) -> Iterator[str]:
    version, recorded, base = (manifest.get(key) for key in ("format_version", "files", "base"))
    if version != _FORMAT_VERSION:
        yield f"{MANIFEST} has format_version {version!r}, expected {_FORMAT_VERSION}"
    elif not isinstance(recorded, dict) or not isinstance(base, dict):
        yield f"{MANIFEST} has files={recorded!r} and base={base!r}, expected two objects"
    elif set(recorded) != names:
        yield from (
            f"{MANIFEST} lists {name}, which is missing" for name in sorted(set(recorded) - names)
        )
        yield from (f"{name} is not in {MANIFEST}" for name in sorted(names - set(recorded)))
    else:
        fingerprints = {name: _fingerprint(directory / name) for name in sorted(names)}
        for name, found in fingerprints.items():
            if found != recorded[name]:
                yield f"{name} is {found}, {MANIFEST} says {recorded[name]}"
