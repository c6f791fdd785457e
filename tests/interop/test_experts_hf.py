"""Mixtures of experts: names in files and in memory, caches, routing, configs, MiniMind's.

What they compute is held to transformers by `test_families`.
"""

from dataclasses import replace

import jax
import numpy as np
import pytest
import torch

import lora_jax as lora
from interop import hf
from interop.conversion import flatten, nest, to_torch
from interop.families import file_keymap, keymap_of
from interop.halves import in_halves
from interop.hf_config import from_attributes, to_attributes
from interop.torch_io import read_directory
from lora_jax.errors import InputError
from lora_jax.models.decoder import Decoder, leaf_shapes, param_shapes
from lora_jax.models.generate import generate, language_model
from lora_jax.models.presets import TINY

from family_cases import TOKENS, built, torch_trace, trace


def close(actual, expected, atol=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_whether_probabilities_are_renormalised_is_seen(name):
    case = built(name)
    experts = replace(case.config.experts, renormalised=not case.config.experts.renormalised)
    _, other = trace(replace(case.config, experts=experts), case.params, TOKENS)
    assert np.abs(other - case.logits).max() > 1e-2


def test_products_over_sorted_tokens_compute_the_same():
    case = built("qwen3_moe")
    _, logits = trace(replace(case.config, expert_products="ragged"), case.params, TOKENS)
    close(logits, case.logits)


@pytest.mark.parametrize(
    ("name", "expert"),
    [("mixtral", "block_sparse_moe.experts.3.w1"), ("qwen3_moe", "mlp.experts.3.gate_proj")],
)
def test_what_is_read_and_written_again_is_equal_in_every_byte(tmp_path, name, expert):
    case = built(name)
    case.model.save_pretrained(tmp_path / "a", max_shard_size="50KB")
    config, params = hf.read(tmp_path / "a")
    assert config == case.config
    hf.write(tmp_path / "b", config, params)
    before, after = read_directory(tmp_path / "a"), read_directory(tmp_path / "b")
    assert f"model.layers.1.{expert}.weight" in before
    assert sorted(before) == sorted(after)
    for key, array in before.items():
        assert (array.dtype, array.tobytes()) == (after[key].dtype, after[key].tobytes()), key
    again, report = type(case.model).from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not any(report.values())
    np.testing.assert_array_equal(torch_trace(again.eval(), config, TOKENS)[1], case.logits)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe windows"])
def test_modules_in_memory_have_fused_experts(name):
    case = built(name)
    names = to_torch(case.params, keymap_of(case.config))
    assert names["model.layers.0.mlp.experts.down_proj"].shape[0] == case.config.experts.count
    again = hf.to_transformers(case.config, case.params).state_dict()
    for key, weight in case.model.state_dict().items():
        assert torch.equal(again[key], weight), key
    assert file_keymap(case.config) != keymap_of(case.config)
    assert file_keymap(case.config, names.keys()) == keymap_of(case.config)


def test_generation_with_the_cache_gives_the_tokens_of_transformers():
    case = built("qwen3_moe")
    prompts = [TOKENS[0, :5].tolist(), TOKENS[1, :9].tolist()]
    ours = generate(language_model(case.config), case.params, prompts, max_new_tokens=12)
    for prompt, answer in zip(prompts, ours, strict=True):
        tokens = torch.tensor([prompt])
        theirs = case.model.generate(tokens, max_new_tokens=12, do_sample=False, eos_token_id=None)
        assert theirs[0, len(prompt) :].tolist() == answer


def test_routing_of_every_layer_can_be_had():
    case = built("mixtral")

    def run(params, tokens):
        return Decoder(case.config).apply({"params": params}, tokens, mutable=["routing"])[1]

    routing = jax.eval_shape(run, case.params, TOKENS)["routing"]["layers"]["mlp"]["router"]
    assert routing.probabilities.shape == (3, *TOKENS.shape, 4)
    assert routing.chosen.shape == (3, *TOKENS.shape, 2)


@pytest.mark.parametrize("changes", [{}, {"expert_products": "ragged"}, {"remat": True}], ids=str)
def test_every_linear_of_a_decoder_with_experts_has_a_low_rank_form(changes):
    config = replace(built("qwen3_moe").config, **changes)
    settings = lora.LoraConfig(rank=2, targets="all-linear")
    function, shapes = decoder_logits(config), param_shapes(config)
    plan = lora.plan(function, shapes, TOKENS, config=settings, strict=True)
    tables = {path for path in leaf_shapes(config) if path.endswith(("scale", "embedding"))}
    assert set(plan) == set(leaf_shapes(config)) - tables - {"lm_head/kernel"}
    assert plan["layers/mlp/gate/kernel"].roles == ("stack", "in", "out")
    assert plan["layers/mlp/experts/gate_up_proj"].roles == ("stack", "stack", "in", "out")
    mlp = lora.LoraConfig(rank=2, targets="mlp")
    names = {"gate/kernel", "experts/gate_up_proj", "experts/down_proj"}
    assert set(lora.plan(function, shapes, TOKENS, config=mlp)) == {
        f"layers/mlp/{n}" for n in names
    }


def attributes_of(name):
    return {**to_attributes(built(name).config, dtype="float32"), "output_router_logits": False}


REFUSED = {
    "dense layers": ("qwen3_moe", {"mlp_only_layers": [1]}),
    "every other layer": ("qwen3_moe", {"decoder_sparse_step": 2}),
    "two counts": ("qwen3_moe", {"num_local_experts": 5}),
    "some windows": ("qwen3_moe windows", {"max_window_layers": 2}),
    "noise": ("mixtral", {"router_jitter_noise": 0.1}),
    "dropout": ("mixtral", {"attention_dropout": 0.1}),
    "a shared expert": ("qwen3_moe", {"shared_expert_intermediate_size": 8}),
    "a number for a flag": ("qwen3_moe", {"norm_topk_prob": 1}),
}


@pytest.mark.parametrize(("name", "changes"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_implemented_is_refused_with_its_value(name, changes):
    assert from_attributes(attributes_of(name)) == built(name).config
    with pytest.raises(InputError) as caught:
        from_attributes(attributes_of(name) | changes)
    for attribute, value in changes.items():
        assert f"{attribute}={value!r}" in str(caught.value)


def test_both_names_of_the_number_of_experts_are_read():
    attributes = attributes_of("qwen3_moe") | {"mlp_only_layers": [], "decoder_sparse_step": 1}
    count = attributes.pop("num_experts")
    assert from_attributes(attributes | {"num_local_experts": count}).experts.count == 6
    assert (
        from_attributes(attributes | {"num_experts": 4, "num_local_experts": 4}).experts.count == 4
    )


def test_experts_of_a_family_without_and_the_other_way_round():
    with pytest.raises(InputError, match=r"experts=ExpertsForm.* has no counterpart .* of llama"):
        to_attributes(replace(TINY, experts=built("mixtral").config.experts), dtype="float32")
    with pytest.raises(InputError, match=r"experts=None has no counterpart .* of mixtral"):
        to_attributes(replace(built("mixtral").config, experts=None), dtype="float32")


def test_more_experts_for_a_token_than_there_are():
    with pytest.raises(InputError, match=r"experts\.per_token=7 is more than experts\.count=6"):
        from_attributes(attributes_of("qwen3_moe") | {"num_experts_per_tok": 7})


MINIMIND_FIRST = {"model_type": "minimind", "dim": 512, "n_layers": 2, "use_moe": True}
MINIMIND = {"model_type": "minimind", "use_moe": True}


def test_the_first_minimind_with_experts_has_its_names_and_counts():
    config = from_attributes({**MINIMIND_FIRST, "n_shared_experts": False, "aux_loss_alpha": 0.1})
    shapes = param_shapes(config)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 26_221_056
    settings = lora.LoraConfig(rank=16, targets="square")
    tokens = np.zeros((1, 4), np.int32)
    plan = lora.plan(decoder_logits(config), shapes, tokens, config=settings, strict=True)
    assert set(plan) == {f"layers/self_attn/{name}_proj/kernel" for name in "qo"}
    adapter = jax.eval_shape(lambda key: lora.init(key, shapes, plan), jax.random.key(0))
    assert 26_221_056 + sum(leaf.size for leaf in jax.tree.leaves(adapter)) == 26_286_592
    leaves = {path: np.zeros(shape, np.float16) for path, shape in leaf_shapes(config).items()}
    tensors = to_torch(nest(leaves), keymap_of(config))
    assert tensors["layers.1.feed_forward.experts.3.w2.weight"].shape == (512, 1408)
    assert tensors["layers.0.feed_forward.shared_experts.w3.weight"].shape == (1408, 512)
    assert tensors["layers.0.feed_forward.gate.weight"].shape == (4, 512)
    assert len(tensors) == 2 + 2 * (4 + 2 + 1 + 15)
    read = flatten(hf.params_of(config, tensors))
    assert {path: leaf.shape for path, leaf in read.items()} == leaf_shapes(config)
    assert from_attributes({**MINIMIND_FIRST, "n_shared_experts": None}).experts.shared_width == 0


def decoder_logits(config):
    def logits(params, tokens):
        return Decoder(config).apply({"params": params}, tokens)[0]

    return logits


def drawn(config):
    generator = np.random.default_rng(0)
    return nest(
        {
            path: generator.normal(path.endswith("scale"), 0.2, shape).astype("f4")
            for path, shape in leaf_shapes(config).items()
        }
    )


SMALL_FIRST = {"dim": 32, "n_heads": 4, "vocab_size": 61, "hidden_dim": 40, "max_seq_len": 64}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 61, "num_attention_heads": 4}
SMALL |= {"max_position_embeddings": 64, "moe_intermediate_size": 24}


def test_the_first_minimind_with_experts_is_a_mixtral_with_rotated_neighbours():
    """Without the expert that all tokens meet, which `test_experts` has."""
    config = from_attributes({**MINIMIND_FIRST, **SMALL_FIRST, "n_shared_experts": None})
    assert (config.experts.per_token, config.experts.renormalised) == (2, True)
    params = drawn(config)
    theirs = replace(config, family="mixtral", rope_interleaved=False)
    model = hf.to_transformers(theirs, in_halves(config, params))
    hidden, logits = torch_trace(model, theirs, TOKENS)
    ours = trace(config, params, TOKENS)
    close(ours[0], hidden)
    close(ours[1], logits)
    with pytest.raises(InputError, match="transformers has no MiniMindLM"):
        hf.to_transformers(from_attributes({**MINIMIND_FIRST, **SMALL_FIRST}), params_with(config))


@pytest.mark.parametrize(
    ("said", "renormalised"),
    [({}, True), ({"norm_topk_prob": False}, False), ({"num_experts_per_tok": 1}, False)],
)
def test_the_first_minimind_keeps_the_probability_of_an_only_expert(said, renormalised):
    config = from_attributes({**MINIMIND_FIRST, **SMALL_FIRST, **said})
    assert config.experts.renormalised is renormalised
    assert from_attributes(to_attributes(config, dtype="float32")) == config


def params_with(config):
    """Of the same decoder with a shared expert."""
    shared = replace(config, experts=replace(config.experts, shared_width=config.experts.width))
    return drawn(shared)


@pytest.mark.parametrize("renormalised", [True, False])
def test_the_current_minimind_with_experts_is_a_qwen3_moe(renormalised):
    config = from_attributes({**MINIMIND, **SMALL, "norm_topk_prob": renormalised})
    assert config.experts.per_token == 1
    assert from_attributes(to_attributes(config, dtype="float32")) == config
    params = drawn(config)
    model = hf.to_transformers(config, params)
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    hidden, logits = torch_trace(model, replace(config, family="qwen3_moe"), TOKENS)
    ours = trace(config, params, TOKENS)
    close(ours[0], hidden)
    close(ours[1], logits)
    names = to_torch(params, keymap_of(config))
    assert "model.layers.1.mlp.experts.3.down_proj.weight" in names
