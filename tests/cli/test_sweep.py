"""``lora-jax sweep`` on the tiny model, as a person would call it."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml

from interop import torch_io
from lora_jax.cli.main import main

from chat_rows import ROWS, write_rows

SETTINGS = ["--epochs", "10", "--batch-size", "1", "--max-length", "64", "--dropout", "0.1"]
GRID = ["--learning-rates", "1e-3", "5e-3", "--ranks", "2", "4", "--alphas", "4", "16"]


def command(*words):
    return [sys.executable, "-m", "lora_jax.cli.main", *map(str, words)]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The directory of a sweep over two of everything, and what it printed."""
    folder = tmp_path_factory.mktemp("sweeps")
    data, heldout = write_rows(folder / "a.jsonl"), write_rows(folder / "b.jsonl", ROWS[:1])
    words = ["sweep", "--model", "tiny", "--data", data, "--heldout", heldout]
    words += ["--out", folder / "out", *SETTINGS, *GRID, "--seeds", "0", "1"]
    words = list(map(str, words))
    code = f"import sys; from lora_jax.cli.main import main; status = main({words}); "
    code += "print('torch:', 'torch' in sys.modules); sys.exit(status)"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    return folder / "out", done.stdout


def adapters_of(report):
    return json.loads(report.read_text())["adapters"]


def test_the_directory_holds_a_run_for_each_setting_a_picture_and_a_report(swept):
    out, printed = swept
    grid = itertools.product((0.001, 0.005), (2, 4), (4, 16), (0, 1))
    names = {"lr{}-rank{}-alpha{}-seed{}".format(*setting): setting for setting in grid}
    assert {path.name for path in out.iterdir()} == {*names, "sweep.json", "sweep.png"}
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    for name, (_, rank, alpha, _) in names.items():
        config = json.loads((out / name / "adapter" / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (rank, alpha)
    assert "torch: False" in printed


def test_the_table_and_the_report_have_the_best_first(swept):
    out, printed = swept
    report = json.loads((out / "sweep.json").read_text())
    assert report["ranked_by"] == "heldout_loss"
    losses = [each["heldout_loss"] for each in report["adapters"]]
    assert losses == sorted(losses)
    assert losses[0] < losses[-1] / 2
    curves = np.array([each["losses"] for each in report["adapters"]])
    assert curves.shape == (16, 30)
    assert np.ptp(curves[:, 0]) < 1e-5
    assert all(np.abs(a - b).max() > 1e-3 for a, b in itertools.combinations(curves, 2))
    for each in report["adapters"]:
        assert each["training_loss"] == pytest.approx(np.mean(each["losses"][-3:]), rel=0.3)
    row = r"│ ([\d.]+) +│ (\d) +│ (\d+) +│ (\d) +│ [\d.]+ +│ ([\d.]+) "
    rows = [tuple(map(float, cells)) for cells in re.findall(row, printed)]
    best, columns = report["adapters"][0], ("learning_rate", "rank", "alpha", "seed")
    assert [loss for *_, loss in rows] == [round(loss, 4) for loss in losses]
    assert rows[0][:4] == tuple(best[column] for column in columns)
    assert f"best      {best['name']}" in printed


@pytest.mark.slow
def test_an_adapter_of_the_sweep_is_what_train_makes_of_its_config(swept, tmp_path):
    out, _ = swept
    best, *others = (each for each in adapters_of(out / "sweep.json") if each["seed"] == 0)
    run = tmp_path / "run"
    config = out / best["name"] / "config.yaml"
    words = ["--save-every", "0", "--max-new-tokens", "2"]
    assert main(["train", "--config", str(config), "--out", str(run), *words]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = np.array([line["loss"] for line in lines if "loss" in line])
    np.testing.assert_allclose(best["losses"], losses, atol=1e-5, rtol=0)
    assert np.abs(np.array(others[0]["losses"]) - losses).max() > 0.1
    judged = json.loads((run / "answers.json").read_text())
    assert abs(judged["after"]["loss"] - best["heldout_loss"]) < 1e-5
    folders = run / "adapter", out / best["name"] / "adapter"
    alone, swept_one = (torch_io.read(each / "adapter_model.safetensors") for each in folders)
    assert alone.keys() == swept_one.keys()
    assert max(np.abs(alone[name] - swept_one[name]).max() for name in alone) < 1e-5
    one, other = ((each / "adapter_config.json").read_text() for each in folders)
    assert one == other


def test_other_commands_read_an_adapter_of_the_sweep(swept, capsys):
    out, _ = swept
    run = out / adapters_of(out / "sweep.json")[0]["name"]
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["model"] == "tiny"
    assert main(["generate", str(run), "--prompts", "Hi", "--max-new-tokens", "2"]) == 0
    assert "with adapter: " in capsys.readouterr().out


def test_where_no_loss_is_a_number_the_status_says_so(tmp_path, capsys):
    data, out = write_rows(tmp_path / "a.jsonl"), tmp_path / "out"
    words = ["sweep", "--model", "tiny", "--data", str(data), "--out", str(out), *SETTINGS]
    assert main([*words, "--learning-rates", "1e30", "1e31", "--clip-norm", "1e30"]) == 1
    assert json.loads((out / "sweep.json").read_text())["ranked_by"] == "training_loss"
    report = adapters_of(out / "sweep.json")
    assert [each["training_loss"] for each in report] == [None, None]
    assert all(each["updates_left_out"] > 20 for each in report)
    assert "left out" in capsys.readouterr().out
    for each in report:
        adapter = torch_io.read(out / each["name"] / "adapter" / "adapter_model.safetensors")
        assert all(np.isfinite(tensor).all() for tensor in adapter.values())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--learning-rates", "1e-4", "0.0001"], "learning_rates has 0.0001 2 times"),
        (["--ranks", "0", "4"], "ranks has 0, expected between 1 and inf"),
        (["--seeds", "-1", "--alphas", "0"], "alphas has 0.0, expected between 1e-12 and inf; se"),
        (["--learning-rates", "inf"], "learning_rates has inf"),
        (["--clip-norm", "0"], "clip_norm is 0"),
        (["--targets", "("], "'(' is not a regular expression"),
        (["--model", "tiny", "--ranks", "4", "4000"], "rank 4000, more than"),
        (["--model", "tiny", "--targets", "nothing"], "'nothing'"),
        (["--model", "tiny", "--warmup", "1000"], "warmup is 1000"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained(tmp_path, capsys, words, expected):
    data, out = write_rows(tmp_path / "a.jsonl"), tmp_path / "out"
    given = ["sweep", "--data", str(data), "--out", str(out), *words]
    assert main([*given, *([] if "--model" in words else ["--model", "/no/model"])]) == 2
    assert expected in capsys.readouterr().err
    assert not out.exists()


def test_a_directory_that_holds_something_is_left_alone(tmp_path, capsys):
    data = write_rows(tmp_path / "a.jsonl")
    words = ["sweep", "--model", "tiny", "--data", str(data), "--out", str(tmp_path)]
    assert main(words) == 2
    assert "already holds something" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.slow
def test_a_signal_ends_the_sweep_with_what_was_trained(tmp_path):
    data, out = write_rows(tmp_path / "a.jsonl"), tmp_path / "out"
    words = ["sweep", "--model", "tiny", "--data", data, "--out", out, *SETTINGS, *GRID]
    process = subprocess.Popen(
        command(*words, "--epochs", "1000000"), stdout=subprocess.PIPE, text=True, env=os.environ
    )
    for line in process.stdout:
        if line.startswith("first update"):
            break
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    done = int(re.findall(r"stopped   after (\d+) of 3000000 updates", printed)[0])
    report = adapters_of(out / "sweep.json")
    assert [len(each["losses"]) for each in report] == [done] * 8
    adapter = out / report[0]["name"] / "adapter" / "adapter_model.safetensors"
    assert any(tensor.any() for name, tensor in torch_io.read(adapter).items() if "lora_B" in name)


@pytest.mark.slow
def test_eight_adapters_take_at_most_three_fifths_of_eight_runs(tmp_path):
    data = write_rows(tmp_path / "a.jsonl")
    shared = ["--model", "tiny", "--data", data, *SETTINGS]
    rates = [f"{k}e-4" for k in range(1, 9)]

    def seconds(*words):
        started = time.perf_counter()
        subprocess.run(command(*words), check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - started

    at_once = seconds("sweep", *shared, "--out", tmp_path / "out", "--learning-rates", *rates)
    one_by_one = sum(
        seconds("train", *shared, "--out", tmp_path / rate, "--learning-rate", rate)
        for rate in rates
    )
    assert at_once <= 0.6 * one_by_one
