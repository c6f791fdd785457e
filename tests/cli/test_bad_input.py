"""Bad input: one line that names the offender and the remedy, status 2, nothing written."""

import json
import os
import subprocess
import sys

import gguf
import numpy as np
import pytest

from lora_jax.cli.main import main

from chat_rows import write_rows


def row(role="assistant", **more):
    messages = [{"role": "user", "content": "Hi"}, {"role": role, "content": "Hello"}]
    return {"messages": messages, **more}


def cut_gguf(folder):
    writer = gguf.GGUFWriter(folder / "cut.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content = (folder / "cut.gguf").read_bytes()
    (folder / "cut.gguf").write_bytes(content[:-100])


def other_architecture(folder):
    (folder / "other").mkdir()
    attributes = {"model_type": "mamba", "hidden_size": 8, "state_size": 16}
    (folder / "other" / "config.json").write_text(json.dumps(attributes))


def lines(*texts):
    return lambda folder: (folder / "rows.jsonl").write_text("\n".join(texts) + "\n")


def config_of(text):
    return lambda folder: (folder / "config.yaml").write_text(text)


def long_rows(folder):
    write_rows(folder / "rows.jsonl", [("Hi", "Hello"), ("Hi", "word " * 60)])


def config_with_typo(folder):
    (folder / "config.yaml").write_text("lora:\n  rnak: 4\n")


def earlier_run(folder):
    (folder / "out").mkdir()
    (folder / "out" / "config.yaml").write_text("model: {}\n")


GOOD = json.dumps(row())
CASES = {
    "model that isn't there": (["--model", "no-such"], None, ["'no-such'", "smollm2-135m, tiny"]),
    "near miss of an alias": (["--model", "smollm2"], None, ["did you mean smollm2-135m?"]),
    "GGUF cut short": (["--model", "cut.gguf"], cut_gguf, ["cut.gguf", "bytes"]),
    "other architecture": (["--model", "other"], other_architecture, ["model_type", "mamba"]),
    "not JSON": ([], lines(GOOD, "{nope"), ["rows.jsonl:2"]),
    "no messages": ([], lines(GOOD, '{"text": "a"}'), ["rows.jsonl:2", "messages"]),
    "unknown role": ([], lines(json.dumps(row("robot"))), ["rows.jsonl:1", "robot"]),
    "no data file": (["--data", "absent.jsonl"], None, ["absent.jsonl"]),
    "rows too long": (["--max-length", "64"], long_rows, ["rows.jsonl:2", "--truncate"]),
    "no trained token": (
        ["--max-length", "20", "--truncate", "end"], lines(GOOD), ["no row of", "--max-length"]),
    "longer than the model": (["--max-length", "4096"], None, ["512 positions", "--max-length"]),
    "no such target": (
        ["--targets", ".*q_porj/kernel"], None, ["q_porj", "layers/self_attn/q_proj/kernel"]),
    "unknown config key": (
        ["--config", "config.yaml"], config_with_typo, ["lora.rnak", "lora.rank"],
    ),
    "a config key that stands twice": (
        ["--config", "config.yaml"], config_of("lora:\n  rank: 2\n  rank: 3\n"),
        ["rank stands twice", "line 2"],
    ),
    "a config nested too deeply": (
        ["--config", "config.yaml"], config_of("[" * 9999), ["config.yaml"]),
    "a config key without a value": (
        ["--config", "config.yaml"], config_of("lora:\n  rank: {}\n"), ["--rank is an empty"]),
    "a spread for another initialiser": (["--init-std", "0.1"], None, ["only gaussian has one"]),
    "a rule of another kind of schedule": (
        ["--schedule", "minimind"], None, ["'minimind' has no warm-up"]),
    "evaluation without rows for it": (["--eval-every", "2"], None, ["give --heldout"]),
    "directory of another run": ([], earlier_run, ["out already holds something", "new directory"]),
    "no permission to write": (["--out", "/proc/run"], None, ["can't write to /proc"]),
    "rank of zero": (["--rank", "0"], None, ["an integer of at least 1", "got 0"]),
    "rates out of range": (
        ["--warmup", "-1", "--clip-norm", "-1"], None, ["warmup is -1", "clip_norm is -1"]),
    "negative seed": (["--seed", "-1"], None, ["seed is -1"]),
    "no epochs": (["--epochs", "0"], None, ["epochs is 0"]),
}  # fmt: skip


@pytest.mark.parametrize(("words", "prepare", "texts"), CASES.values(), ids=CASES)
def test_bad_input(words, prepare, texts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl")
    if prepare:
        prepare(tmp_path)
    before = snapshot(tmp_path)
    usual = ["--model", "tiny", "--data", "rows.jsonl", "--out", "out"]
    assert main(["train", *usual, *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lora-jax train: ")
    for text in texts:
        assert text in error
    assert "Traceback" not in error
    assert snapshot(tmp_path) == before


def test_unknown_flag_and_command(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["train", "--rnak", "3"])
    assert leaving.value.code == 2
    assert main(["tarin"]) == 2
    assert "no command 'tarin'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "verify", "merge"])
def test_commands_on_something_that_is_no_run(command, tmp_path, capsys):
    out = [str(tmp_path / "merged")] if command == "merge" else []
    assert main([command, str(tmp_path / "nothing"), *out]) == 2
    assert "is no run and no adapter" in capsys.readouterr().err


def test_adapter_on_another_base_is_refused(trained, tmp_path, capsys):
    other = tmp_path / "other"
    assert main(["merge", str(trained), str(other)]) == 0
    assert main(["generate", str(trained), "--model", str(other), "--prompts", "Hi"]) == 2
    assert "was trained on another base" in capsys.readouterr().err


def snapshot(folder):
    return {
        os.path.join(root, name): os.path.getmtime(os.path.join(root, name))
        for root, _, names in os.walk(folder)
        for name in names
    }


def test_train_without_arguments_says_what_it_needs(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["train"])
    assert leaving.value.code == 2
    assert "--data" in capsys.readouterr().err


def test_flags_hidden_in_a_config_file_are_refused(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text('prompts: ["--rank", "3"]\n')
    out = ["--out", str(tmp_path / "out")]
    assert main(["train", "--config", str(tmp_path / "config.yaml"), *out]) == 2
    assert "--rank" in capsys.readouterr().err


def test_cache_directory_that_cannot_be_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LORA_JAX_CACHE", "/proc/nope")
    data, out = write_rows(tmp_path / "rows.jsonl"), tmp_path / "out"
    assert main(["train", "--model", "tiny", "--data", str(data), "--out", str(out)]) == 2
    assert "LORA_JAX_CACHE" in capsys.readouterr().err
    assert not out.exists()


LONG = "x" * 300


@pytest.mark.parametrize(
    "words", [["inspect", LONG], ["diff", LONG, "."], ["import", ".", LONG], ["export", LONG, "x"]]
)
def test_what_the_system_says_of_a_path_is_no_traceback(words, capsys):
    assert main(words) == 2
    assert "File name too long" in capsys.readouterr().err


@pytest.mark.parametrize(("out", "status", "said"), [("pipe", 141, ""), ("/dev/full", 2, "space")])
def test_output_that_nobody_takes_is_no_traceback(out, status, said):
    command = [sys.executable, "-m", "lora_jax.cli.main", "--help"]
    if out == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(out, os.O_WRONLY)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, len(done.stderr.splitlines())) == (status, bool(said))
    assert said in done.stderr
