"""The whole way on the real model: train, check, hand over. Some minutes; run with -m slow."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.cli.base import load_base, read_adapter
from lora_jax.cli.datasets import pack, read
from lora_jax.cli.main import main
from lora_jax.cli.options import DataOptions
from lora_jax.cli.preparing import adapted_loss, logits_of_batch
from lora_jax.cli.terminal import open_console
from lora_jax.data.batches import eval_batches

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        out = tmp_path_factory.mktemp("runs") / "identity"
        assert main(["train", "--config", "examples/identity.yaml", "--out", str(out)]) == 0
    return out


def test_it_has_a_new_name_and_still_knows_the_rest(run):
    judged = json.loads((run / "answers.json").read_text())
    assert judged["after"]["loss"] < judged["before"]["loss"] / 2
    before, after = judged["before"]["answers"], judged["after"]["answers"]
    assert all("Brindle" in answer or "Otterwick" in answer for answer in after[:4])
    assert not any("Brindle" in answer for answer in before)
    for answer, fact in zip(after[4:7], ("Lisbon", "Earth", "blue"), strict=True):
        assert fact in answer
        assert "Brindle" not in answer


def test_torch_and_peft_compute_the_same(run, capsys):
    assert main(["verify", str(run)]) == 0
    assert "verified" in capsys.readouterr().out


def test_merge_mode_gives_the_same_loss_and_gradients(run):
    base = load_base("smollm2-135m", "float32", open_console())
    adapter, plan = read_adapter(run / "adapter", base)
    options = DataOptions(ROOT / "examples/data/identity_heldout.jsonl", batch_size=1)
    packed = pack(options, read(options).train, base, open_console())
    micro_batches = next(eval_batches(*packed))
    example = (jax.tree.map(lambda leaf: leaf[0], micro_batches), None)
    model_fn = logits_of_batch(base.config)

    def value_and_grad(mode):
        loss_fn = adapted_loss(model_fn, plan, mode=mode)

        def mean(adapter):
            loss = loss_fn(adapter, base.params, example)
            return loss.total / loss.tokens

        return jax.jit(jax.value_and_grad(mean))(adapter)

    ours, our_grads = value_and_grad("low_rank")
    merged, merged_grads = value_and_grad("merge")
    assert abs(float(ours - merged)) < 1e-5
    for a, b in zip(jax.tree.leaves(our_grads), jax.tree.leaves(merged_grads), strict=True):
        assert np.linalg.norm(a - b) < 2e-5 * np.linalg.norm(b)
    fresh = lora.init(jax.random.key(0), base.params, plan)
    untrained = adapted_loss(model_fn, plan)(fresh, base.params, example)
    assert float(untrained.total / untrained.tokens) > 2 * float(ours)
