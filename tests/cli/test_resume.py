"""A run that was stopped goes on as if it had not been: the same bits, or a refusal."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from interop import torch_io
from lora_jax.cli.main import main
from lora_jax.train import checkpoint

from chat_rows import write_rows

ROWS = [(f"What is {i}?", f"It is {i * 7 % 11}.") for i in range(9)]


def words(folder, out, *more):
    data = folder / "a.jsonl"
    if not data.exists():
        write_rows(data, ROWS)
    fixed = ["--epochs", "4", "--max-length", "64", "--batch-size", "1", "--accumulate", "2"]
    fixed += ["--rank", "2", "--max-new-tokens", "2", "--save-every", "4", "--dropout", "0.1"]
    return ["train", "--model", "tiny", "--data", str(data), "--out", str(out), *fixed, *more]


def adapter_bytes(out):
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


def log(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    clocks = ("seconds", "tokens_per_second", "positions_per_second", "flops_per_second")
    return [{k: v for k, v in line.items() if k not in clocks} for line in lines]


def state(out):
    newest = checkpoint.latest(out / "checkpoints")
    return newest.step, {
        str(path.relative_to(newest.directory)): path.read_bytes()
        for path in sorted((newest.directory / "adapter").rglob("*"))
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert finish(words(folder, folder / "run")) == 0
    return folder


def start(arguments):
    command = [sys.executable, "-m", "lora_jax.cli.main", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)


def finish(arguments):
    """In a process of its own: bits are equal for one program on one number of devices."""
    process = start(arguments)
    process.communicate()
    return process.returncode


def wait_for_updates(out, count, process):
    metrics = out / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and len(metrics.read_bytes().splitlines()) >= count:
            return
        time.sleep(0.002)


def test_killed_and_resumed_gives_the_same_bits(whole, tmp_path):
    out = tmp_path / "run"
    (tmp_path / "a.jsonl").write_bytes((whole / "a.jsonl").read_bytes())
    for attempt, updates in enumerate((6, 11)):
        process = start(words(tmp_path, out, *(["--resume"] if attempt else [])))
        wait_for_updates(out, updates, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert finish(words(tmp_path, out, "--resume")) == 0
    assert adapter_bytes(out) == adapter_bytes(whole / "run")
    assert log(out) == log(whole / "run")
    assert state(out) == state(whole / "run")


def test_stopped_by_a_signal_and_resumed_gives_the_same_bits(whole, tmp_path):
    out = tmp_path / "run"
    (tmp_path / "a.jsonl").write_bytes((whole / "a.jsonl").read_bytes())
    process = start(words(tmp_path, out))
    wait_for_updates(out, 5, process)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode in (0, 143)
    assert finish(words(tmp_path, out, "--resume")) == 0
    assert adapter_bytes(out) == adapter_bytes(whole / "run")
    assert log(out) == log(whole / "run")


def test_a_finished_run_resumed_changes_nothing(whole):
    before = adapter_bytes(whole / "run"), log(whole / "run"), state(whole / "run")
    assert main(words(whole, whole / "run", "--resume")) == 0
    assert (adapter_bytes(whole / "run"), log(whole / "run"), state(whole / "run")) == before


REFUSED = {
    "a rank": (["--rank", "3"], "lora.rank was 2, is 3"),
    "a learning rate": (["--learning-rate", "0.1"], "optim.learning_rate was 0.0005, is 0.1"),
    "epochs": (["--epochs", "5"], "data.epochs was 4, is 5"),
    "a seed": (["--seed", "1"], "digest of the rows was"),
}


@pytest.mark.parametrize(("more", "text"), REFUSED.values(), ids=REFUSED)
def test_what_decides_a_run_may_not_change(whole, more, text, capsys):
    before = adapter_bytes(whole / "run")
    arguments = [word for word in words(whole, whole / "run", "--resume")]
    if more[0] in arguments:
        arguments[arguments.index(more[0]) + 1] = more[1]
    else:
        arguments += more
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert text in told
    assert "--force" in told
    assert adapter_bytes(whole / "run") == before


def test_changed_rows_are_refused(whole, tmp_path, capsys):
    write_rows(tmp_path / "a.jsonl", [*ROWS[:-1], ("What is 8?", "Something else.")])
    arguments = words(tmp_path, whole / "run", "--resume")
    assert main(arguments) == 2
    assert "digest of the rows was" in capsys.readouterr().err


def test_a_flipped_bit_in_the_newest_checkpoint_is_found(whole, tmp_path, capsys):
    import shutil

    shutil.copytree(whole / "run", tmp_path / "run")
    newest = checkpoint.latest(tmp_path / "run" / "checkpoints").directory
    largest = max(newest.rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 4
    largest.write_bytes(content)
    assert main(words(whole, tmp_path / "run", "--resume")) == 2
    told = capsys.readouterr().err
    assert largest.name in told
    assert "to resume from update" in told


def test_two_writers_of_one_run_are_refused(tmp_path, capsys):
    out = tmp_path / "run"
    process = start([*words(tmp_path, out), "--epochs", "100000"])
    wait_for_updates(out, 1, process)
    assert main(words(tmp_path, out, "--resume")) == 2
    assert f"is in use by process {process.pid}" in capsys.readouterr().err
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_directory_without_a_run_is_no_run_to_resume(tmp_path, capsys):
    assert main(words(tmp_path, tmp_path / "none", "--resume")) == 2
    assert "is no run to resume" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_the_adapter_of_a_checkpoint_is_a_peft_directory(whole):
    newest = checkpoint.latest(whole / "run" / "checkpoints").directory
    tensors = torch_io.read(newest / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 7


def test_the_best_is_chosen_among_the_checkpoints_that_there_are(tmp_path, capsys):
    """--keep-best that comes with --resume finds no checkpoint of an earlier, lower loss."""
    out = tmp_path / "run"
    heldout = write_rows(tmp_path / "b.jsonl", [(q, "Nobody knows.") for q, _ in ROWS[:3]])
    more = ["--heldout", str(heldout), "--eval-every", "1", "--save-every", "0"]
    more += ["--schedule", "constant", "--warmup", "0", "--learning-rate", "0.05"]
    assert main(words(tmp_path, out, *more)) == 0
    [saved] = checkpoint.steps(out / "checkpoints")
    losses = {line["step"]: line["heldout_loss"] for line in log(out) if line.get("heldout_loss")}
    assert min(losses, key=losses.__getitem__) < saved
    assert main(words(tmp_path, out, *more, "--resume", "--keep-best")) == 0
    chosen = json.loads((out / "answers.json").read_text())["after"]["loss"]
    assert chosen == pytest.approx(losses[saved], abs=1e-6)
    assert "chosen    the adapter" not in capsys.readouterr().out
