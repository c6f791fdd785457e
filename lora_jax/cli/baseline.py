"""How the untrained base answers and what its held-out loss is: worked out once and kept.

They depend on nothing that training changes, so a second start of the same training finds them
in the cache directory, beside the compiled programs.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from lora_jax.cli.tasks import Judgement, Task
from lora_jax.errors import InputError


def judge_base(
    task: Task, max_new_tokens: int, judge: Callable[[], Judgement], console: Console
) -> Judgement:
    """The judgement of the base: remembered where nothing that decides it differs, else made."""
    path = _directory() / f"{_fingerprint(task, max_new_tokens)}.json"
    remembered = _read(path, len(task.questions))
    if remembered is not None:
        console.print(f"before    remembered from an earlier run ({path})", soft_wrap=True)
        return remembered
    judgement = judge()
    _write(path, judgement)
    return judgement


def _directory() -> Path:
    from interop.wheel import default_cache

    return default_cache() / "baselines"


def _fingerprint(task: Task, max_new_tokens: int) -> str:
    groups = task.heldout.packed if task.heldout else ()
    heldout = [leaf for group in groups for leaf in group]
    decides: list[Any] = [
        [version(package) for package in ("lora-jax", "jax", "jaxlib")],
        jax.default_backend(),
        task.base.digest,
        hashlib.sha256(task.base.tokenizer.to_str().encode()).hexdigest(),
        sorted(task.base.special_tokens.items()),
        task.base.eos_ids,
        repr(task.base.config),
        task.base.chat.template,
        task.questions,
        max_new_tokens,
        [hashlib.sha256(np.ascontiguousarray(leaf).data).hexdigest() for leaf in heldout],
    ]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()


def _read(path: Path, questions: int) -> Judgement | None:
    """A whole record, or None: a cache that can't be read is a cache that isn't there."""
    try:
        judgement = Judgement(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return judgement if len(judgement.answers) == questions else None


def _write(path: Path, judgement: Judgement) -> None:
    from lora_jax.files import write_text

    with contextlib.suppress(OSError, InputError):  # A cache that is full costs time, not the run.
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_text(path, json.dumps(judgement._asdict()))
