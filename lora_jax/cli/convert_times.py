"""Conversions of a state dict, timed in turns, and the memory that each takes.

A file is in the page cache when it is read, and a write of one is timed up to there: what the disk
takes is a row of its own, and so is what a file takes of which nothing has to be converted. Seconds
are the processor's, all threads together, so that other processes count as little as can be; of the
disk alone they are the clock's.
"""

import gc
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_jax.cli.bench_convert import Options
from lora_jax.files import sync_tree

# Of the linear layers of a block: features in and out, those of a decoder of 1.1 billion weights.
_LINEARS = {
    "q": (2048, 2048),
    "k": (2048, 256),
    "v": (2048, 256),
    "o": (2048, 2048),
    "gate": (2048, 5632),
    "up": (2048, 5632),
    "down": (5632, 2048),
}
_TABLE = (8192, 2048)


_WALL = time.perf_counter
_PAGE = 4096


class Row(NamedTuple):
    """One measurement: GB of the state dict a second, and bytes held beside source and target."""

    name: str
    rate: float
    beyond: int | None


class Report(NamedTuple):
    """All measurements; the first is memcpy's."""

    rows: tuple[Row, ...]
    gigabytes: float
    largest: int


class Job(NamedTuple):
    """A conversion, what of source and target it takes into this process's memory, its clock."""

    name: str
    run: Callable[[], Any]
    held: int
    clock: Callable[[], float] = time.process_time


def conversions(options: Options) -> Report:
    """Time copying, reading and writing of a state dict of ``options``' size."""
    import ml_dtypes

    from interop import torch_io
    from interop.conversion import from_torch, nest, to_torch
    from interop.keymaps import Keymap, Rule

    dtype = np.dtype(getattr(ml_dtypes, options.dtype, options.dtype))
    shapes = _shapes(options.megabytes, dtype.itemsize)
    linears = (Rule(f"layers/{n}/kernel", f"layers.{{i}}.{n}.weight", (1, 0)) for n in _LINEARS)
    table = Keymap((*linears, Rule("embed/embedding", "embed.weight")))
    leaves = _random_leaves(shapes, dtype)
    views = to_torch(nest(leaves), table)
    tensors = _contiguous(views)
    size = sum(leaf.nbytes for leaf in leaves.values())
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        file = Path(directory) / "model.safetensors"
        torch_io.write(file, views)
        jobs = (
            Job("memcpy into new memory", partial(_copied, leaves), size),
            Job("memcpy into memory in use", partial(_copy_over, leaves), 0),
            Job("state dict -> leaves", partial(from_torch, tensors, table, shapes), size),
            Job("leaves -> state dict", partial(_contiguous, views), size),
            Job(
                "safetensors -> leaves",
                lambda: from_torch(torch_io.read(file), table, shapes),
                2 * size,
            ),
            Job("leaves -> safetensors", partial(_write_unsynced, file, views), 0),
            Job("same, waiting for the disk", partial(torch_io.write, file, views), 0, _WALL),
            Job("write() alone, no conversion", partial(_write_unsynced, file, tensors), 0),
        )
        beyond = [_beyond(job) for job in jobs]
        seconds = _fastest(jobs, options.rounds, size, Path(directory))
    rates = [size / 1e9 / each for each in seconds]
    rows = tuple(map(Row, (job.name for job in jobs), rates, beyond))
    return Report(rows, size / 1e9, max(tensor.nbytes for tensor in views.values()))


def _shapes(megabytes: int, itemsize: int) -> dict[str, tuple[int, ...]]:
    """Of every leaf: as many layers as it takes."""
    layer = sum(rows * columns for rows, columns in _LINEARS.values())
    wanted = megabytes * 2**20 // itemsize - _TABLE[0] * _TABLE[1]
    layers = max(1, -(-wanted // layer))
    stacked = {f"layers/{name}/kernel": (layers, *shape) for name, shape in _LINEARS.items()}
    return {"embed/embedding": _TABLE, **stacked}


def _random_leaves(shapes: dict[str, tuple[int, ...]], dtype: np.dtype) -> dict[str, np.ndarray]:
    noise = np.random.default_rng(0).standard_normal(1_000_003, np.float32).astype(dtype)
    return {path: np.resize(noise, shape) for path, shape in shapes.items()}


def _copied(leaves: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [leaf.copy() for leaf in leaves.values()]


def _contiguous(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors by value, each in an order of its own, as torch would have them."""
    from interop.copying import copy_into

    copies = {name: np.empty(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    for name, copy in copies.items():
        copy_into(copy, tensors[name])
    return copies


def _copy_over(leaves: dict[str, np.ndarray]) -> None:
    """As many bytes, a piece of a leaf at a time over the same other one."""
    for leaf in leaves.values():
        flat = leaf.reshape(-1)
        half = flat.size // 2
        np.copyto(flat[half : 2 * half], flat[:half])
        np.copyto(flat[:half], flat[half : 2 * half])


def _write_unsynced(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """What `torch_io.write` does but for waiting for the disk."""
    from interop import safetensors_file

    with open(path, "wb") as file:
        safetensors_file.write_to(file, safetensors_file.in_file_order(tensors), {"format": "pt"})


def _fastest(jobs: Sequence[Job], rounds: int, size: int, directory: Path) -> list[float]:
    """Seconds of each job: the best of its runs, for what else the machine does only adds."""
    best = [math.inf] * len(jobs)
    for _ in range(rounds):
        for number, job in enumerate(jobs):
            best[number] = min(best[number], _seconds(job, size, directory))
    return best


def _seconds(job: Job, size: int, directory: Path) -> float:
    gc.collect()
    sync_tree(directory)
    _have_at_hand(size, directory)
    started = job.clock()
    job.run()
    return job.clock() - started


def _have_at_hand(size: int, directory: Path) -> None:
    """Files in the page cache, and memory that the system finds at once.

    A virtual machine gives free memory back, and to get it from its host again takes longer than
    what is timed here. Which of it the next run gets, nobody knows: so more is asked for.
    """
    for file in directory.iterdir():
        np.fromfile(file, np.uint8)
    np.empty(min(4 * size, _free_bytes() // 2), np.uint8)[::_PAGE] = 1


def _free_bytes() -> int:
    """Of memory; none where the system doesn't say."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0


def _beyond(job: Job) -> int | None:
    """Peak bytes in memory that are neither source nor target; None where Linux doesn't say."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
        before = _status("VmRSS")
        job.run()
        return max(0, _status("VmHWM") - before - job.held)
    except OSError:
        return None


def _status(key: str) -> int:
    """Bytes of a line of /proc/self/status, which counts in KiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
