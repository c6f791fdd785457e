"""BERT and RoBERTa against transformers: directories, weights, hidden states, logits, configs."""

import json
import math
from functools import partial

import jax
import numpy as np
import pytest
import torch
import transformers

from interop import encoder_hf
from interop.conversion import flatten, to_torch
from interop.encoder_hf_config import read_config, to_attributes
from interop.encoder_keymaps import encoder_keymap, encoder_shapes
from interop.torch_io import read_directory
from interop.torch_io import write as write_tensors
from lora_jax.errors import InputError
from lora_jax.models.classifier import with_classifier
from lora_jax.models.encoder import Encoder

from family_cases import compiled
from small_encoders import CASES, COMMON, padded_batch, torch_encoder, torch_outputs

cases = pytest.mark.parametrize(("architecture", "changes"), CASES.values(), ids=CASES.keys())


@partial(compiled, static_argnums=0)
def run(config, params, tokens, mask, token_types):
    output, sown = Encoder(config).apply(
        {"params": params}, tokens, mask, token_types, mutable=["intermediates"]
    )
    return output, sown["intermediates"]["layers"]["hidden"]


def batch_of(model):
    return padded_batch(model.config.model_type, model.config.type_vocab_size)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)


@cases
def test_a_directory_of_transformers_computes_the_same_here(tmp_path, architecture, changes):
    model = torch_encoder(architecture, changes)
    model.save_pretrained(tmp_path)
    config, params = encoder_hf.read(tmp_path)
    assert {path: leaf.shape for path, leaf in flatten(params).items()} == encoder_shapes(config)
    tokens, mask, types = batch_of(model)
    layers, last = torch_outputs(model, tokens, mask, types)
    output, ours = run(config, params, tokens, mask, types)
    close(ours, layers)
    close(output.hidden, layers[-1])
    close(output.pooled if output.logits is None else output.logits, last)
    others, _ = run(config, params, tokens, np.ones_like(mask), types)
    assert np.abs(others.hidden[0] - layers[-1][0]).max() < 2e-5  # no padding in that row
    assert np.abs(others.hidden[1:] - layers[-1][1:]).max() > 1e-2
    params["layers"]["attention"]["self"]["query"]["kernel"][1] *= -1
    assert np.abs(run(config, params, tokens, mask, types)[0].hidden - layers[-1]).max() > 1e-2


@cases
def test_what_is_read_and_written_again_is_equal_in_every_byte(tmp_path, architecture, changes):
    torch_encoder(architecture, changes).to(torch.bfloat16).save_pretrained(tmp_path / "a")
    config, params = encoder_hf.read(tmp_path / "a")
    assert config.dtype == "bfloat16"
    encoder_hf.write(tmp_path / "b", config, params)
    before, after = read_directory(tmp_path / "a"), read_directory(tmp_path / "b")
    assert sorted(before) == sorted(after)
    for name, array in before.items():
        assert (array.dtype, array.tobytes()) == (after[name].dtype, after[name].tobytes()), name
    assert encoder_hf.read(tmp_path / "b")[0] == config
    made = getattr(transformers, architecture)
    model, report = made.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not any(report.values())
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["bert", "roberta bare"])
def test_the_torch_model_in_memory_is_the_one_that_was_read(tmp_path, name):
    model = torch_encoder(*CASES[name])
    model.save_pretrained(tmp_path)
    again = encoder_hf.to_transformers(*encoder_hf.read(tmp_path))
    assert (type(again), again.training) == (type(model), False)
    for key, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], weight), key
    batch = batch_of(model)
    for ours, theirs in zip(
        torch_outputs(again, *batch), torch_outputs(model, *batch), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_labels_and_dropout_arrive_on_both_sides(tmp_path):
    names = {0: "negative", 1: "neutral", 2: "positive"}
    changes = {"id2label": names, "classifier_dropout": 0.3, "attention_probs_dropout_prob": 0.2}
    torch_encoder("BertForSequenceClassification", changes).save_pretrained(tmp_path / "a")
    config, params = encoder_hf.read(tmp_path / "a")
    assert config.labels == ("negative", "neutral", "positive")
    rates = (config.hidden_dropout, config.attention_dropout, config.classifier_dropout)
    assert rates == (0.1, 0.2, 0.3)
    encoder_hf.write(tmp_path / "b", config, params)
    read = transformers.AutoConfig.from_pretrained(tmp_path / "b")
    assert read.id2label == names
    assert (read.classifier_dropout, read.attention_probs_dropout_prob) == (0.3, 0.2)


@pytest.mark.parametrize("architecture", ["BertForPreTraining", "RobertaForMaskedLM"])
def test_a_model_that_fills_masks_gives_its_encoder(tmp_path, architecture):
    model_type = architecture.partition("For")[0].lower()
    model = torch_encoder(architecture, {"pad_token_id": 1 if model_type == "roberta" else 0})
    model.save_pretrained(tmp_path)
    config, params = encoder_hf.read(tmp_path)
    assert (config.head, config.pooler) == ("none", architecture == "BertForPreTraining")
    tokens, mask, types = batch_of(model)
    body = getattr(model, model_type)
    close(run(config, params, tokens, mask, types)[1], torch_outputs(body, tokens, mask, types)[0])
    config, params = with_classifier(jax.random.key(0), config, params, ["no", "yes"])
    classifier = encoder_hf.to_transformers(config, params)
    assert "SequenceClassification" in type(classifier).__name__
    tokens, mask, types = batch_of(model)
    logits = torch_outputs(classifier, tokens, mask, types)[1]
    close(run(config, params, tokens, mask, types)[0].logits, logits)


def test_old_names_of_norms_and_saved_buffers_are_read(tmp_path):
    torch_encoder(*CASES["bert bare"]).save_pretrained(tmp_path)
    tensors = read_directory(tmp_path)
    config, params = encoder_hf.read(tmp_path)
    swaps = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {}
    for name, array in tensors.items():
        for new, old in swaps.items():
            name = name.replace(new, old)
        renamed[name] = array.copy()
    renamed["embeddings.position_ids"] = np.arange(24)[None]
    write_tensors(tmp_path / "model.safetensors", renamed)
    again, others = encoder_hf.read(tmp_path)
    assert again == config
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(flatten(others)[path], leaf)


def test_an_old_and_a_new_name_of_one_tensor_are_refused(tmp_path):
    torch_encoder(*CASES["bert bare"]).save_pretrained(tmp_path)
    tensors = {name: array.copy() for name, array in read_directory(tmp_path).items()}
    new, old = "embeddings.LayerNorm.weight", "embeddings.LayerNorm.gamma"
    write_tensors(tmp_path / "model.safetensors", {**tensors, old: 2 * tensors[new]})
    with pytest.raises(InputError) as caught:
        encoder_hf.read(tmp_path)
    assert old in str(caught.value)
    assert new in str(caught.value)


BASE = {
    "architectures": ["BertForSequenceClassification"],
    "model_type": "bert",
    "hidden_act": "gelu",
    **COMMON,
}


def config_of(directory, attributes):
    (directory / "config.json").write_text(json.dumps(attributes))
    return read_config(directory)


def test_what_is_not_given_has_the_value_of_transformers(tmp_path):
    config = config_of(tmp_path, BASE)
    theirs = transformers.BertConfig(**COMMON)
    assert config.layer_norm_eps == theirs.layer_norm_eps
    assert config.hidden_dropout == config.classifier_dropout == theirs.hidden_dropout_prob
    assert config.labels == ("LABEL_0", "LABEL_1")
    written = to_attributes(config, dtype="float32")
    assert config_of(tmp_path, written) == config


# Attributes as published, and how many parameters the body and its pooler have.
PUBLISHED = {
    "google-bert/bert-base-uncased": (
        {"architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1,
         "gradient_checkpointing": False, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
         "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072,
         "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert",
         "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0,
         "position_embedding_type": "absolute", "transformers_version": "4.6.0.dev0",
         "type_vocab_size": 2, "use_cache": True, "vocab_size": 30_522},
        109_482_240,
    ),
    "FacebookAI/roberta-base": (
        {"architectures": ["RobertaForMaskedLM"], "attention_probs_dropout_prob": 0.1,
         "bos_token_id": 0, "eos_token_id": 2, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
         "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072,
         "layer_norm_eps": 1e-05, "max_position_embeddings": 514, "model_type": "roberta",
         "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1,
         "type_vocab_size": 1, "vocab_size": 50_265},
        124_645_632,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("attributes", "parameters"), PUBLISHED.values(), ids=PUBLISHED.keys())
def test_a_published_config_is_understood(tmp_path, attributes, parameters):
    config = config_of(tmp_path, attributes)
    assert sum(math.prod(shape) for shape in encoder_shapes(config).values()) == parameters
    assert config.longest_row == 512


REFUSED = {
    "relative positions": {"position_embedding_type": "relative_key"},
    "a decoder": {"is_decoder": True},
    "cross attention": {"add_cross_attention": True},
    "another activation": {"hidden_act": "gelu_10"},
    "another head": {"architectures": ["BertForTokenClassification"]},
    "another family": {"model_type": "electra"},
    "something new": {"embedding_size": 8},
    "quantised": {"quantization_config": {"quant_method": "gptq"}},
    "pruned": {"pruned_heads": {"0": [1]}},
    "text for a number": {"hidden_size": "64"},
    "labels that skip": {"id2label": {"0": "a", "2": "b"}},
    "a billion labels": {"num_labels": 10**9},
    "no labels": {"num_labels": 0},
    "a billion layers": {"num_hidden_layers": 10**9},
    "no number": {"layer_norm_eps": float("inf")},
    "no name": {"model_type": ["bert"]},
}


@pytest.mark.parametrize("changes", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_implemented_is_refused_with_its_value(tmp_path, changes):
    with pytest.raises(InputError) as caught:
        config_of(tmp_path, BASE | changes)
    for name, value in changes.items():
        assert f"{name}={value!r}" in str(caught.value)


def test_all_refusals_come_in_one_error(tmp_path):
    every = REFUSED["a decoder"] | REFUSED["something new"] | {"num_labels": 3}
    every |= {"id2label": {"0": "a", "1": "b"}}
    with pytest.raises(InputError) as caught:
        config_of(tmp_path, {k: v for k, v in (BASE | every).items() if k != "vocab_size"})
    for name in ("config.json", "vocab_size is missing", "is_decoder", "embedding_size"):
        assert name in str(caught.value)
    assert "num_labels=3 and id2label has 2" in str(caught.value)


def test_parameters_that_do_not_fit_are_all_named_and_nothing_is_written(tmp_path):
    torch_encoder(*CASES["bert"]).save_pretrained(tmp_path / "a")
    config, params = encoder_hf.read(tmp_path / "a")
    params["pooler"]["dense"]["bias"] = np.ones(3)
    del params["layers"]["mlp"]["intermediate"]
    with pytest.raises(InputError) as caught:
        encoder_hf.write(tmp_path / "b", config, params)
    assert "pooler/dense/bias is (3,), expected (32,)" in str(caught.value)
    assert "layers/mlp/intermediate/dense/kernel is missing" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_head_of_the_other_family_has_no_counterpart(tmp_path):
    torch_encoder(*CASES["bert"]).save_pretrained(tmp_path)
    config, params = encoder_hf.read(tmp_path)
    mixed = type(config)(**vars(config) | {"positions_skip_padding": True})
    with pytest.raises(InputError, match="BERT has the head 'pooled', RoBERTa 'dense'"):
        encoder_hf.write(tmp_path / "out", mixed, params)
    assert len(to_torch(params, encoder_keymap(config))) == 5 + 2 * 16 + 4
