"""A process that dies, as by kill -9, right before one of its file operations.

Run as a script: ``dying.py TEXT N WORDS...`` is ``lora-jax WORDS``, which dies before the N-th
operation on a path that holds TEXT. ``dying.py --saves FOLDER`` saves a checkpoint again and
again, each time in a new process and in FOLDER/N, where it dies before operation N; it ends with
the first that lives.
"""

import os
import sys

KILLED = 137
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
OPERATIONS = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}


def die_before(text, number):
    """End this process right before its ``number``-th operation on a path with ``text``."""
    left, fsync = [number], os.fsync

    def count(path):
        if text in str(path):
            left[0] -= 1
            if left[0] == 0:
                os._exit(KILLED)

    def hook(event, arguments):
        if event in OPERATIONS or (event == "open" and arguments[2] & WRITING):
            count(_whole_path(event, arguments))

    def counted_fsync(handle):
        count(_path_of(handle))
        fsync(handle)

    sys.addaudithook(hook)
    os.fsync = counted_fsync


def _whole_path(event, arguments):
    folder = arguments[-1]
    relative = event in ("os.remove", "os.rmdir") and isinstance(folder, int) and folder >= 0
    return f"{_path_of(folder)}/{arguments[0]}" if relative else arguments[0]


def _path_of(handle):
    return os.readlink(f"/proc/self/fd/{handle}")


def state_of(step):
    """Arrays that tell of which step they are."""
    import numpy as np

    drawn = np.random.default_rng(step)
    return {
        "w": drawn.normal(size=(40, 30)).astype(np.float32),
        "half": drawn.normal(size=7).astype(np.float16),
        "step": np.int32(step),
    }


def save(root, step):
    """One save of a run that keeps a single checkpoint."""
    from lora_jax.files import write_text
    from lora_jax.train.checkpoint import Saver

    def extras(folder):
        (folder / "adapter").mkdir()
        write_text(folder / "adapter" / "note.txt", f"of update {step}")

    with Saver(root, keep=1) as saver:
        saver.submit(step, state_of(step), {"losses": [0.5] * step}, extras)


def save_and_die_everywhere(folder):
    """A new process for each operation of one save, forked before JAX has any thread."""
    import orbax.checkpoint  # noqa: F401

    status, number = KILLED, 0
    while status == KILLED:
        number += 1
        if (child := os.fork()) == 0:
            _save_twice(folder / str(number), number)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status


def _save_twice(root, number):
    try:
        save(root, 10)
        die_before(str(root), number)
        save(root, 20)
        os._exit(0)
    finally:
        os._exit(1)


if __name__ == "__main__":
    from pathlib import Path

    if sys.argv[1] == "--saves":
        raise SystemExit(save_and_die_everywhere(Path(sys.argv[2])))
    die_before(sys.argv[1], int(sys.argv[2]))
    from lora_jax.cli.main import main

    raise SystemExit(main(sys.argv[3:]))
