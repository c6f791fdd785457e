"""Small trainings in processes of their own, to be killed, starved and compared."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from interop import peft
from lora_jax.cli.parsing import read_yaml
from lora_jax.train import checkpoint

from chat_rows import write_rows

ROWS = [(f"What is {i}?", f"It is {i * 7 % 11}.") for i in range(9)]
CLOCKS = ("seconds", "tokens_per_second", "positions_per_second", "flops_per_second")
DYING = Path(__file__).with_name("dying.py")
KILLED = 137


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory):
    """Compiled programs of the tests don't go to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@dataclass(frozen=True)
class Training:
    """Nine rows, two an update: five updates an epoch, the last of them of one row.

    What is compared must run in processes with one number of devices each.
    """

    folder: Path
    options: tuple[str, ...] = ()

    @property
    def out(self):
        return self.folder / "run"

    @property
    def checkpoints(self):
        return self.out / "checkpoints"

    def words(self, *more):
        data = self.folder / "a.jsonl"
        if not data.exists():
            write_rows(data, ROWS)
        fixed = ["--max-length", "64", "--batch-size", "1", "--rank", "2", "--max-new-tokens", "2"]
        fixed += ["--dropout", "0.1", *self.options]
        words = ["train", "--model", "tiny", "--data", data, "--out", self.out, *fixed, *more]
        return [str(word) for word in words]

    def start(self, *more, dies=None, environment=None, under=(), **popen):
        """Train; ``dies=(text, n)`` before the n-th file operation on a path with that text.

        ``under`` is a command that starts others.
        """
        program = ["-m", "lora_jax.cli.main"] if dies is None else [DYING, *map(str, dies)]
        return subprocess.Popen(
            [*under, sys.executable, *program, *self.words(*more)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            **popen,
        )

    def run(self, *more, **how):
        """The exit status, and all that was printed."""
        process = self.start(*more, **how)
        printed = process.communicate()[0].decode("utf-8", "replace")
        return process.returncode, printed

    def resume(self):
        """Whether there is a run to go on with."""
        return ["--resume"] if (self.out / "config.yaml").exists() else []

    def metrics(self):
        path = self.out / "metrics.jsonl"
        return path.read_text().splitlines() if path.exists() else []

    def result(self):
        """All that a run leaves behind and that must be equal, clocks aside."""
        newest = checkpoint.latest(self.checkpoints)
        lines = [json.loads(line) for line in self.metrics()]
        return {
            "adapter": (self.out / "adapter" / "adapter_model.safetensors").read_bytes(),
            "adapter's config": (self.out / "adapter" / "adapter_config.json").read_bytes(),
            "state": arrays_of(newest),
            "update": newest.step,
            "progress": newest.progress,
            "log": [{k: v for k, v in line.items() if k not in CLOCKS} for line in lines],
            "answers": (self.out / "answers.json").read_bytes(),
        }

    def require_whole(self):
        """Whatever has a final name is there whole."""
        for step in checkpoint.steps(self.checkpoints):
            checkpoint.look(self.checkpoints, step)
        if (self.out / "adapter").exists():
            assert peft.base_of(self.out / "adapter")
        if (self.out / "config.yaml").exists():
            assert read_yaml(self.out / "config.yaml")["run"]
        if (self.out / "loss.png").exists():
            assert (self.out / "loss.png").read_bytes().endswith(b"IEND\xaeB`\x82")
        if (self.out / "answers.json").exists():
            assert json.loads((self.out / "answers.json").read_text())

    def leftovers(self):
        """Everything half written that a killed run left."""
        entries = [*self.out.iterdir(), *self.checkpoints.iterdir()]
        return [path for path in entries if path.name.startswith(".") and path.name != ".lock"]


@pytest.fixture(scope="session")
def training():
    return Training


def arrays_of(found):
    """The bytes of every array of a checkpoint, with its dtype and shape."""
    tree = ocp.StandardCheckpointer().restore((found.directory / "state").absolute())
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    return {name: (str(a.dtype), a.shape, a.tobytes()) for name, a in arrays.items()}


@pytest.fixture(scope="session", name="arrays_of")
def _arrays_of():
    return arrays_of
