"""Rows 1, 2, 13 and 28 of the fault matrix: killed at any moment, resumed, and the same bits.

1: nothing half written has a final name, and what is left over is removed. 2: on the disk before
it has its name. 13: adapter, optimizer, order of the data and log are equal bit for bit.
28: neither the locale, the time zone nor the seed of hashes matters.
"""

import os
import random
import signal
import subprocess
import sys
import time
from itertools import cycle
from pathlib import Path

import jax
import numpy as np
import pytest

from lora_jax.files import remove_unfinished
from lora_jax.train import checkpoint

import dying

pytestmark = pytest.mark.slow

KILLED = (dying.KILLED, -signal.SIGKILL)
ENVIRONMENTS = (
    {"PYTHONHASHSEED": "1", "LC_ALL": "C", "TZ": "Pacific/Kiritimati"},
    {"PYTHONHASHSEED": "2", "LC_ALL": "de_DE.UTF-8", "TZ": "UTC"},
    {"PYTHONHASHSEED": "3", "LC_ALL": "C.UTF-8", "TZ": "America/St_Johns"},
)


def test_1_a_save_killed_before_each_of_its_operations_leaves_whole_checkpoints(
    tmp_path, arrays_of
):
    subprocess.run([sys.executable, dying.__file__, "--saves", tmp_path], check=True, timeout=300)
    roots = sorted(tmp_path.iterdir(), key=lambda root: int(root.name))
    assert len(roots) > 40
    newest = [newest_of(root, arrays_of) for root in roots]
    assert newest == sorted(newest)
    assert {newest[0], newest[-1]} == {10, 20}
    half_written = [remove_unfinished(root) for root in roots]
    assert sum(map(bool, half_written)) > 40
    for root in (roots[0], roots[len(roots) // 2], roots[-2]):
        dying.save(root, 30)
        assert [path.name for path in root.iterdir()] == ["step-00000030"]


def newest_of(root, arrays_of):
    """The newest checkpoint's step; every one is looked at, and the newest read."""
    found = [checkpoint.look(root, step) for step in checkpoint.steps(root)][-1]
    restored = checkpoint.restore(found, dying.state_of(0))
    for name, expected in dying.state_of(found.step).items():
        assert np.asarray(restored[name]).tobytes() == expected.tobytes()
    assert found.progress == {"losses": [0.5] * found.step}
    return found.step


@pytest.mark.parametrize("seed", range(6))
def test_1_a_save_killed_at_a_random_time_leaves_whole_checkpoints(tmp_path, seed, arrays_of):
    """Also in the middle of writes that Python doesn't see."""
    endless = "import dying, itertools, pathlib, sys\nfor step in itertools.count(1):\n"
    endless += "    dying.save(pathlib.Path(sys.argv[1]), step)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", endless, tmp_path / "root"], cwd=Path(dying.__file__).parent
    )
    while not checkpoint.steps(tmp_path / "root"):
        time.sleep(0.01)
    time.sleep(random.Random(seed).uniform(0.1, 0.5))
    process.kill()
    process.wait()
    assert newest_of(tmp_path / "root", arrays_of) >= 1


def test_2_every_file_is_on_the_disk_before_the_directory_has_its_name(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def noted_fsync(handle):
        events.append(("sync", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def noted_replace(source, target):
        events.append(("rename", str(source), str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    dying.save(tmp_path, 10)
    directory = tmp_path / "step-00000010"
    [at] = [
        i for i, event in enumerate(events) if event[0] == "rename" and directory == Path(event[2])
    ]
    temporary = events[at][1]
    synced = {event[1] for event in events[:at] if event[0] == "sync"}
    written = [directory, *directory.rglob("*")]
    assert len(written) > 10
    for path in written:
        assert str(path).replace(str(directory), temporary) in synced
    assert ("sync", str(tmp_path)) in events[at:]
    manifest = events.index(("sync", f"{temporary}/manifest.json"))
    assert manifest == max(i for i, event in enumerate(events) if event[1].endswith(".json"))


# Where the attempts die, and how often each saves meanwhile. An epoch has five updates, and the
# last of them only half as many rows as it has micro-batches.
MOMENTS = {
    "in the first save": (("checkpoints/.step", 30), 3),
    "in the middle of an epoch": (("metrics.jsonl", 7), 3),
    "at the end of an epoch, after its short update": (("metrics.jsonl", 8), 5),
    "after the last update, before the adapter": (("run/.adapter", 1), 5),
    "between the adapter and its name": (("run/.adapter", 9), 5),
}


@pytest.fixture(scope="module")
def undisturbed(training, tmp_path_factory):
    """Finished trainings by precision."""
    found = {}

    def finished(precision):
        if precision not in found:
            found[precision] = train_of(training, tmp_path_factory.mktemp(precision), precision)
            assert found[precision].run("--save-every", "5")[0] == 0
        return found[precision]

    return finished


def train_of(training, folder, precision, epochs=4):
    options = ("--accumulate", "2", "--epochs", str(epochs), "--precision", precision)
    return training(folder, (*options, "--learning-rate", "0.01"))


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_13_and_28_killed_at_chosen_moments_gives_the_same_bits(
    training, undisturbed, tmp_path, precision
):
    attempt, environments = train_of(training, tmp_path, precision), cycle(ENVIRONMENTS)
    left_over = []
    for moment, (dies, save_every) in MOMENTS.items():
        how = {"dies": dies, "environment": next(environments)}
        status, printed = attempt.run("--save-every", save_every, *attempt.resume(), **how)
        assert status == dying.KILLED, (moment, printed)
        assert all(f"removed   {path}" in printed for path in left_over), printed
        attempt.require_whole()
        left_over = attempt.leftovers()
    status, printed = attempt.run("--resume", environment=next(environments))
    assert status == 0, printed
    assert left_over
    assert all(f"removed   {path}" in printed for path in left_over)
    assert not attempt.leftovers()
    assert attempt.result() == undisturbed(precision).result()


def test_13_a_finished_run_resumed_under_another_locale_is_the_same(undisturbed):
    finished = undisturbed("float32")
    before = finished.result()
    assert finished.run("--resume", environment=ENVIRONMENTS[0])[0] == 0
    assert finished.result() == before


def test_13_other_training_gives_other_bits(training, undisturbed, tmp_path):
    """What the others compare can differ."""
    other = training(tmp_path, (*undisturbed("float32").options, "--seed", "1"))
    assert other.run()[0] == 0
    one, two = other.result(), undisturbed("float32").result()
    assert all(one[name] != two[name] for name in ("adapter", "state", "progress", "log"))


@pytest.mark.slow
def test_13_killed_at_twenty_random_moments_gives_the_same_bits(training, tmp_path):
    drawn, environments = random.Random(0), cycle(ENVIRONMENTS)
    whole, attempt = (train_of(training, tmp_path / name, "float32", 16) for name in ("a", "b"))
    for each in (whole, attempt):
        each.folder.mkdir()
    assert whole.run("--save-every", "2")[0] == 0
    for number in range(20):
        kill = kill_at_an_operation if number % 2 else kill_at_a_time
        assert kill(attempt, drawn, next(environments)) in KILLED
        attempt.require_whole()
    assert attempt.run("--save-every", "2", "--resume")[0] == 0
    assert not attempt.leftovers()
    assert attempt.result() == whole.result()


def kill_at_an_operation(attempt, drawn, environment):
    """Most of a run's file operations are those of saving."""
    dies = (attempt.out, drawn.randrange(1, 200))
    how = {"dies": dies, "environment": environment}
    return attempt.run("--save-every", "2", *attempt.resume(), **how)[0]


def kill_at_a_time(attempt, drawn, environment):
    """Within a few updates and saves of the first."""
    before = len(attempt.metrics())
    process = attempt.start("--save-every", "2", *attempt.resume(), environment=environment)
    while process.poll() is None and len(attempt.metrics()) in (0, before):
        time.sleep(0.002)
    time.sleep(drawn.uniform(0, 0.3))
    process.kill()
    process.communicate()
    return process.returncode


def test_28_a_terminal_without_unicode_ends_no_run(undisturbed):
    finished = undisturbed("float32")
    before = finished.result()
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    status, printed = finished.run("--resume", environment=ascii_only)
    assert status == 0, printed
    assert finished.result() == before


def test_1_a_kill_before_there_is_a_config_needs_no_hand(training, undisturbed, tmp_path):
    attempt = train_of(training, tmp_path, "float32")
    for number in (1, 2, 3, 4):
        assert attempt.run("--save-every", "5", dies=("run/", number))[0] == dying.KILLED
        if attempt.resume():
            break
    assert attempt.run("--save-every", "5", *attempt.resume())[0] == 0
    assert attempt.result() == undisturbed("float32").result()
    assert not attempt.leftovers()


def test_cpu_devices_of_this_process_are_not_those_of_the_trainings():
    assert jax.device_count() == 8
    assert "JAX_NUM_CPU_DEVICES" not in os.environ
