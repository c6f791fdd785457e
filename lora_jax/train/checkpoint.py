"""Checkpoints of a run: each a directory that is there whole and undamaged, or not at all.

checkpoints/step-00000040/
  state/          every array of the training state, as Orbax keeps it
  progress.json   what else a resumed run needs: iterator state, losses so far, digests
  adapter/        whatever the caller adds, such as the adapter as a PEFT directory
  manifest.json   size and sha256 of all of these, written last

A checkpoint is made in a temporary sibling, every file and directory is synced, and then it is
renamed; a run that is killed at any moment leaves the checkpoints before it as they were. A
reader looks at every digest before it looks at anything else.
"""

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path, tree_unflatten

from lora_jax.errors import InputError
from lora_jax.files import atomic_directory, read_json, remove_directory, sync_tree, write_text
from lora_jax.manifest import MANIFEST, checked_base, to_json, write_manifest

STATE, PROGRESS = "state", "progress.json"
_NAME = re.compile(r"step-(\d{8})")

Extras = Callable[[Path], None]
"""Writes more into a checkpoint's directory before it is closed."""


class Checkpoint(NamedTuple):
    """A checkpoint on disk, whose digests held when it was looked at."""

    directory: Path
    step: int
    progress: dict[str, Any]


def save(
    root: Path,
    step: int,
    state: Any,
    progress: Mapping[str, Any],
    extras: Extras = lambda directory: None,
) -> Path:
    """Write a checkpoint and return its directory.

    Args:
      root: the directory of all checkpoints of a run; made if need be.
      step: updates done.
      state: a tree of arrays, on this process's devices or the host.
      progress: JSON values.
      extras: writes more files beside them.

    Raises:
      InputError: it can't be written (the disk is full, say): the message has the bytes that it
        needs, nothing is left behind, and earlier checkpoints are as they were.
    """
    directory = root / f"step-{step:08d}"
    arrays = _named_arrays(state)
    if directory.exists():
        remove_directory(directory)  # The same step again, after a resume that was forced.
    try:
        with atomic_directory(directory) as folder, _silent_orbax():
            _orbax().save((folder / STATE).absolute(), args=_save_args(arrays))
            write_text(folder / PROGRESS, to_json(progress))
            extras(folder)
            names = [str(path.relative_to(folder)) for path in _files(folder)]
            write_manifest(folder, sorted(names), {"step": step})
            sync_tree(folder)
    except (InputError, OSError, ValueError) as error:
        needed = sum(array.nbytes for array in arrays.values())
        raise InputError(
            f"no checkpoint of update {step} was written to {directory} ({needed:,d} bytes of "
            f"state): {error}; earlier checkpoints are as they were"
        ) from error
    return directory


def restore(checkpoint: Checkpoint, like: Any) -> Any:
    """The training state, on the host, in the structure of ``like``.

    Raises:
      InputError: naming every array that is missing, unexpected, or of another shape or dtype.
    """
    expected = {name: (leaf.shape, np.dtype(leaf.dtype)) for name, leaf in _named(like).items()}
    folder = (checkpoint.directory / STATE).absolute()
    found = _orbax().restore(folder)
    shapes = {name: (array.shape, array.dtype) for name, array in found.items()}
    problems = [f"{name} is missing" for name in sorted(expected.keys() - shapes.keys())]
    problems += [f"{name} is not expected" for name in sorted(shapes.keys() - expected.keys())]
    problems += [
        f"{name} is {shapes[name]}, expected {expected[name]}"
        for name in sorted(expected.keys() & shapes.keys())
        if shapes[name] != expected[name]
    ]
    if problems:
        raise InputError(f"{checkpoint.directory} is of another run: {'; '.join(problems)}")
    structure = tree_flatten_with_path(like)[1]
    return tree_unflatten(structure, [found[name] for name in expected])


def steps(root: Path) -> list[int]:
    """The updates of which there is a checkpoint, from the first; unfinished ones don't count."""
    names = (_NAME.fullmatch(entry.name) for entry in root.iterdir()) if root.is_dir() else ()
    return sorted(int(match[1]) for match in names if match)


def look(root: Path, step: int) -> Checkpoint:
    """One checkpoint, after checking the digest of every file in it.

    Raises:
      InputError: a file of it is damaged, missing or added; the message names it.
    """
    directory = root / f"step-{step:08d}"
    names = {str(path.relative_to(directory)) for path in _files(directory)} - {MANIFEST}
    try:
        about = checked_base(directory, names)
        if about != {"step": step}:
            raise InputError(f"{directory / MANIFEST} says {about}, expected {{'step': {step}}}")
        progress = read_json(directory / PROGRESS)
    except InputError as error:
        others = [other for other in steps(root) if other != step]
        hint = f"to resume from update {max(others)} instead, remove it" if others else "start anew"
        raise InputError(f"{error}; {hint}") from error
    return Checkpoint(directory, step, progress)


def latest(root: Path) -> Checkpoint | None:
    """The newest checkpoint, or None where there is none.

    Raises:
      InputError: the newest is damaged. An older one is never taken in its place unasked.
    """
    found = steps(root)
    return look(root, found[-1]) if found else None


def prune(root: Path, keep: int, spare: int | None = None) -> None:
    """Delete all but the newest ``keep`` checkpoints and the one of update ``spare``."""
    for step in steps(root)[:-keep]:
        if step != spare:
            remove_directory(root / f"step-{step:08d}")


class Saver:
    """Saves in the background, one checkpoint at a time.

    The state is copied to the host before `submit` returns, so the next update may donate it. A
    save that failed is raised by the next `submit` or by `close`.

    >>> import tempfile
    >>> root = Path(tempfile.mkdtemp())
    >>> with Saver(root, keep=2) as saver:
    ...     for step in (10, 20, 30):
    ...         saver.submit(step, {"w": np.full(3, step)}, {"losses": [1.5]})
    >>> steps(root), restore(latest(root), {"w": np.zeros(3, int)})["w"].tolist()
    ([20, 30], [30, 30, 30])
    """

    def __init__(self, root: Path, keep: int) -> None:
        self._root, self._keep = root, keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self.close()

    def submit(
        self,
        step: int,
        state: Any,
        progress: Mapping[str, Any],
        extras: Extras = lambda directory: None,
        spare: int | None = None,
    ) -> None:
        """Start to save once the save before is done; older checkpoints are pruned after it."""
        self.wait()
        copied = jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)
        self._running = self._thread.submit(self._save, step, copied, dict(progress), extras, spare)

    def wait(self) -> None:
        """Return when nothing is being saved; raise what went wrong in the last save."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """Wait for the last save, and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _save(self, step: int, state: Any, progress: Any, extras: Extras, spare: Any) -> None:
        save(self._root, step, state, progress, extras)
        prune(self._root, self._keep, spare)


def _named(tree: Any) -> dict[str, Any]:
    flat = tree_flatten_with_path(tree)[0]
    return {keystr(keys, simple=True, separator="."): leaf for keys, leaf in flat}


def _named_arrays(state: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in _named(state).items()}


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _orbax() -> Any:
    """Orbax for one process: it alone writes, whatever number of processes trains."""
    import orbax.checkpoint as ocp

    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix=f"process-{os.getpid()}",
    )
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


@contextlib.contextmanager
def _silent_orbax() -> Iterator[None]:
    """Orbax logs the traceback of an error that it raises as well."""
    logger = logging.getLogger("absl")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _save_args(arrays: Mapping[str, np.ndarray]) -> Any:
    import orbax.checkpoint as ocp

    return ocp.args.StandardSave(dict(arrays))  # type: ignore[call-arg]
