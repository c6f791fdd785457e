"""Rows 3 and 25 of the fault matrix: a disk that is full, and one that can't be written to.

3: an error with path and bytes needed, earlier checkpoints as they were, nothing left over, and
the run goes on once there is room. 25: refused before training; files have the mode of the umask.
"""

import re
import shutil
import subprocess
from contextlib import contextmanager

import pytest

from lora_jax.train import checkpoint

pytestmark = pytest.mark.slow

SAVING_OFTEN = ("--accumulate", "2", "--epochs", "3", "--save-every", "2", "--keep", "100")
LARGEST_FILE = 25_000
"""Bytes; the arrays of a checkpoint need more."""


@pytest.fixture(scope="module")
def undisturbed(training, tmp_path_factory):
    whole = training(tmp_path_factory.mktemp("whole"), SAVING_OFTEN)
    assert whole.run()[0] == 0
    return whole


@contextmanager
def small_disk(folder, kilobytes):
    """A file system of that size; the block is skipped where none may be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", folder]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def require_told(printed, attempt):
    """One message with the path and the bytes that are needed."""
    words = " ".join(printed.split())
    found = re.search(r"no checkpoint of update \d+ was written to (\S+) \(([\d,]+) bytes", words)
    assert found, words
    assert found[1].startswith(str(attempt.checkpoints))
    assert int(found[2].replace(",", "")) > 40_000
    assert printed.splitlines()[-1].startswith("lora-jax train: no checkpoint")


@pytest.mark.parametrize("kilobytes", [150, 420, 600])
def test_3_a_full_disk_ends_the_run_and_room_lets_it_go_on(
    training, undisturbed, tmp_path, kilobytes
):
    with small_disk(tmp_path / "disk", kilobytes) as disk:
        attempt = training(disk, SAVING_OFTEN)
        status, printed = attempt.run()
        assert status == 2
        require_told(printed, attempt)
        assert not attempt.leftovers()
        attempt.require_whole()
        kept = checkpoint.steps(attempt.checkpoints)
        assert len(kept) == 0 if kilobytes == 150 else 0 < len(kept) < 7
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        assert attempt.run("--resume")[0] == 0
        assert attempt.result() == undisturbed.result()


def test_3_a_file_that_may_not_grow_ends_the_run_and_leaves_the_checkpoint_before(
    training, undisturbed, tmp_path
):
    attempt = training(tmp_path, SAVING_OFTEN)
    assert attempt.run(dies=("metrics.jsonl", 6))[0] == 137
    before = checkpoint.steps(attempt.checkpoints)
    status, printed = attempt.run("--resume", under=("prlimit", f"--fsize={LARGEST_FILE}"))
    assert status == 2
    require_told(printed, attempt)
    assert checkpoint.steps(attempt.checkpoints) == before != []
    attempt.require_whole()
    assert not attempt.leftovers()
    assert attempt.run("--resume")[0] == 0
    assert attempt.result() == undisturbed.result()


def test_3_a_disk_too_small_for_checkpoints_costs_the_run_nothing_else_where_asked(
    training, undisturbed, tmp_path
):
    attempt = training(tmp_path, SAVING_OFTEN)
    assert attempt.run(dies=("metrics.jsonl", 4))[0] == 137
    shutil.rmtree(attempt.checkpoints)
    with small_disk(attempt.checkpoints, 40):
        status, printed = attempt.run("--resume", "--on-save-error", "continue")
        assert status == 0, printed
        told = re.findall(r"going on  no checkpoint of update (\d+) was written", printed)
        assert told == ["2", "4", "6", "8", "10", "12", "14", "15"]
        assert not attempt.leftovers()
        assert checkpoint.steps(attempt.checkpoints) == []
    adapters = (
        each.out / "adapter" / "adapter_model.safetensors" for each in (attempt, undisturbed)
    )
    assert len({path.read_bytes() for path in adapters}) == 1


def in_a_file(attempt):
    attempt.folder.joinpath("run").write_text("in the way")
    return ()


def below_a_file(attempt):
    attempt.folder.joinpath("file").write_text("in the way")
    return ("--out", str(attempt.folder / "file" / "run"))


def in_a_file_system_without_files(attempt):
    return ("--out", "/proc/run")


PLACES = [in_a_file, below_a_file, in_a_file_system_without_files]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_25_a_place_without_room_is_refused_before_anything_is_loaded(training, tmp_path, place):
    attempt = training(tmp_path)
    status, printed = attempt.run(*place(attempt))
    assert status == 2
    assert "training  " not in printed
    assert "Traceback" not in printed
    assert re.search("can't write to|already holds something", printed)


@contextmanager
def immutable(path):
    """Not even the owner of the machine may write to it."""
    if subprocess.run(["chattr", "+i", path], capture_output=True).returncode:
        pytest.skip("no attributes of files may be set here")
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", path], check=True)


@pytest.mark.parametrize("place", ["out", "checkpoints"])
def test_25_a_directory_that_may_not_change_is_refused_before_training(training, tmp_path, place):
    attempt = training(tmp_path, SAVING_OFTEN)
    attempt.out.mkdir()
    more = ()
    if place == "checkpoints":
        assert attempt.run(dies=("metrics.jsonl", 4))[0] == 137
        more = ("--resume",)
    with immutable(getattr(attempt, place)):
        status, printed = attempt.run(*more)
    assert status == 2
    assert f"can't write to {getattr(attempt, place)}" in printed
    assert "first update" not in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("umask", "file", "folder"), [(0o027, 0o640, 0o750), (0o002, 0o664, 0o775)]
)
def test_25_files_have_the_mode_of_the_umask(training, tmp_path, umask, file, folder):
    attempt = training(tmp_path, ("--epochs", "1"))
    assert attempt.run(umask=umask)[0] == 0
    found = [attempt.out, *attempt.out.rglob("*")]
    assert len(found) > 15
    for path in found:
        assert path.stat().st_mode & 0o777 == (folder if path.is_dir() else file), path
