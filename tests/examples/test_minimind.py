"""The MiniMind example against torch: its model, its rows, both modes of training, the run."""

import doctest
from itertools import pairwise
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from interop import hf, torch_io, torch_lora, torch_training
from lora_jax.data.chat import encode_chat
from lora_jax.errors import InputError

import minimind_modes
import minimind_rows
import three_stages
from minimind_adapter import adapted_model, apply_lora, check_merge
from minimind_modes import MODES
from minimind_options import Options, model_config, schooling_of
from minimind_rows import encoded, first_rows
from minimind_sides import close, options, started, torch_model
from minimind_torch import loader, notebook_loss, right_loss
from minimind_training import fresh_params, model_function, train

EXAMPLE = Path(three_stages.__file__).parent


# The model


def test_the_model_is_minimind_and_llama(tmp_path):
    start = started(options(), tmp_path, spread=0.1)
    tokens = np.random.default_rng(0).integers(0, 700, (2, 40))
    ours = model_function(start.config)(start.params, tokens)[0]
    with torch.no_grad():
        bare = torch_model(start.config, start.params)(torch.from_numpy(tokens))
        llama = hf.to_transformers(start.config, start.params)
        assert type(llama).__name__ == "LlamaForCausalLM"
        close(ours, bare)
        close(ours, llama(torch.from_numpy(tokens)).logits)
        adapted = start.theirs(torch.from_numpy(tokens))
    close(adapted_model(start.config, start.plan)(start.adapter, start.params, tokens)[0], adapted)
    assert abs(adapted - bare).max() > 0.1


def test_fresh_weights_are_torchs():
    config = model_config(Options())
    params = fresh_params(jax.random.key(0), config)
    q = params["layers"]["self_attn"]["q_proj"]["kernel"]
    down = params["layers"]["mlp"]["down_proj"]["kernel"]
    for leaf, fan_in in ((q, 512), (down, 1408), (params["embed_tokens"]["embedding"], 512)):
        assert abs(leaf).max() <= fan_in**-0.5
        assert float(leaf.std()) == pytest.approx((3 * fan_in) ** -0.5, rel=1e-2)
    assert (params["norm"]["scale"] == 1).all()


# Rows


def test_rows_are_written_and_marked_as_described():
    said = options(rows=None)
    tokenizer, lessons = three_stages.lessons_of(said)
    assert tokenizer.get_vocab_size() == 700
    assert [tokenizer.id_to_token(n) for n in range(3)] == ["<unk>", "<s>", "</s>"]
    rows = first_rows(said.sft_data, None)
    for mode, offset in (("default", 0), ("faithful", 1)):
        for row, each in zip(rows, encoded(tokenizer, rows, 160, MODES[mode].mark), strict=True):
            messages = [dict(turn) for turn in row.messages]
            right = encode_chat(tokenizer, minimind_rows.TEMPLATE, {}, messages)
            length = len(right.ids)
            assert each.ids[:length].tolist() == right.ids.tolist()
            assert not each.ids[length:].any()
            # of the closing, generation reads </s> alone; MiniMind learns its line break too
            closing = np.roll(right.trained & (right.ids == 2), 1)
            expected = np.pad(right.trained | closing, (0, 160 - length))
            assert each.learnt.tolist() == np.roll(expected, offset).tolist()
    texts = [row for row in three_stages.STAGES if row != "pretrain"]
    assert (
        lessons["pretrain"].trained[0].weights.sum()
        == (lessons["pretrain"].trained[0].targets > 0).sum()
    )
    assert texts == ["sft", "lora"]


def test_a_row_that_is_cut_before_its_answer_is_named():
    with pytest.raises(InputError, match=r"no token is learnt of .*sft\.jsonl:1.* in 24 tokens"):
        three_stages.lessons_of(options(max_seq_len=24))


# Training, step for step

RECIPES = {
    "default": (
        right_loss,
        lambda batches, accumulate, _: torch_training.accumulated(batches, accumulate),
        lambda peak, _, updates: lambda t: peak * (0.1 + 0.45 * (1 + np.cos(np.pi * t / updates))),
    ),
    "faithful": (
        notebook_loss,
        torch_training.accumulated_as_minimind,
        lambda peak, batches, _: torch_training.minimind_schedule(peak, batches),
    ),
}

NOTEBOOK = {}
ACCUMULATED = {"rows": 12, "accumulation_steps": 4, "epochs": 2}
WHOLE = {"dim": 512, "vocab_size": 6400, "max_seq_len": 512}
BFLOAT16 = {"dtype": "bfloat16", "learning_rate": 2e-2}
CASES = {
    "notebook": ("default", NOTEBOOK, 1e-5),
    "faithful-notebook": ("faithful", NOTEBOOK, 1e-5),
    "faithful-accumulated": ("faithful", ACCUMULATED, 1e-5),
}
MORE = {
    "accumulated": ("default", ACCUMULATED, 1e-5),
    "bfloat16": ("default", BFLOAT16, 5e-3),
    "faithful-bfloat16": ("faithful", BFLOAT16, 5e-3),
    "experts": ("default", {"use_moe": True}, 1e-5),
    "faithful-experts": ("faithful", {"use_moe": True}, 1e-5),
    "whole size": ("default", WHOLE, 1e-5),
    "faithful, whole size": ("faithful", WHOLE, 1e-5),
}


def ours(start, said, lesson):
    apply = adapted_model(start.config, start.plan)
    return train(
        apply, start.adapter, start.params, lesson.trained, said.epochs, schooling_of(said)
    )


def theirs(start, said, tokenizer):
    loss_fn, accumulated, schedule = RECIPES[said.mode]
    count, size = said.rows, said.batch_size
    epoch = loader(
        said.lora_data, tokenizer, count, said.max_seq_len, size, said.mode == "faithful"
    )
    batches = epoch * said.epochs
    updates = accumulated(batches, said.accumulation_steps, len(epoch))
    recipe = torch_training.Recipe(
        schedule(said.learning_rate, len(batches), len(updates)), precision=said.dtype
    )
    return torch_training.train(start.theirs, updates, recipe, loss_fn=loss_fn)


@pytest.mark.parametrize(
    ("mode", "given", "limit"),
    [
        *(pytest.param(*case, id=name) for name, case in CASES.items()),
        *(pytest.param(*case, id=name, marks=pytest.mark.slow) for name, case in MORE.items()),
    ],
)
def test_every_loss_is_torchs(mode, given, limit, tmp_path):
    said = options(mode=mode, **given)
    tokenizer, lessons = three_stages.lessons_of(said)
    start = started(said, tmp_path)
    trained, records = ours(start, said, lessons["lora"])
    expected = theirs(start, said, tokenizer)
    close([record.loss for record in records], [record.loss for record in expected], limit)
    close(
        [record.learning_rate for record in records],
        [record.learning_rate for record in expected],
        1e-12,
    )
    _require_same_factors(start, trained, 100 * limit)
    if said.use_moe:
        assert all(record.aux_loss > 0.1 for record in records)
    if given is NOTEBOOK and mode == "faithful":
        rates = [f"{record.learning_rate:.8f}" for record in records]
        assert rates == ["0.00050225", "0.00037725", "0.00022275", "0.00009775", "0.00005000"]
    if not said.accumulation_steps > 1:
        assert records[0].loss - records[-1].loss > 5 * limit


def _require_same_factors(start, trained, limit):
    leaf = {"wq": "layers/self_attn/q_proj/kernel", "wo": "layers/self_attn/o_proj/kernel"}
    for name, layer in torch_lora.lora_layers(start.theirs).items():
        entry, number = trained[leaf[name[-2:]]], int(name.split(".")[1])
        close(entry.a[number].T, layer.lora_A.detach(), limit)
        close(entry.b[number].T, layer.lora_B.detach(), limit)
        assert abs(entry.b[number]).max() > 5e-4


def test_the_modes_differ(tmp_path):
    said = options()
    tokenizer, _ = three_stages.lessons_of(said)
    model = started(said, tmp_path).theirs
    given = said.lora_data, tokenizer, 2, said.max_seq_len, 2
    right, faithful = (loader(*given, faithful=wrong)[0] for wrong in (False, True))
    losses = [right_loss(model, right), right_loss(model, faithful), notebook_loss(model, faithful)]
    apart = [abs(a - b).item() for a, b in pairwise(losses)]
    assert min(apart) > 1e-3


# The run


def test_the_run_prints_what_the_notebook_does(tmp_path, capsys):
    words = ["--save-dir", str(tmp_path), "--mode", "faithful", "--epochs", "2"]
    sizes = ["--dim", "64", "--vocab-size", "700", "--max-seq-len", "160"]
    outcomes = three_stages.main(["--config", str(EXAMPLE / "minimind.yaml"), *sizes, *words])
    printed = capsys.readouterr().out
    names = [f"layers.{n}.attention.{w}" for n in range(2) for w in ("wq", "wo")]
    assert "\n".join(f"apply lora on module: {name}" for name in names) in printed
    assert printed.count("adapter saved to ") == 2
    assert "Epoch:[2/2](1/1), loss: " in printed
    assert list(outcomes) == ["pretrain", "sft", "lora"]
    for outcome in outcomes.values():
        assert outcome.records[-1].loss < outcome.records[0].loss
    weights = torch_io.read(tmp_path / "minimind_sft_64.pth")
    assert {array.dtype for array in weights.values()} == {np.dtype("float16")}
    assert set(torch_io.read(tmp_path / "minimind_lora_64.pth")) == {
        f"{name}.lora.{factor}.weight" for name in names for factor in "AB"
    }
    assert (tmp_path / "loss.png").stat().st_size > 10_000


def test_a_merge_with_a_b_of_zero_is_refused():
    said = options()
    config = model_config(said)
    params = fresh_params(jax.random.key(3), config)
    plan, adapter = apply_lora(config, params, said)
    with pytest.raises(InputError, match="where the adapter does 0"):
        check_merge(config, params, adapter, plan, np.ones((1, 4), np.int32))


def test_what_the_run_refuses(tmp_path):
    with pytest.raises(InputError, match="3 rows are no whole number of batches of 2"):
        three_stages.lessons_of(options(rows=3))
    with pytest.raises(InputError, match=r"rows is 99, and .*pretrain\.jsonl has 16"):
        three_stages.lessons_of(options(rows=99))
    with pytest.raises(InputError, match="a vocabulary of 200 has no room"):
        three_stages.lessons_of(options(vocab_size=200))


def test_doctests_of_the_example():
    for module in (minimind_modes, minimind_rows):
        found = doctest.testmod(module)
        assert found.attempted
        assert not found.failed


@pytest.mark.slow
def test_the_notebooks_size(tmp_path, capsys):
    words = ["--save-dir", str(tmp_path), "--mode", "faithful"]
    outcomes = three_stages.main(["--config", str(EXAMPLE / "minimind.yaml"), *words])
    printed = capsys.readouterr().out
    assert "parameters with LoRA: 8980992" in printed
    assert "parameters of LoRA: 65536" in printed
    assert "share of LoRA: 0.73%" in printed
    first, last = (outcomes["lora"].records[n].loss for n in (0, -1))
    assert 0.03 < first - last < 0.09
    assert outcomes["pretrain"].records[0].loss == pytest.approx(8.93, abs=0.1)
