"""The verifier: it passes a true pair, and says why it does not pass a false one."""

import io
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from rich.console import Console

import lora_jax as lora
from interop import hf, peft, pretrained, torch_io
from interop.decoder_training import Training, row_batches
from interop.equivalence import Criteria, _greedy_answer, verify
from interop.families import keymap_of
from interop.hf_config import from_attributes
from interop.keymaps import LLAMA
from interop.language_sides import Side, Trace
from interop.tokenizer import byte_tokenizer
from interop.torch_training import Recipe
from lora_jax.cli.verify_report import render
from lora_jax.data.chat import ChatFormat
from lora_jax.errors import InputError
from lora_jax.manifest import MANIFEST
from lora_jax.models.decoder import Decoder

from family_cases import TOKENS, built
from small_models import random_params

ROWS = Path(__file__).parents[2] / "examples" / "data" / "identity.jsonl"
PROMPTS = [[1, 2, 3], [4] * 9, [5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15]]
CRITERIA = Criteria(max_logit_difference=1e-5, min_effect=1.0, min_positions=50)
O_B = "base_model.model.model.layers.1.self_attn.o_proj.lora_B.weight"


@pytest.fixture(scope="module")
def model():
    return pretrained.load("tiny")


@pytest.fixture(scope="module")
def pair(model):
    config = lora.LoraConfig(
        rank=4, alpha=8, targets=(lora.Rule(".*k_proj/.*", rank=2, alpha=1.5), r".*_proj/kernel")
    )
    plan = lora.plan_from_axes(model.params, config, {"layers/.*": "stack in out"})
    fresh = lora.init(jax.random.key(0), model.params, plan)
    key = jax.random.key(1)
    return {
        path: pair._replace(b=0.4 * jax.random.normal(key, pair.b.shape))
        for path, pair in fresh.items()
    }, plan


@pytest.fixture(scope="module")
def directory(pair, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "adapter"
    peft.write(directory, *pair, keymap=LLAMA)
    return directory


@pytest.fixture(scope="module")
def stages():
    return []


@pytest.fixture(scope="module")
def training(model):
    special = {f"{role}_token": text for role, text in model.special_tokens.items()}
    chat = ChatFormat(model.tokenizer, model.chat_template, special)
    batches = row_batches(chat, model.config.vocab_size, ROWS, steps=3, batch_size=1)
    return Training(batches, Recipe(lambda count: 1e-3))


@pytest.fixture(scope="module")
def report(model, directory, training, stages):
    return verify(
        model,
        directory,
        PROMPTS,
        max_new_tokens=8,
        criteria=CRITERIA,
        progress=stages.append,
        gradients=True,
        training=training,
    )


def text_of(report):
    console = Console(width=120, file=io.StringIO())
    console.print(render(report))
    return console.file.getvalue()


def test_a_true_pair_is_verified(report):
    assert report.agrees, report.reasons
    assert report.positions == sum(map(len, PROMPTS)) + 8 * len(PROMPTS)
    assert report.effect > 1
    for comparison in (report.base, report.adapted):
        assert 0 <= comparison.mean_logit_difference <= comparison.max_logit_difference < 1e-5
        assert [layer.name for layer in comparison.layers] == ["0", "1"]
        assert all(layer.relative < 1e-5 and layer.cosine > 0.9999 for layer in comparison.layers)
        assert [answer.agreeing for answer in comparison.answers] == [8] * len(PROMPTS)


def test_gradients_and_updates_are_verified(report):
    assert len(report.gradients) == 2 * 2 * 7
    assert all(gradient.within(1e-4) for gradient in report.gradients)
    assert len(report.training.updates) == 3
    assert report.training.loss_gap < 1e-5
    assert report.training.parameter_gap < 1e-5
    assert report.training.moved > 1e-3
    text = text_of(report)
    assert "Gradients of A and B, the furthest of 28" in text
    words = " ".join(text.replace("│", " ").split())
    assert "was asked for, and so do the gradients of A and B, and so do 3 updates" in words


def test_gradients_and_updates_that_are_too_far_apart_are_named(report):
    limits = ("gradient", "loss", "parameter")
    strict = replace(CRITERIA, **{f"max_{limit}_difference": -1.0 for limit in limits})
    still = replace(report.training, moved=0.0)
    reasons = replace(report, criteria=strict, training=still).reasons
    found = [
        r"28 gradients differ .* that of base_model\..*lora_[AB]\.weight by \d",
        "training: losses differ",
        r"training: base_model\..*\.weight ends .* apart",
        "training moved nothing",
    ]
    assert len(reasons) == len(found)
    for reason, pattern in zip(reasons, found, strict=True):
        assert re.match(pattern, reason)


def test_the_adapter_changes_what_is_answered(report):
    """Else the answers of the adapted model would show nothing that those of the base don't."""
    pairs = zip(report.base.answers, report.adapted.answers, strict=True)
    assert any(base.answer != adapted.answer for base, adapted in pairs)


def test_the_report_is_readable(report):
    text = text_of(report)
    assert "JAX and torch with PEFT compute the same function" in text
    assert text.count("8 of 8") == 2 * len(PROMPTS)
    assert f"{report.effect:.2f}" in text


def test_another_scale_is_not_verified(model, directory, pair):
    adapter, plan = pair
    plan = replace(plan, sites=tuple(replace(s, scale=1.5 * s.scale) for s in plan.sites))
    report = verify(
        model, directory, PROMPTS, trained=(adapter, plan), max_new_tokens=8, criteria=CRITERIA
    )
    assert not report.agrees
    assert report.base.max_logit_difference < 1e-5
    assert any("adapted model: logits differ" in reason for reason in report.reasons)
    assert not any("base" in reason for reason in report.reasons)
    text = text_of(report)
    assert "NOT verified" in text
    assert "adapted model: logits differ" in text


def test_a_base_is_compared_with_what_transformers_reads(model, directory, tmp_path):
    """A config.json that says something else than what was read of it."""
    asked = {"max_new_tokens": 8, "criteria": CRITERIA}
    hf.write(tmp_path / "same", model.config, model.params)
    assert verify(model, directory, PROMPTS, base_directory=tmp_path / "same", **asked).agrees
    other = replace(model.config, norm=replace(model.config.norm, eps=1e-2))
    hf.write(tmp_path / "other", other, model.params)
    report = verify(model, directory, PROMPTS, base_directory=tmp_path / "other", **asked)
    assert any("base: logits differ" in reason for reason in report.reasons), report.reasons


def test_a_corrupted_tensor_and_too_little_evidence_are_named(model, directory, pair, tmp_path):
    """One layer's B negated, which no format check can notice."""
    damaged = tmp_path / "adapter"
    peft.write(damaged, *pair, keymap=LLAMA)
    (damaged / MANIFEST).unlink()
    tensors = {n: np.array(t) for n, t in torch_io.read(damaged / peft.WEIGHTS).items()}
    tensors[O_B] *= -1
    torch_io.write(damaged / peft.WEIGHTS, tensors)
    criteria = Criteria(min_prompts=6)
    report = verify(model, damaged, PROMPTS, trained=pair, max_new_tokens=8, criteria=criteria)
    assert report.adapted.layers[0].relative < 1e-5 < 1e-2 < report.adapted.layers[1].relative
    assert any("adapted model: logits differ" in reason for reason in report.reasons)
    assert any("63 positions were compared, fewer than 256" in r for r in report.reasons)
    assert any("5 prompts were answered, fewer than 6" in r for r in report.reasons)


def test_an_adapter_that_does_nothing_is_not_verified(model, pair, tmp_path):
    adapter, plan = pair
    idle = {path: pair._replace(b=0 * pair.b) for path, pair in adapter.items()}
    peft.write(tmp_path / "adapter", idle, plan, keymap=LLAMA)
    report = verify(model, tmp_path / "adapter", PROMPTS, max_new_tokens=8, criteria=CRITERIA)
    assert report.effect == 0
    (reason,) = report.reasons
    assert "changes no logit" in reason


def test_progress_names_every_stage(report, stages):
    assert len(stages) == len(set(stages)) == 9


def test_ids_outside_the_vocabulary_are_named(model, directory):
    with pytest.raises(lora.InputError, match=r"vocabulary of 320: \{2: \[-1, 320\]\}"):
        verify(model, directory, [[1], [320, 5, -1]])


def side(logits):
    """A model whose logits after any tokens are these."""
    trace = Trace(np.zeros((1, 1, 1)), np.array([logits], np.float32))
    return Side(lambda prompts, count: [], lambda rows: trace)


def spelled(tokens, **_):
    return str(tokens)


FLIPS = {
    "margin below the difference": ([1.0, 1.0005, 0.0], [1.0004, 1.0, 0.0], True),
    "margin above the difference": ([1.3, 1.2, 0.0], [1.4, 1.0, 0.0], False),
    "not torch's two best": ([1.0, 1.0, 0.0], [1.0, 0.0, 0.9999], False),
    "not a number": ([1.0, np.nan, 0.0], [1.0, 1.0, 0.0], False),
}


@pytest.mark.parametrize(("ours", "theirs", "explained"), FLIPS.values(), ids=FLIPS)
def test_a_flip_is_explained_only_by_a_tie_within_the_difference(ours, theirs, explained):
    answer = _greedy_answer(side(ours), side(theirs), spelled, [7], [2, 2, 1, 0], [2, 2, 0, 0])
    assert answer.agreeing == 2
    assert answer.agrees is explained
    assert (answer.flip.ours, answer.flip.theirs) == ("[1]", "[0]")
    best, second = sorted(theirs)[:-3:-1]
    assert answer.flip.margin == pytest.approx(best - second, rel=1e-3)


@pytest.mark.parametrize(
    ("ours", "words"), [([1.0, 1.2], "a tie within rounding"), ([1.2, 1.0], "a disagreement")]
)
def test_a_flip_is_shown_with_both_tokens_and_the_margin(report, ours, words):
    flipped = _greedy_answer(side(ours), side([1.125, 1.0]), spelled, [7], [1], [0])
    answers = (flipped, *report.adapted.answers[1:])
    with_flip = replace(report, adapted=replace(report.adapted, answers=answers))
    text = " ".join(text_of(with_flip).split())
    assert "adapted, answer 1: token 1 is '[1]' in JAX and '[0]' in torch" in text
    assert "1.2e-01 apart" in text
    assert words in text
    assert with_flip.agrees is flipped.agrees is (words == "a tie within rounding")


def test_a_family_with_other_names_is_verified(tmp_path):
    """OPT's blocks, weights and positions stand elsewhere than Llama's."""
    case = built("opt")

    def model_fn(params, tokens):
        return Decoder(case.config).apply({"params": params}, tokens)[0]

    config = lora.LoraConfig(rank=2, targets="attention")
    plan = lora.plan(model_fn, case.params, TOKENS, config=config)
    fresh = lora.init(jax.random.key(0), case.params, plan)
    adapter = {path: pair._replace(b=pair.b + 0.2) for path, pair in fresh.items()}
    peft.write(tmp_path / "opt", adapter, plan, keymap=keymap_of(case.config))
    few = Criteria(max_logit_difference=2e-5, min_effect=0.1, min_positions=20, min_prompts=2)
    tokenizer = byte_tokenizer().tokenizer
    model = SimpleNamespace(config=case.config, params=case.params, tokenizer=tokenizer)
    report = verify(model, tmp_path / "opt", PROMPTS[:2], max_new_tokens=4, criteria=few)
    assert report.agrees, report.reasons


def test_a_family_that_peft_knows_by_other_names_is_refused(tmp_path):
    config = from_attributes({"model_type": "minimind", "dim": 32, "n_layers": 2, "n_heads": 4})
    model = SimpleNamespace(config=config, params=random_params(config), tokenizer=None)
    with pytest.raises(InputError, match="names the weights of minimind_first otherwise"):
        verify(model, tmp_path, PROMPTS)
