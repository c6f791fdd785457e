"""Every kind of entry against real PEFT, both ways, on tied, untied and biased models."""

import functools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import lora_jax as lora
from interop import peft, torch_io
from interop.keymaps import LLAMA
from interop.peft import CONFIG, WEIGHTS
from lora_jax.models.config import DecoderConfig
from lora_jax.models.forms import AttentionForm

from peft_cases import (
    DECODER,
    TOKENS,
    K,
    Q,
    base_params,
    load_with_peft,
    model_fn,
    moved,
    our_logits,
    planned,
    save_with_peft,
    torch_logits,
)

Rule = lora.Rule
MODELS = {
    "untied": DECODER,
    "tied": replace(DECODER, tie_embeddings=True),
    "biased": replace(DECODER, attention=AttentionForm(bias=True)),
}
EMBEDDING, HEAD = "embed_tokens/embedding", "lm_head/kernel"
LINEAR = r".*_proj/kernel"
TOKENS_TRAINED = (5, 90, 3)


def full(path):
    return Rule(path, variant="full")


EXPORTS = {
    "ranks and alphas along a stack": (
        "untied",
        dict(targets=(Rule(Q, rank=(2, 5, 3), alpha=(3.0, 8.0, 0.5)), Rule(K, rank=4), LINEAR)),
        {"r", "rank_pattern", "alpha_pattern"},
    ),
    "scales alone along a stack": (
        "untied", dict(targets=(Rule(Q, alpha=(1.0, 2.0, 4.0)),)), {"alpha_pattern"}
    ),
    "some layers": ("untied", dict(targets=(Rule(Q, rank=(0, 4, 0)), Rule(K, rank=(2, 0, 6)))),
                    {"target_modules", "rank_pattern"}),
    "some layers, rslora": (
        "untied", dict(targets=(Rule(Q, rank=(0, 4, 9)), LINEAR), use_rslora=True), {"rank_pattern"}
    ),
    "dora": ("untied", dict(targets=(LINEAR, HEAD), variant="dora"), {"use_dora"}),
    "dora of unequal ranks": (
        "biased", dict(targets=(Rule(Q, rank=(1, 4, 2)), LINEAR), variant="dora"), {"use_dora"}
    ),
    "embedding": ("untied", dict(targets=(EMBEDDING, Q)), {"target_modules"}),
    "embedding alone": ("untied", dict(targets=EMBEDDING), {"target_modules"}),
    "embedding with dora": ("untied", dict(targets=(EMBEDDING, Q), variant="dora"), {"use_dora"}),
    "tied embedding": ("tied", dict(targets=(EMBEDDING, LINEAR)), {"ensure_weight_tying"}),
    "head and norms whole": (
        "untied",
        dict(targets=(full(HEAD), full("norm/scale"), full(".*input_layernorm/scale"), Q)),
        {"modules_to_save"},
    ),
    "a projection whole": ("untied", dict(targets=(full(K), Q)), {"modules_to_save"}),
    "a projection whole, with bias": (
        "biased", dict(targets=(full(".*k_proj/.*"), Q)), {"modules_to_save"}
    ),
    "embedding whole": ("untied", dict(targets=(full(EMBEDDING), Q)), {"modules_to_save"}),
    "tied embedding whole": (
        "tied", dict(targets=(full(EMBEDDING), Q)), {"modules_to_save", "ensure_weight_tying"}
    ),
    "biases of the adapted": ("biased", dict(targets=(full(".*q_proj/bias"), Q)), {"bias"}),
    "all biases": ("biased", dict(targets=(full(".*/bias"), Q)), {"bias"}),
    "rows": (
        "untied",
        dict(targets=(Rule(EMBEDDING, variant="rows", rows=TOKENS_TRAINED), LINEAR)),
        {"trainable_token_indices"},
    ),
    "rows of a tied embedding": (
        "tied",
        dict(targets=(Rule(EMBEDDING, variant="rows", rows=TOKENS_TRAINED), LINEAR)),
        {"trainable_token_indices"},
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=EXPORTS.values(), ids=EXPORTS)
def exported(request, tmp_path_factory):
    """An adapter written for PEFT: model, directory, base, adapter, plan and its logits."""
    model, config, keys = request.param
    params = base_params(MODELS[model])
    plan = planned(params, **{"rank": 4, "alpha": 8, **config})
    adapter = moved(params, plan)
    directory = tmp_path_factory.mktemp("export") / "adapter"
    peft.write(directory, adapter, plan, keymap=LLAMA, params=params)
    logits = our_logits(params, adapter, plan, MODELS[model])
    return Exported(MODELS[model], directory, params, adapter, plan, logits, keys)


class Exported(NamedTuple):
    decoder: DecoderConfig
    directory: Path
    params: Any
    adapter: Any
    plan: Any
    logits: np.ndarray
    keys: set[str]


def relative(ours, theirs):
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@functools.cache
def base_logits(decoder):
    return np.asarray(model_fn(base_params(decoder), TOKENS, decoder))


def test_peft_computes_our_function(exported):
    model = load_with_peft(exported.params, exported.directory, exported.decoder)
    theirs, base = torch_logits(model), base_logits(exported.decoder)
    assert relative(exported.logits, theirs) < 1e-5
    assert relative(base, theirs) > 1e-2
    if "bias" not in exported.keys:  # PEFT trains biases in place
        with model.disable_adapter():
            assert relative(torch_logits(model), base) < 1e-5


SPOILT = {"r": 11, "target_modules": ["o_proj"], "rank_pattern": {}, "alpha_pattern": {}}
LOADED_ANYWAY = {"bias", "modules_to_save"}
"""Of these PEFT loads the tensors into the base where the config doesn't name them."""


def test_the_config_needs_each_of_its_keys(exported, tmp_path):
    """Without any one of them PEFT computes something else, warns, or refuses."""
    written = json.loads((exported.directory / CONFIG).read_text())
    os.symlink(exported.directory / WEIGHTS, tmp_path / WEIGHTS)
    for key in exported.keys - LOADED_ANYWAY:
        (tmp_path / CONFIG).write_text(json.dumps({**written, key: SPOILT.get(key)}))
        try:
            model = load_with_peft(exported.params, tmp_path, exported.decoder)
        except (Warning, RuntimeError, ValueError, KeyError):
            continue
        assert relative(torch_logits(model), exported.logits) > 1e-3, key


def test_reading_gives_back_what_was_written(exported, tmp_path):
    read, plan = peft.read(exported.directory, exported.params, keymap=LLAMA)
    assert list(read) == list(exported.plan)
    for mine, theirs in zip(exported.plan.sites, plan.sites, strict=True):
        for name in ("shape", "roles", "rank", "ranks", "variant", "rows", "scale"):
            assert getattr(mine, name) == getattr(theirs, name), name
    jax.tree.map(np.testing.assert_array_equal, exported.adapter, read)
    peft.write(tmp_path / "again", read, plan, keymap=LLAMA, params=exported.params)
    assert files_of(tmp_path / "again") == files_of(exported.directory)


def files_of(directory):
    return [(directory / name).read_bytes() for name in (CONFIG, WEIGHTS)]


@pytest.mark.parametrize("model", ["untied", "tied"])
def test_base_weights_stored_beside_an_adapter_are_compared(tmp_path, model):
    decoder, params = MODELS[model], base_params(MODELS[model])
    config = dict(r=4, target_modules=["embed_tokens"], ensure_weight_tying=model == "tied")
    theirs = torch_logits(
        save_with_peft(params, tmp_path, config, decoder, save_embedding_layers=True)
    )
    stored = [name for name in torch_io.read(tmp_path / WEIGHTS) if "base_layer" in name]
    assert len(stored) == (2 if model == "tied" else 1)
    adapter, plan = peft.read(tmp_path, params, keymap=LLAMA)
    assert relative(our_logits(params, adapter, plan, decoder), theirs) < 1e-5
    other = jax.tree.map(lambda leaf: leaf * 1.001, params)
    with pytest.raises(lora.InputError, match="belongs to another base"):
        peft.read(tmp_path, other, keymap=LLAMA)
    shapes = jax.eval_shape(lambda: params)
    with pytest.raises(lora.InputError, match="give params, not shapes"):
        peft.read(tmp_path, shapes, keymap=LLAMA)
