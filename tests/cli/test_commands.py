"""Every command on the tiny model, as a person would call it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml

from interop import torch_io
from lora_jax.cli.main import COMMANDS, main

from chat_rows import write_rows


def test_run_directory_holds_what_a_person_looks_for(trained):
    names = {path.name for path in trained.iterdir()}
    files = {"config.yaml", "metrics.jsonl", "loss.png", "answers.json", ".lock"}
    assert names == {"adapter", "checkpoints", *files}
    files = {path.name for path in (trained / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "manifest.json"}
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_training_learned_its_rows(trained):
    judged = json.loads((trained / "answers.json").read_text())
    assert judged["after"]["loss"] < judged["before"]["loss"] / 2
    metrics = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in metrics] == list(range(1, len(metrics) + 1))
    assert metrics[-1]["loss"] < metrics[0]["loss"] / 2
    assert metrics[0]["learning_rate"] > 0


def test_resolved_config_starts_the_same_run_again(trained, tmp_path):
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert config["lora"]["rank"] == 8
    assert config["model"]["model"] == "tiny"
    again = str(tmp_path / "again")
    words = ["train", "--config", str(trained / "config.yaml"), "--out", again]
    assert main(words) == 0
    first, second = (
        (folder / "adapter" / "adapter_model.safetensors").read_bytes()
        for folder in (trained, tmp_path / "again")
    )
    assert first == second


def test_generate_shows_both_answers(trained, capsys):
    words = ["generate", str(trained), "--prompts", "Who are you?", "--max-new-tokens", "12"]
    assert main(words) == 0
    out = capsys.readouterr().out
    judged = json.loads((trained / "answers.json").read_text())
    assert f"with adapter: {judged['after']['answers'][0]}" in out
    assert "without adapter: " in out


def test_merge_writes_weights_that_compute_the_adapted_function(trained, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    import torch

    merged, base = tmp_path / "merged", tmp_path / "base"
    assert main(["merge", str(trained), str(merged)]) == 0
    assert "lost to rounding" in capsys.readouterr().out
    assert main(["merge", str(trained), str(base), "--base-only"]) == 0
    from peft import PeftModel

    load = transformers.AutoModelForCausalLM.from_pretrained
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        of_merged = load(merged)(tokens).logits
        plain = load(base)
        of_base = plain(tokens).logits
        of_peft = PeftModel.from_pretrained(plain, trained / "adapter")(tokens).logits
    assert (of_merged - of_peft).abs().max() < 1e-4
    assert (of_merged - of_base).abs().max() > 1


def test_verify_agrees_with_torch(trained, capsys):
    pytest.importorskip("peft")
    assert main(["verify", str(trained)]) == 0
    out = capsys.readouterr().out
    assert "verified" in out
    assert "Training side by side" not in out


def test_verify_compares_gradients_and_trains_side_by_side(trained, tmp_path, capsys):
    picture = tmp_path / "training.png"
    words = ["--gradients", "--steps", "3", "--plot", str(picture)]
    assert main(["verify", str(trained), *words]) == 0
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "and so do the gradients of A and B, and so do 3 updates of a training" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


BAD_VERIFYING = {
    "--data, --plot without --steps": ["--data", "a.jsonl", "--plot", "b.png"],
    "--steps is -1, expected 0 or more": ["--steps", "-1"],
    "--batch-size is 0.*--learning-rate is 0.0": ["--batch-size", "0", "--learning-rate", "0"],
    "no rows at nothing.jsonl: give --data": ["--steps", "2", "--data", "nothing.jsonl"],
}


@pytest.mark.parametrize(("message", "words"), BAD_VERIFYING.items(), ids=BAD_VERIFYING)
def test_a_training_that_cannot_be_verified_is_refused_at_once(trained, message, words, capsys):
    assert main(["verify", str(trained), *words]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_verify_fails_on_an_edited_adapter(trained, tmp_path, capsys):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    weights = copy / "adapter" / "adapter_model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-3] ^= 1
    weights.write_bytes(damaged)
    assert main(["verify", str(copy)]) == 2
    assert "adapter_model.safetensors" in capsys.readouterr().err


def test_inspect_data_marks_trained_tokens(tmp_path, capsys):
    data = write_rows(tmp_path / "a.jsonl")
    assert main(["inspect", "data", str(data), "--model", "tiny", "--rows", "1"]) == 0
    assert "⟦I am Ada.<|im_end|>⟧" in capsys.readouterr().out


def test_inspect_plan_lists_adapted_and_frozen_leaves(capsys):
    assert main(["inspect", "plan", "--model", "tiny", "--rank", "2"]) == 0
    out = capsys.readouterr().out
    assert "trainable params: " in out
    assert "frozen: embed_tokens/embedding" in out


def test_bench_flops_is_within_two_percent_of_the_theory():
    from lora_jax.cli.bench_flops import Options
    from lora_jax.cli.flops import step_flops

    counted, parts = step_flops(Options(model="tiny"))
    assert abs(counted / sum(parts.values()) - 1) < 0.02


def test_smollm2_preset_is_what_bench_flops_says_it_is():
    from lora_jax.models.decoder import param_shapes
    from lora_jax.models.presets import PRESETS
    from lora_jax.paths import named_leaves

    leaves = named_leaves(param_shapes(PRESETS["smollm2-135m"])).values()
    assert sum(np.prod(leaf.shape) for leaf in leaves) == 134_515_008


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command, capsys):
    with pytest.raises(SystemExit) as leaving:
        main([*command.split(), "--help"])
    assert leaving.value.code == 0
    assert f"usage: lora-jax {command}" in capsys.readouterr().out


def test_help_is_quick():
    def seconds():
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "lora_jax.cli.main", "--help"], check=True)
        return time.perf_counter() - started

    assert min(seconds() for _ in range(5)) < 0.3


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_checkpoint_and_says_how_to_go_on(tmp_path, signum):
    data = write_rows(tmp_path / "a.jsonl")
    out = tmp_path / "run"
    words = ["train", "--model", "tiny", "--data", str(data), "--out", str(out), "--epochs"]
    words += ["1000000", "--max-length", "64", "--batch-size", "1", "--save-every", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lora_jax.cli.main", *words],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    metrics = out / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size > 2000):
        time.sleep(0.05)
    process.send_signal(signum)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signum
    assert f"--config {out}/config.yaml --out {out} --resume" in "".join(printed.split("\n"))
    updates = len(metrics.read_text().splitlines())
    assert 0 < updates < 1000
    [kept] = (out / "checkpoints").iterdir()
    assert kept.name == f"step-{updates:08d}"
    assert (kept / "adapter" / "adapter_model.safetensors").stat().st_size > 0


def test_training_stops_where_the_loss_is_no_number(tmp_path, capsys):
    data, out = write_rows(tmp_path / "a.jsonl"), tmp_path / "run"
    words = ["train", "--model", "tiny", "--data", str(data), "--out", str(out), "--epochs", "9"]
    words += ["--learning-rate", "1e30", "--clip-norm", "1e30", "--max-faults", "2"]
    assert main(words) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "lower --learning-rate" in printed
    assert "batch 1) was left out: loss nan" in printed
    assert not (out / "adapter").exists()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines[-2:]] == [None, None]
    [kept] = (out / "checkpoints").iterdir()
    adapter = torch_io.read(kept / "adapter" / "adapter_model.safetensors")
    assert all(np.isfinite(tensor).all() for tensor in adapter.values())


def test_bfloat16_run_is_answered_and_merged_in_bfloat16(tmp_path, capsys):
    data, out = write_rows(tmp_path / "a.jsonl"), tmp_path / "run"
    words = ["train", "--model", "tiny", "--data", str(data), "--out", str(out), "--rank", "2"]
    assert main([*words, "--precision", "bfloat16", "--max-new-tokens", "4"]) == 0
    assert main(["generate", str(out), "--prompts", "Hi", "--max-new-tokens", "4"]) == 0
    assert main(["merge", str(out), str(tmp_path / "merged")]) == 0
    assert "bfloat16 weights" in capsys.readouterr().out
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


def test_rows_that_are_too_long_are_counted(tmp_path, capsys):
    rows = [("Hi", "Hello"), ("Hi", "word " * 60)]
    data, out = write_rows(tmp_path / "a.jsonl", rows), tmp_path / "run"
    words = ["train", "--model", "tiny", "--data", str(data), "--out", str(out), "--rank", "2"]
    words += ["--max-length", "64", "--truncate", "drop", "--epochs", "1", "--max-new-tokens", "2"]
    assert main(words) == 0
    assert "1 rows left out, 0 cut, 0 split at 64 tokens" in capsys.readouterr().out


def test_plain_text_in_buckets_trains_without_a_question(tmp_path, capsys):
    data = tmp_path / "text.jsonl"
    texts = ["Plain text.", "A longer line of plain text that needs a longer sequence.", "Short."]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = ["train", "--model", "tiny", "--data", str(data), "--out", str(tmp_path / "run")]
    assert main([*words, "--packing", "buckets", "--batch-size", "1", "--epochs", "6"]) == 0
    printed = capsys.readouterr().out
    assert "GFLOP an update" in printed
    assert "┃ prompt" not in printed
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_evaluations_are_logged_with_how_far_each_weight_moved(tmp_path):
    data = write_rows(tmp_path / "a.jsonl")
    out = tmp_path / "run"
    words = ["train", "--model", "tiny", "--data", str(data), "--heldout", str(data), "--out"]
    words += [str(out), "--epochs", "8", "--eval-every", "2", "--keep-best", "--sample-every", "4"]
    words += ["--log-to"]
    assert main([*words, "tensorboard", "--max-new-tokens", "2"]) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    evaluated = [line for line in lines if "heldout_loss" in line]
    assert [line["step"] for line in evaluated][:2] == [2, 4]
    norms = [line["delta_norm/layers/mlp/up_proj/kernel"] for line in evaluated]
    assert 0 < norms[0] < norms[-1]
    assert list((out / "tensorboard").iterdir())
    samples = [json.loads(line) for line in (out / "samples.jsonl").open()]
    assert {sample["step"] for sample in samples} == {4, 8}
    assert "Who are you?" in {sample["prompt"] for sample in samples}


@pytest.mark.slow
def test_two_processes_write_one_run_and_learn_the_same(tmp_path):
    data = write_rows(tmp_path / "a.jsonl", [(f"What is {i}?", f"It is {i}.") for i in range(8)])
    fixed = ["train", "--model", "tiny", "--data", str(data), "--batch-size", "1", "--epochs", "2"]
    fixed += ["--max-length", "64", "--max-new-tokens", "2"]
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert main([*fixed, "--out", str(alone), "--accumulate", "4"]) == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    cluster = ["--placement", "mesh", "--mesh-fsdp", "2", "--distributed", "--coordinator", address]
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-m", "lora_jax.cli.main", *fixed, "--out", str(together), *cluster]
    processes = [
        subprocess.Popen(
            [*command, "--num-processes", "2", "--process-id", str(number)], env=environment
        )
        for number in range(2)
    ]
    assert [process.wait(240) for process in processes] == [0, 0]
    losses = [
        [json.loads(line)["loss"] for line in (out / "metrics.jsonl").open()]
        for out in (alone, together)
    ]
    np.testing.assert_allclose(*losses, atol=1e-5)
