"""Variants of LoRA from the command line, as far as PEFT's logits."""

import json

import jax
import numpy as np
import pytest
from rich.console import Console

import lora_jax as lora
from lora_jax.cli.base import load_base, read_adapter
from lora_jax.cli.main import main

from chat_rows import write_rows


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dora")
    data = write_rows(folder / "rows.jsonl")
    words = ["train", "--model", "tiny", "--data", data, "--out", folder / "run"]
    words += ["--variant", "dora", "--rank", "4", "--epochs", "10", "--batch-size", "1"]
    words += ["--max-length", "128", "--learning-rate", "0.02", "--max-new-tokens", "2"]
    assert main(list(map(str, words))) == 0
    return folder / "run"


def test_dora_is_in_the_adapter(run):
    config = json.loads(next(run.rglob("adapter_config.json")).read_text())
    assert config["use_dora"] is True


def test_peft_computes_what_was_trained(run, capsys):
    pytest.importorskip("peft")
    assert main(["verify", str(run)]) == 0


def test_magnitudes_were_trained(run):
    """So that what PEFT agrees with is not plain LoRA."""
    base = load_base("tiny", "float32", Console(quiet=True))
    directory = next(run.rglob("adapter_config.json")).parent
    adapter, plan = read_adapter(directory, base)
    fresh = lora.init(jax.random.key(0), base.params, plan)
    moved = {path: np.abs(adapter[path].m - fresh[path].m).max() for path in plan}
    assert {site.variant for site in plan.sites} == {"dora"}
    assert min(moved.values()) > 1e-3


def test_another_variant_is_refused(tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl")
    words = ["train", "--model", "tiny", "--data", data, "--out", tmp_path / "run"]
    with pytest.raises(SystemExit):
        main(list(map(str, [*words, "--variant", "full"])))
    assert not (tmp_path / "run").exists()
