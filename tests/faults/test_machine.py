"""Rows 24, 27 and 30 of the fault matrix: what another process or another machine may do.

24: one writer a run, whose lock goes with it. 27: a run goes on with other devices, equal to
rounding, and says so. 30: garbage in the cache directory changes nothing.
"""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

OPTIONS = ("--epochs", "3", "--save-every", "2", "--accumulate", "4", "--learning-rate", "0.01")
ROUNDING = 2e-5


@pytest.fixture(scope="module")
def undisturbed(training, tmp_path_factory):
    whole = training(tmp_path_factory.mktemp("whole"), OPTIONS)
    assert whole.run()[0] == 0
    return whole


def test_24_a_second_writer_is_refused_until_the_first_is_killed(training, undisturbed, tmp_path):
    attempt = training(tmp_path, OPTIONS)
    first = attempt.start()
    while first.poll() is None and not attempt.metrics():
        time.sleep(0.002)
    first.send_signal(signal.SIGSTOP)
    status, printed = attempt.run("--resume")
    assert status == 2
    assert f"{attempt.out} is in use by process {first.pid} on" in " ".join(printed.split())
    first.kill()
    first.communicate()
    assert attempt.run("--resume")[0] == 0
    assert attempt.result() == undisturbed.result()


def test_24_of_two_that_start_at_once_one_goes_on(training, undisturbed, tmp_path):
    attempt = training(tmp_path, OPTIONS)
    attempt.words()
    both = [attempt.start(), attempt.start()]
    printed = {process.communicate()[0].decode(): process.returncode for process in both}
    assert sorted(printed.values()) == [0, 2]
    [refused] = [text for text, status in printed.items() if status == 2]
    assert "is in use by process" in refused or "already holds something" in refused
    assert attempt.result() == undisturbed.result()


def on_devices(count):
    return {"JAX_NUM_CPU_DEVICES": str(count)}


def killed_on(training, folder, count):
    """A run on so many devices that is killed in its second epoch."""
    options = (*OPTIONS, "--placement", "pmap", "--accumulate", str(4 // count))
    attempt = training(folder, options)
    status, printed = attempt.run(dies=("metrics.jsonl", 6), environment=on_devices(count))
    assert status == 137, printed
    return attempt


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1)])
def test_27_other_devices_go_on_with_the_same_run_to_rounding(
    training, undisturbed, tmp_path, before, after
):
    attempt = killed_on(training, tmp_path, before)
    more = ["--resume", "--accumulate", str(4 // after)]
    if after == 1:
        more += ["--placement", "single"]
    status, printed = attempt.run(*more, environment=on_devices(after))
    assert status == 0, printed
    said = " ".join(printed.split())
    assert (
        f"devices.count was {before}, is {after}: from here on the same run, but not bitwise"
        in said
    )
    assert "resuming after update 2" in said or "resuming after update 4" in said
    ours, theirs = (
        [line["loss"] for line in each.result()["log"]] for each in (attempt, undisturbed)
    )
    assert ours == pytest.approx(theirs, abs=ROUNDING)
    assert ours[0] - ours[-1] > 100 * ROUNDING


def test_27_other_devices_with_updates_of_another_size_are_refused(training, tmp_path):
    attempt = killed_on(training, tmp_path, 1)
    status, printed = attempt.run("--resume", environment=on_devices(2))
    assert status == 2
    said = " ".join(printed.split())
    assert "micro-batches an update (--accumulate times devices) was 4, is 8" in said
    assert "--force" in said


def test_27_the_number_of_cores_is_not_told_apart(training, undisturbed, tmp_path):
    attempt = training(tmp_path, OPTIONS)
    core = str(min(os.sched_getaffinity(0)))
    assert attempt.run(dies=("metrics.jsonl", 5))[0] == 137
    status, printed = attempt.run("--resume", under=("taskset", "-c", core))
    assert status == 0
    assert "not bitwise" not in printed
    ours, theirs = (
        [line["loss"] for line in each.result()["log"]] for each in (attempt, undisturbed)
    )
    assert ours == pytest.approx(theirs, abs=ROUNDING)


def garbage_of(content, drawn):
    """The file emptied, cut, with a bit flipped, or replaced."""
    flipped = bytearray(content)
    flipped[drawn.randrange(len(content))] ^= 1 << drawn.randrange(8)
    kinds = [b"", content[: len(content) // 2], bytes(flipped), drawn.randbytes(1000)]
    return drawn.choice(kinds)


@pytest.fixture
def cache(undisturbed, tmp_path):
    """A copy of the cache directory that a run has filled."""
    return Path(shutil.copytree(os.environ["LORA_JAX_CACHE"], tmp_path / "cache"))


def test_30_garbage_in_the_cache_directory_changes_nothing(training, undisturbed, tmp_path, cache):
    drawn, attempt = random.Random(0), training(tmp_path, OPTIONS)
    files = [path for path in cache.rglob("*") if path.is_file()]
    assert len(files) > 3
    for path in files:
        path.write_bytes(garbage_of(path.read_bytes() or b"x", drawn))
    status, printed = attempt.run(environment={"LORA_JAX_CACHE": str(cache)})
    assert status == 0, printed
    assert attempt.result() == undisturbed.result()


def test_30_the_cache_is_for_its_user_alone(undisturbed):
    folders = [path for path in Path(os.environ["LORA_JAX_CACHE"]).iterdir() if path.is_dir()]
    assert {folder.name for folder in folders} >= {"xla", "baselines"}
    assert all(folder.stat().st_mode & 0o777 == 0o700 for folder in folders)


@pytest.mark.parametrize("name", ["xla", "baselines"])
def test_30_a_file_in_the_way_of_the_cache_costs_no_run_in_silence(training, tmp_path, cache, name):
    """A clear refusal where programs are kept, and nothing at all where answers are."""
    shutil.rmtree(cache / name)
    (cache / name).write_text("in the way")
    attempt = training(tmp_path, OPTIONS)
    status, printed = attempt.run(environment={"LORA_JAX_CACHE": str(cache)})
    assert status == (2 if name == "xla" else 0)
    assert "Traceback" not in printed
    assert name == "baselines" or f"can't make the cache directory {cache / name}" in printed
