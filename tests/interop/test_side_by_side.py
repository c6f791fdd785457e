"""Training side by side: small models of any kind here, the decoder on real rows below."""

import importlib.util
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from matplotlib.image import imread
from torch_lora_models import MODELS, VOCAB, adapted, both_sides, build, data

import lora_jax as lora
from interop.comparison_plot import plot_training
from interop.comparison_tables import as_text, training_table
from interop.differences import difference, furthest
from interop.keymaps import Keymap, Rule
from interop.side_by_side import adamw_run, compare_runs, jax_run, torch_lora_run
from interop.torch_training import Batch, Recipe, cosine_schedule, mean_cross_entropy
from interop.trained_tensors import load, our_tensors
from lora_jax.train.losses import cross_entropy

STEPS = 20
RECIPE = Recipe(cosine_schedule(5e-3, STEPS, 4), clip_norm=0.25)
BATCHES = [Batch(*rows) for rows in zip(*data(STEPS), strict=True)]
KEYMAP = Keymap(
    tuple(
        Rule(f"{name}.weight", f"{name}.weight", (1, 0), "linear")
        for name in ("up", "down", *(f"layers.{{i}}.{part}" for part in ("q", "v", "o", "down")))
    )
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These models are too small for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def problem(name):
    """Our run's arguments, what it starts from, and the torch module of torch_lora."""
    module, params, adapter, apply = both_sides(name)
    _, jax_fn, _, pattern = MODELS[name]
    config = lora.LoraConfig(rank=4, alpha=6, targets=pattern)
    plan = lora.plan(jax_fn, params, BATCHES[0].inputs, config=config)

    def loss_fn(adapter, params, batch):
        logits = apply(params, adapter, batch.inputs).reshape(-1, VOCAB)
        return cross_entropy(logits, batch.targets.ravel(), batch.weights.ravel())

    start = our_tensors(adapter, plan, params, KEYMAP)
    return (loss_fn, params, adapter, plan), start, module


def ours(arguments, batches=BATCHES, recipe=RECIPE):
    return jax_run(*arguments, batches, recipe, keymap=KEYMAP)


@pytest.mark.parametrize("name", ["mlp", "transformer"])
def test_three_runs_are_one(name):
    arguments, start, module = problem(name)
    plan = arguments[-1]
    modules = [path.removesuffix(".weight") for path in plan]
    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules=modules)
    in_peft = peft.get_peft_model(build(MODELS[name][0]), settings)
    load(in_peft, start)
    found = compare_runs(
        ours(arguments),
        {
            "peft": adamw_run(in_peft, mean_cross_entropy, BATCHES, RECIPE),
            "torch_lora": torch_lora_run(module, mean_cross_entropy, BATCHES, RECIPE),
        },
        start,
    )
    for each in found.values():
        assert len(each.updates) == STEPS
        assert each.loss_gap < 1e-5
        assert each.parameter_gap < 2e-5
        assert max(update.grad_norm_gap for update in each.updates) < 1e-5
        assert max(update.grad_norm for update in each.updates) > RECIPE.clip_norm
        assert each.moved > 0.05
        assert {n.name for n in each.final} == set(start)


CHANGES = {
    "rate": replace(RECIPE, schedule=cosine_schedule(5.05e-3, STEPS, 4)),
    "decay": replace(RECIPE, weight_decay=0.1),
    "clip": replace(RECIPE, clip_norm=math.inf),  # any one limit that always holds is the same
}


@pytest.fixture(scope="module")
def of_ours():
    arguments, start, _ = problem("mlp")
    return [*ours(arguments)], start


@pytest.mark.parametrize("recipe", CHANGES.values(), ids=CHANGES)
def test_another_recipe_is_told_apart(of_ours, recipe):
    snapshots, start = of_ours
    module, _ = adapted(*MODELS["mlp"][::2])
    run = adamw_run(module, mean_cross_entropy, BATCHES, recipe)
    found = compare_runs(iter(snapshots), {"torch": run}, start)["torch"]
    assert found.parameter_gap > 1e-4
    assert found.updates[0].loss_gap < 1e-6
    assert found.updates[-1].loss_gap > 1e-5


def test_another_order_of_batches_is_told_apart(of_ours):
    snapshots, start = of_ours
    module, _ = adapted(*MODELS["mlp"][::2])
    run = adamw_run(module, mean_cross_entropy, BATCHES[::-1], RECIPE)
    found = compare_runs(iter(snapshots), {"torch": run}, start)["torch"]
    assert found.updates[0].loss_gap > 1e-3


def test_what_cannot_be_run_is_refused(of_ours):
    arguments, start, _ = problem("mlp")
    with pytest.raises(lora.InputError, match="in float32, the recipe in bfloat16"):
        next(ours(arguments, recipe=replace(RECIPE, precision="bfloat16")))
    with pytest.raises(lora.InputError, match="no update to compare"):
        compare_runs(iter(()), {"torch": iter(())}, start)
    lacking = [s._replace(tensors=dict(list(s.tensors.items())[:1])) for s in of_ours[0]]
    with pytest.raises(lora.InputError, match=r"torch lacks .*up\.lora_B\.weight"):
        compare_runs(iter(of_ours[0]), {"torch": iter(lacking)}, start)


def test_values_that_are_not_numbers_agree_with_nothing():
    one, other = np.array([1.0, np.nan]), np.array([1.0, np.nan])
    found = difference("x", one, other)
    assert not found.within(1e9)
    assert furthest((difference("y", one[:1], other[:1]), found)) is found
    assert difference("z", np.zeros(3), np.zeros(3)).within(0)
    assert not difference("z", np.ones(3), np.zeros(3)).within(1e9)


EXAMPLE = Path(__file__).parents[2] / "examples" / "training_equivalence.py"


def example():
    spec = importlib.util.spec_from_file_location("training_equivalence", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def require_equal(found, steps, script):
    assert len(found) == 2
    for each in found.values():
        assert len(each.updates) == steps
        assert max(update.loss_gap for update in each.updates) < script.LOSS_LIMIT == 1e-5
        assert max(tensor.relative for tensor in each.final) < script.PARAMETER_LIMIT == 1e-4


def test_twenty_updates_of_the_decoder_on_real_rows_are_torchs(tmp_path):
    """With PEFT and AdamW, and with the LoRA written in torch; then shown."""
    script = example()
    found = script.compare_training(steps=20)
    require_equal(found, 20, script)
    assert all(each.moved > 0.1 for each in found.values())
    picture = tmp_path / "training.png"
    plot_training(picture, found, title="twenty updates")
    assert imread(picture).std() > 0.05
    text = as_text(training_table("both", next(iter(found.values()))))
    assert [line.split()[0] for line in text.splitlines() if line[:3].strip().isdigit()][-1] == "20"


def test_a_hundred_updates_of_the_decoder_on_real_rows_are_torchs():
    script = example()
    found = script.compare_training(steps=100)
    require_equal(found, 100, script)
    for each in found.values():
        losses = [update.loss for update in each.updates]
        assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5]), "the run learns"


@pytest.mark.slow
def test_a_few_updates_of_smollm2_are_torchs(smollm2_path):
    """From a B that is not zero: one of a few updates is as small as what rounding does to it.

    The loss is compared by its size: 30 layers in float32 alone come to 3e-6 of it.
    """
    script = example()
    sizes = {"steps": 3, "peak": 2e-4, "rank": 16, "batch_size": 1, "b_std": 0.005}
    found = script.compare_training("smollm2-135m", **sizes)
    for each in found.values():
        assert len(each.updates) == 3
        assert max(update.loss_gap / update.loss for update in each.updates) < 1e-5
        assert each.parameter_gap < script.PARAMETER_LIMIT
    assert all(each.moved > 1e-3 for each in found.values())
