"""Rows 10, 11 and 16 of the fault matrix: numbers that are none.

10: NaN and Inf in loss or gradients are reported with update, epoch and batch, leave everything
as it was, end the run after so many in a row, and never make a best checkpoint. 11: an overflow
of float16 is skipped, logged and recovered from. 16: a batch with nothing to learn changes
nothing. What is injected is in the base's weights or comes of the learning rate.
"""

import json
import re
import shutil
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from interop import hf, peft, pretrained, torch_io
from lora_jax.cli.main import main
from lora_jax.train import checkpoint
from lora_jax.train.losses import cross_entropy
from lora_jax.train.precision import LossScaling, Precision
from lora_jax.train.step import init_state, make_step

from chat_rows import write_rows

pytestmark = pytest.mark.slow

ROWS = [(f"What is {i}?", f"It is {i * 7 % 11}.") for i in range(9)]
POISON = ("What is Z?", "It is Z.")
COMMON = ["--max-length", "64", "--batch-size", "1", "--packing", "padded", "--rank", "2"]
COMMON += ["--max-new-tokens", "2", "--prompts", "What is 1?"]
EPOCH = len(ROWS) + 1


def write_base(directory, change):
    """The tiny model with a head of its own, and with its parameters changed, for transformers."""
    base = pretrained.load("tiny")
    params = jax.tree.map(np.array, base.params)
    params["lm_head"] = {"kernel": params["embed_tokens"]["embedding"].T.copy()}
    change(params)
    hf.write(
        directory,
        replace(base.config, tie_embeddings=False),
        params,
        tokenizer=base.tokenizer,
        chat_template=base.chat_template,
        special_tokens=base.special_tokens,
        eos_ids=base.eos_ids,
    )
    return directory


def poison(value):
    """One number of what stands for the letter Z."""

    def change(params):
        params["embed_tokens"]["embedding"][ord("Z"), 3] = value

    return change


@pytest.fixture(scope="module")
def nan_base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("nan") / "base", poison(np.nan))


@pytest.fixture(scope="module")
def inf_base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("inf") / "base", poison(np.inf))


def words(folder, rows, *more):
    data = write_rows(folder / "a.jsonl", rows)
    fixed = ["train", "--data", data, "--out", folder / "run", *COMMON]
    return [str(word) for word in (*fixed, *more)]


def metrics(folder):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def updates(folder):
    return [line for line in metrics(folder) if "loss" in line]


def require_finite(folder):
    """Every checkpoint, and the adapter if there is one, holds numbers alone."""
    found = [*(folder / "run").rglob("adapter_model.safetensors")]
    assert found
    for path in found:
        tensors = torch_io.read(path)
        assert tensors
        assert all(np.isfinite(tensor).all() for tensor in tensors.values())
    for step in checkpoint.steps(folder / "run" / "checkpoints"):
        text = checkpoint.look(folder / "run" / "checkpoints", step).directory / "progress.json"
        assert not re.search("NaN|Infinity", text.read_text())


def reported(printed):
    """(update, epoch, batch, faults in a row) of each update that was left out."""
    said = " ".join(printed.split())
    pattern = r"update (\d+) \(epoch (\d+), batch (\d+)\) was left out: loss \S+, gradient norm "
    return [tuple(map(int, each)) for each in re.findall(pattern + r"\S+; (\d+) in a row", said)]


@pytest.mark.parametrize("base", ["nan_base", "inf_base"])
def test_10_a_batch_that_is_no_number_is_reported_and_left_out(tmp_path, request, capsys, base):
    directory = request.getfixturevalue(base)
    more = ["--model", str(directory), "--epochs", "3", "--save-every", "1", "--keep", "99"]
    assert main(words(tmp_path, [*ROWS, POISON], *more)) == 0
    left_out = reported(capsys.readouterr().out)
    log = updates(tmp_path)
    faulty = [line["step"] for line in log if line["loss"] is None]
    assert faulty == [update for update, *_ in left_out]
    assert [epoch for _, epoch, _, _ in left_out] == [1, 2, 3]
    for update, epoch, batch, in_a_row in left_out:
        assert (update, in_a_row) == ((epoch - 1) * EPOCH + batch, 1)
    assert [line["skipped"] for line in log] == [line["step"] in faulty for line in log]
    require_finite(tmp_path)
    require_left_alone(tmp_path, faulty)


def require_left_alone(folder, faulty):
    """The adapters before and after a faulty update are equal; after others they are not."""
    root = folder / "run" / "checkpoints"
    read = {
        step: (root / f"step-{step:08d}" / "adapter" / peft.WEIGHTS)
        for step in checkpoint.steps(root)
    }
    content = {step: path.read_bytes() for step, path in read.items()}
    assert len(content) == 3 * EPOCH
    for step in range(2, 3 * EPOCH + 1):
        assert (content[step] == content[step - 1]) == (step in faulty)


@pytest.mark.parametrize("max_faults", [1, 3])
def test_10_so_many_in_a_row_end_the_run_with_its_last_good_state(
    tmp_path, nan_base, capsys, max_faults
):
    rows = [POISON] * 8
    more = ["--model", str(nan_base), "--max-faults", str(max_faults), "--epochs", "9"]
    assert main(words(tmp_path, rows, *more)) == 1
    printed = capsys.readouterr().out
    assert [in_a_row for *_, in_a_row in reported(printed)][:max_faults] == [
        *range(1, max_faults + 1)
    ]
    assert max_faults <= len(updates(tmp_path)) <= max_faults + 1
    assert "too many updates in a row were not finite" in " ".join(printed.split())
    assert not (tmp_path / "run" / "adapter").exists()
    require_finite(tmp_path)


def test_10_a_good_update_among_those_on_their_way_does_not_hide_the_fault(
    tmp_path, nan_base, capsys
):
    """An update is looked at while the next one runs."""
    more = ["--model", str(nan_base), "--max-faults", "1", "--epochs", "3"]
    assert main(words(tmp_path, [*ROWS, POISON], *more)) == 1
    assert len(reported(capsys.readouterr().out)) == 1
    assert len(updates(tmp_path)) < 3 * EPOCH
    require_finite(tmp_path)


def test_10_a_learning_rate_that_overflows_ends_the_run(tmp_path, capsys):
    more = ["--model", "tiny", "--learning-rate", "1e30", "--clip-norm", "1e30", "--epochs", "3"]
    heldout = write_rows(tmp_path / "b.jsonl", ROWS[:2])
    more += ["--heldout", str(heldout), "--eval-every", "1", "--keep-best", "--save-every", "1"]
    assert main(words(tmp_path, ROWS, *more)) == 1
    assert [in_a_row for *_, in_a_row in reported(capsys.readouterr().out)] == [1, 2, 3]
    assert {line["heldout_loss"] for line in metrics(tmp_path) if "heldout_loss" in line} == {None}
    assert not (tmp_path / "run" / "adapter").exists()
    require_finite(tmp_path)
    root = tmp_path / "run" / "checkpoints"
    newest = checkpoint.latest(root)
    assert newest.progress["history"]["losses"][-1] is None
    assert set(newest.progress["history"]["heldout"].values()) <= {None} | {
        newest.progress["history"]["before"]["loss"]
    }


def test_10_a_held_out_loss_that_is_no_number_is_never_the_best(tmp_path, nan_base, capsys):
    """Not the first, with which no other compares, nor any after it."""
    heldout = write_rows(tmp_path / "b.jsonl", [POISON])
    more = ["--model", str(nan_base), "--heldout", str(heldout), "--keep-best", "--eval-every", "2"]
    assert main(words(tmp_path, ROWS, *more, "--epochs", "1")) == 0
    assert "chosen" not in capsys.readouterr().out
    judged = json.loads((tmp_path / "run" / "answers.json").read_text())
    assert judged["before"]["loss"] is judged["after"]["loss"] is None
    assert json.loads((tmp_path / "run" / "answers.json").read_text())["updates"] == len(ROWS)
    require_finite(tmp_path)


def test_10_a_run_that_gave_up_goes_on_with_another_learning_rate(tmp_path, capsys):
    fatal = ["--model", "tiny", "--learning-rate", "1e30", "--clip-norm", "1e30", "--epochs", "3"]
    fatal += ["--save-every", "1", "--keep", "99", "--warmup", "0.3"]
    assert main(words(tmp_path, ROWS, *fatal)) == 1
    sound = [*fatal, "--resume"]
    sound[sound.index("1e30")] = "1e-3"
    assert main(words(tmp_path, ROWS, *sound)) == 2
    assert "optim.learning_rate was 1e+30, is 0.001" in capsys.readouterr().err
    for step in checkpoint.steps(tmp_path / "run" / "checkpoints"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
    assert main(words(tmp_path, ROWS, *sound, "--force")) == 0
    assert [line["step"] for line in updates(tmp_path)] == [*range(1, 3 * len(ROWS) + 1)]
    require_finite(tmp_path)


def test_11_an_overflow_of_float16_is_skipped_logged_and_recovered_from(tmp_path, capsys):
    """The last norm is so large that gradients times 65536 leave float16."""

    def enlarge(params):
        params["norm"]["scale"] *= 64

    base = write_base(tmp_path / "base", enlarge)
    more = ["--model", str(base), "--precision", "mixed_float16", "--epochs", "3"]
    assert main(words(tmp_path, ROWS, *more)) == 0
    log = updates(tmp_path)
    scales = [line["loss_scale"] for line in log]
    assert scales[0] == 2.0**16
    assert log[0]["skipped"]
    assert scales == sorted(scales, reverse=True)
    assert scales[-1] < scales[0]
    assert not log[-1]["skipped"]
    assert log[-1]["updates"] == len(log) - sum(line["skipped"] for line in log)
    assert all(line["faults"] == 0 for line in log)
    assert reported(capsys.readouterr().out) == []
    require_finite(tmp_path)
    newest = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert newest.step == len(log)


def linear_loss(adapter, params, batch):
    x, targets, weights = batch
    hidden = x.astype(jnp.float16) @ adapter["w"].astype(jnp.float16)
    return cross_entropy(hidden @ params, targets, weights)


def linear_batch(tokens, seed=0):
    drawn = np.random.default_rng(seed)
    weights = (np.arange(6) < tokens).astype(np.float32)
    return drawn.normal(size=(6, 4)).astype(np.float32), drawn.integers(0, 5, 6), weights


@pytest.fixture
def linear():
    """(state, params, step) of a float16 policy whose scale starts far too high."""
    policy = Precision("float16", "float16", LossScaling(initial=2.0**30, interval=3))
    tx = optax.adamw(1e-2)
    params = jnp.asarray(np.random.default_rng(1).normal(size=(8, 5)), jnp.float16)
    state = init_state({"w": jnp.full((4, 8), 0.1)}, tx, policy)
    return state, params, jax.jit(partial(make_step(linear_loss, tx, policy=policy)))


def as_bytes(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_11_the_loss_scale_falls_until_nothing_overflows_and_grows_again(linear):
    state, params, step = linear
    scales, skipped = [], []
    for number in range(40):
        before = as_bytes((state.adapter, state.opt_state))
        state, found = step(state, params, linear_batch(6, number))
        scales.append(float(found.loss_scale))
        skipped.append(bool(found.skipped))
        assert (as_bytes((state.adapter, state.opt_state)) == before) == skipped[-1]
        assert int(state.faults) == 0
    first = skipped.index(False)
    assert first > 3
    assert scales[: first + 1] == [2.0 ** (30 - n) for n in range(first + 1)]
    assert max(scales[first:]) > scales[first]
    assert int(state.updates) == skipped.count(False)


def test_16_a_batch_without_a_trained_token_changes_nothing(linear):
    state, params, step = linear
    while not int(state.updates):
        state, _ = step(state, params, linear_batch(6))
    after, found = step(state, params, linear_batch(0))
    assert (float(found.loss), float(found.tokens), bool(found.skipped)) == (0, 0, True)
    assert int(found.faults) == 0
    assert int(after.step) == int(state.step) + 1
    assert as_bytes(after._replace(step=state.step)) == as_bytes(state)
    changed, _ = step(state, params, linear_batch(6, 1))
    assert as_bytes(changed.adapter) != as_bytes(state.adapter)
