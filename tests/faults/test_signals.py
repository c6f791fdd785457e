"""Row 12 of the fault matrix: Ctrl-C and SIGTERM, in an update and in the middle of a save.

The first is a request: the update and the save are finished, the state is saved, and the command
that goes on is printed. The second is obeyed at once, and costs no more than kill -9 does.
"""

import os
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.slow

OPTIONS = ("--epochs", "3", "--accumulate", "2", "--learning-rate", "0.01")
SLOW_DISK = """
import os, sys, time
fsync = os.fsync
def slow(handle):
    if "checkpoints" in os.readlink(f"/proc/self/fd/{handle}"):
        time.sleep(SECONDS)
    fsync(handle)
os.fsync = slow
from lora_jax.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def undisturbed(training, tmp_path_factory):
    whole = training(tmp_path_factory.mktemp("whole"), OPTIONS)
    assert whole.run("--save-every", "4")[0] == 0
    return whole


def start_on_a_slow_disk(attempt, seconds):
    program = SLOW_DISK.replace("SECONDS", str(seconds))
    command = [sys.executable, "-c", program, *attempt.words("--save-every", "4")]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ
    )


def wait_for_an_update(attempt, process):
    while process.poll() is None and len(attempt.metrics()) < 3:
        time.sleep(0.002)


def wait_for_a_save(attempt, process):
    while process.poll() is None and not any(attempt.checkpoints.glob(".step-*")):
        time.sleep(0.002)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", [wait_for_an_update, wait_for_a_save])
def test_12_the_first_signal_finishes_saves_and_says_how_to_go_on(
    training, undisturbed, tmp_path, signum, moment
):
    attempt = training(tmp_path, OPTIONS)
    process = start_on_a_slow_disk(attempt, 0.05)
    moment(attempt, process)
    process.send_signal(signum)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + signum, printed
    hint = f"--config {attempt.out}/config.yaml --out {attempt.out} --resume"
    assert hint in "".join(printed.split("\n"))
    assert not attempt.leftovers()
    attempt.require_whole()
    assert attempt.run("--save-every", "4", "--resume")[0] == 0
    assert attempt.result() == undisturbed.result()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_12_the_second_signal_is_obeyed_at_once(training, undisturbed, tmp_path, signum):
    attempt = training(tmp_path, OPTIONS)
    process = start_on_a_slow_disk(attempt, 600)
    wait_for_a_save(attempt, process)
    process.send_signal(signum)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
    assert attempt.leftovers()
    status, printed = attempt.run("--save-every", "4", "--resume")
    assert status == 0, printed
    assert "removed   " in printed
    assert attempt.result() == undisturbed.result()
