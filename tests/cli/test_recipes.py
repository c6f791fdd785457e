"""Presets of ``lora-jax train``, and the tutorials' counts as ``inspect plan`` prints them."""

import dataclasses
import json
import re

import pytest
import torch
import transformers
from torch import nn

from lora_jax.cli import inspect_plan, train
from lora_jax.cli.main import main
from lora_jax.cli.parsing import as_yaml, parse
from lora_jax.cli.recipes import RECIPES, options_of
from lora_jax.errors import InputError

NEEDED = ["--data", "rows.jsonl", "--out", "run"]


def parsed(*words):
    return parse(train.Options, [*NEEDED, *words], "train", None)


def values(options, group):
    """Of a group, with lists for tuples, as a recipe has them."""
    found = dataclasses.asdict(getattr(options, group))
    return {name: list(v) if isinstance(v, tuple) else v for name, v in found.items()}


@pytest.mark.parametrize("name", [name for name, r in RECIPES.items() if not r.alpha_per_rank])
def test_a_preset_says_what_its_row_says_and_nothing_else(name):
    found, plain = parsed("--preset", name), parsed()
    for group in ("lora", "optim", "data", "model", "run"):
        wanted = values(plain, group) | RECIPES[name].options.get(group, {})
        assert values(found, group) == wanted
    assert RECIPES[name].source
    assert found != plain


def test_flags_win_over_the_file_and_the_file_over_presets(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("preset: [minimind]\nlora: {rank: 4}\n")
    found = parsed("--config", str(config), "--alpha", "2")
    assert (found.lora.rank, found.lora.alpha, found.lora.init_std) == (4, 2.0, 0.02)
    again = tmp_path / "again.yaml"
    again.write_text(as_yaml(found))
    assert "preset" not in again.read_text()
    resolved = parse(train.Options, ["--config", str(again)], "train", None)
    assert dataclasses.replace(found, config=None, preset=()) == dataclasses.replace(
        resolved, config=None
    )
    other = parsed(
        "--config", str(config), "--preset", "generation-large", "attention", "--seed", "3"
    )
    assert (other.lora.rank, other.lora.alpha) == (4, 128.0)
    assert other.lora.targets == tuple(RECIPES["attention"].options["lora"]["targets"])
    assert other.data.seed == 3


def test_presets_together():
    assert options_of(["opt-350m", "all", "conservative"])["lora"] == {
        "rank": 8,
        "alpha": 8.0,
        "dropout": 0.1,
        "targets": RECIPES["all"].options["lora"]["targets"],
    }
    with pytest.raises(
        InputError, match=r"aggressive sets alpha by the rank .*--preset generation"
    ):
        options_of(["aggressive"])
    with pytest.raises(InputError, match=r"no preset 'minimnd' .*minimind.*, 'e3e'"):
        options_of(["minimnd", "e3e"])


def test_help_lists_every_preset(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    printed = capsys.readouterr().out
    assert all(f"- {name}: {recipe.about}" in printed for name, recipe in RECIPES.items())


# Counts

FIRST = {"model_type": "minimind", "dim": 512, "n_layers": 2, "max_seq_len": 512}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


def shapes(module):
    return {name: list(parameter.shape) for name, parameter in module.named_parameters()}


def opt_350m():
    config = transformers.OPTConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        ffn_dim=4096,
        num_attention_heads=16,
        word_embed_proj_dim=512,
        do_layer_norm_before=False,
    )
    with torch.device("meta"):
        return shapes(transformers.OPTForCausalLM(config))


def simple_transformer():
    ends = {f"{name}_proj": nn.Linear(768, 768) for name in "qkvo"}
    ffn = nn.Sequential(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768))
    return shapes(nn.ModuleDict({"layer": nn.ModuleDict({**ends, "ffn": ffn})}))


def one_layer():
    return shapes(nn.ModuleDict({"linear": nn.Linear(768, 768)}))


EVERY = ("--targets", ".*weight")
COUNTS = {
    "minimind": (FIRST, ("--preset", "minimind"), 65_536, 8_980_992, "0.7297"),
    "with experts": (
        {**FIRST, "use_moe": True}, ("--preset", "minimind"), 65_536, 26_286_592, "0.2493",
    ),
    "current": (
        {"model_type": "minimind"}, ("--preset", "minimind"), 393_216, 64_305_408, "0.6115",
    ),
    "opt-350m": (opt_350m, ("--preset", "opt-350m"), 786_432, 331_982_848, "0.2369"),
    "simple": (simple_transformer, ("--preset", "simple"), 24_576, 7_109_376, "0.3457"),
    "one layer": (one_layer, ("--preset", "simple", *EVERY), 12_288, 602_880, "2.0382"),
    # what a tutorial prints for another model and rank
    "llama-7b": (
        LLAMA, ("--preset", "query-value", "--rank", "8"), 4_194_304, 6_742_609_920, "0.0622",
    ),
}  # fmt: skip


def printed_totals(model, words, tmp_path, capsys):
    path = tmp_path / "model.json"
    path.write_text(json.dumps(model() if callable(model) else model))
    assert main(["inspect", "plan", "--model", str(path), *words]) == 0
    printed = capsys.readouterr().out
    numbers = re.search(r"params: (.*) \|\| all params: (.*) \|\| trainable%: (.*)", printed)
    trained, total = (int(numbers[place].replace(",", "")) for place in (1, 2))
    return trained, total, numbers[3].strip()


@pytest.mark.parametrize(
    ("model", "words", "trained", "total", "percent"), COUNTS.values(), ids=COUNTS
)
def test_counts_of_the_tutorials(model, words, trained, total, percent, tmp_path, capsys):
    assert printed_totals(model, words, tmp_path, capsys) == (trained, total, percent)


@pytest.mark.parametrize(
    ("rank", "percent"), [(4, 0.20), (8, 0.39), (16, 0.78), (32, 1.56), (64, 3.12)]
)
def test_shares_of_a_matrix_of_4096(rank, percent, tmp_path, capsys):
    words = ("--rank", str(rank), *EVERY)
    trained, total, _ = printed_totals({"w.weight": [4096, 4096]}, words, tmp_path, capsys)
    assert trained == 2 * 4096 * rank
    assert abs(100 * trained / (total - trained) - percent) <= 0.00501


def test_shapes_that_are_none_are_named(tmp_path):
    path = tmp_path / "shapes.json"
    path.write_text('{"a.weight": [4, -1], "b.weight": [2, 3], "c": ["x"]}')
    options = parse(inspect_plan.Options, ["--model", str(path), *EVERY], "plan", None)
    with pytest.raises(InputError, match=r"shapes\.json: no shapes in a\.weight, c$"):
        inspect_plan.run(options)
