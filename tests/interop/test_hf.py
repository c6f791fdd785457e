"""Hugging Face directories against transformers: weights, logits, config, tokenizer."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from interop import hf
from interop.conversion import flatten, to_torch
from interop.hf_config import read_config, to_attributes
from interop.keymaps import LLAMA
from interop.tokenizer import byte_tokenizer, read_tokenizer
from lora_jax.errors import InputError

from small_models import SMALL, VARIANTS, decoder_logits, random_params

TOKENS = np.random.default_rng(1).integers(0, SMALL.vocab_size, (2, 24))
TEXTS = [
    "",
    "Hello,  world!\n\n 12345",
    "naïve café 東京 🦜🏽 \x00\x7f",
    "<|im_start|>user\nhi<|im_end|>",
]


def jax_logits(config, params):
    return np.asarray(decoder_logits(config, params, TOKENS))


def torch_logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.float().numpy()


def torch_model(config, dtype=torch.float32):
    """A random model of transformers' own making."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**to_attributes(config, dtype="float32")))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.3 if weight.ndim == 1 else 0.15)
    return model.to(dtype).eval()


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_directory_of_transformers_computes_the_same_here(tmp_path, changes):
    config = dataclasses.replace(SMALL, **changes)
    model = torch_model(config)
    model.save_pretrained(tmp_path)
    read, params = hf.read(tmp_path)
    assert read == config
    expected = torch_logits(model)
    np.testing.assert_allclose(jax_logits(read, params), expected, atol=2e-5)
    params["layers"]["self_attn"]["q_proj"]["kernel"][1] *= -1
    assert np.abs(jax_logits(read, params) - expected).max() > 1e-2


@pytest.mark.parametrize("shard", ["50GB", "50KB"], ids=["whole", "sharded"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_value_of_a_directory_of_transformers_is_kept(tmp_path, shard, dtype):
    model = torch_model(SMALL, getattr(torch, dtype))
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors").exists() == (shard == "50GB")
    config, params = hf.read(tmp_path)
    assert config.dtype == dtype
    for name, array in to_torch(params, LLAMA).items():
        assert str(array.dtype) == dtype
        theirs = model.get_parameter(name).detach().float().numpy()
        np.testing.assert_array_equal(array.astype(np.float32), theirs, name)


def test_a_pickled_directory_is_read(tmp_path):
    model = torch_model(SMALL)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")  # repeats the tied head
    _, params = hf.read(tmp_path)
    np.testing.assert_array_equal(
        params["norm"]["scale"], model.get_parameter("model.norm.weight").detach().numpy()
    )


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_loads_what_is_written(tmp_path, changes, dtype):
    config = dataclasses.replace(SMALL, **changes)
    params = random_params(config, dtype)
    hf.write(tmp_path / "out", config, params, max_shard_bytes=100_000)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert str(model.dtype) == f"torch.{dtype}"
    in_memory = hf.to_transformers(config, params)
    for name, weight in in_memory.state_dict().items():
        assert torch.equal(model.state_dict()[name].float(), weight), name
    np.testing.assert_array_equal(torch_logits(model.float()), torch_logits(in_memory))


def test_the_torch_model_computes_what_the_decoder_computes():
    config = dataclasses.replace(SMALL, **VARIANTS["biases"])
    params = random_params(config)
    expected = torch_logits(hf.to_transformers(config, params))
    np.testing.assert_allclose(jax_logits(config, params), expected, atol=2e-5)


def test_reading_and_writing_again_gives_equal_files(tmp_path):
    chat = byte_tokenizer()
    config = dataclasses.replace(SMALL, vocab_size=260)
    hf.write(tmp_path / "a", config, random_params(config, "bfloat16"), **chat._asdict())
    read, params = hf.read(tmp_path / "a")
    hf.write(tmp_path / "b", read, params, **read_tokenizer(tmp_path / "a")._asdict())
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_the_torch_model_shares_no_memory_with_the_parameters():
    params = random_params(SMALL)
    before = {path: leaf.copy() for path, leaf in flatten(params).items()}
    model = hf.to_transformers(SMALL, params)
    assert not model.training
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(leaf, before[path])


def test_parameters_that_do_not_fit_are_all_named_and_nothing_is_written(tmp_path):
    params = random_params(SMALL)
    params["norm"]["scale"] = np.ones(3)
    params["lm_head"] = {"kernel": np.ones((2, 2))}
    del params["layers"]["input_layernorm"]
    with pytest.raises(InputError) as caught:
        hf.write(tmp_path / "out", SMALL, params)
    for part in (
        "layers/input_layernorm/scale is missing, expected (3, 64)",
        "lm_head/kernel is (2, 2), expected none",
        "norm/scale is (3,), expected (64,)",
    ):
        assert part in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_interleaved_rotations_are_not_written_as_halves(tmp_path):
    config = dataclasses.replace(SMALL, rope_interleaved=True)
    with pytest.raises(InputError, match="rope_interleaved=True has no counterpart"):
        hf.write(tmp_path / "out", config, random_params(SMALL))


def test_a_directory_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "kept").write_text("kept")
    with pytest.raises(InputError, match="already exists"):
        hf.write(tmp_path, SMALL, random_params(SMALL))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


# config.json of HuggingFaceTB/SmolLM2-135M-Instruct, written by transformers 4.42.
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}


def config_of(tmp_path, attributes, **kwargs):
    (tmp_path / "config.json").write_text(json.dumps(attributes))
    return read_config(tmp_path, **kwargs)


def test_the_config_of_smollm2_is_its_preset(tmp_path):
    from lora_jax.models.presets import SMOLLM2_135M

    config = config_of(tmp_path, SMOLLM2)
    assert config == dataclasses.replace(SMOLLM2_135M, dtype="bfloat16")
    assert config_of(tmp_path, SMOLLM2, dtype="float32") == SMOLLM2_135M


def test_absent_attributes_have_the_defaults_of_transformers(tmp_path):
    sizes = {
        "model_type": "llama",
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    theirs = LlamaConfig(**sizes).to_dict() | {"dtype": "float32"}
    assert config_of(tmp_path, sizes) == config_of(tmp_path, theirs)


BASE = to_attributes(SMALL, dtype="float32")


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 5e4, "rope_parameters": None},
        {"rope_theta": None, "rope_parameters": {"rope_theta": 5e4, "rope_type": "default"}},
        {"rope_theta": 5e4, "rope_parameters": None, "rope_scaling": {"type": "default"}},
        {"rope_theta": 50000, "rope_parameters": {"rope_type": "default"}},
    ],
    ids=["older", "newer", "explicit default", "both"],
)
def test_the_rotary_base_is_found_where_each_version_keeps_it(tmp_path, changes):
    assert config_of(tmp_path, BASE | changes) == SMALL
    removed = {name: value for name, value in (BASE | changes).items() if value is not None}
    assert config_of(tmp_path, removed) == SMALL


REFUSED = {
    "half a scaling": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
    "another scaling": {"rope_scaling": {"type": "proportional", "factor": 2.0}},
    "a setting of another type": {
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta_fast": 8.0},
    },
    "two scalings": {
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "linear", "factor": 4.0},
    },
    "scaled without a type": {"rope_scaling": {"factor": 2.0}},
    "partial rotations": {
        "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}
    },
    "a base per layer type": {"rope_parameters": {"full_attention": {"rope_theta": 5e4}}},
    "sliding window": {"sliding_window": 4096},
    "activation": {"hidden_act": "gelu_10"},
    "family": {"model_type": "falcon"},
    "another head": {"architectures": ["LlamaForSequenceClassification"]},
    "quantised": {"quantization_config": {"quant_method": "gptq"}},
    "remote code": {"auto_map": {"AutoModel": "modeling.Model"}},
    "something new": {"logit_softcap": 30.0},
    "dropout": {"attention_dropout": 0.1},
    "text for a number": {"hidden_size": "64"},
    "number for a flag": {"attention_bias": 1},
    "rotations as a list": {"rope_scaling": [1]},
}


@pytest.mark.parametrize("changes", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_implemented_is_refused_with_its_value(tmp_path, changes):
    with pytest.raises(InputError) as caught:
        config_of(tmp_path, BASE | changes)
    for name, value in changes.items():
        assert value is None or f"{name}={value!r}" in str(caught.value)


def test_all_refusals_come_in_one_error(tmp_path):
    every = REFUSED["sliding window"] | REFUSED["activation"] | REFUSED["remote code"]
    with pytest.raises(InputError) as caught:
        config_of(tmp_path, {k: v for k, v in (BASE | every).items() if k != "vocab_size"})
    for name in ("config.json", "vocab_size is missing", *every):
        assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_rotary_bases_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"rope_theta is .*50000\.0"):
        config_of(tmp_path, BASE | {"rope_theta": 10000.0})


def test_impossible_sizes_name_the_file(tmp_path):
    with pytest.raises(InputError, match=r"config\.json: impossible decoder: num_heads=4 is not"):
        config_of(tmp_path, BASE | {"num_key_value_heads": 3})


def test_a_config_that_is_not_json_names_the_line(tmp_path):
    (tmp_path / "config.json").write_text('{"vocab_size": 3,\n oops}')
    with pytest.raises(InputError, match=r"config\.json is not JSON: .*line 2"):
        read_config(tmp_path)


def test_a_directory_without_a_config_is_no_model(tmp_path):
    with pytest.raises(InputError, match=r"is not a model directory: it holds no config\.json"):
        hf.read(tmp_path)


def test_weights_that_do_not_fit_name_the_directory(tmp_path):
    hf.write(tmp_path / "out", SMALL, random_params(SMALL))
    (tmp_path / "out" / "config.json").write_text(json.dumps(BASE | {"num_hidden_layers": 4}))
    with pytest.raises(InputError, match=r"out: the tensors do not fit the model: missing: model"):
        hf.read(tmp_path / "out")


@pytest.fixture(scope="module")
def chat_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("chat") / "model"
    config = dataclasses.replace(SMALL, vocab_size=260)
    hf.write(directory, config, random_params(config), **byte_tokenizer()._asdict())
    return directory


def test_auto_tokenizer_reads_the_same_tokenizer(chat_directory):
    ours, theirs = read_tokenizer(chat_directory), AutoTokenizer.from_pretrained(chat_directory)
    for text in TEXTS:
        ids = ours.tokenizer.encode(text).ids
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == ours.tokenizer.decode(ids, skip_special_tokens=False) == text
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == tuple(
        ours.special_tokens[role] for role in ("bos", "eos", "pad")
    )


def test_the_chat_template_arrives_in_transformers(chat_directory):
    theirs = AutoTokenizer.from_pretrained(chat_directory)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\nhello<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_generation_stops_at_the_ids_that_end_an_answer(chat_directory):
    model = AutoModelForCausalLM.from_pretrained(chat_directory)
    assert model.generation_config.eos_token_id == 257
    assert model.generation_config.pad_token_id == 258
    assert model.config.eos_token_id == 257


def test_a_tokenizer_saved_by_transformers_is_read(chat_directory, tmp_path):
    theirs = AutoTokenizer.from_pretrained(chat_directory)
    theirs.save_pretrained(tmp_path)  # keeps the template in a file of its own
    assert (tmp_path / "chat_template.jinja").exists()
    ours, before = read_tokenizer(tmp_path), read_tokenizer(chat_directory)
    assert ours.chat_template == before.chat_template
    assert ours.special_tokens == before.special_tokens
    for text in TEXTS:
        assert ours.tokenizer.encode(text).ids == before.tokenizer.encode(text).ids


def test_older_forms_of_the_tokenizer_files(chat_directory, tmp_path):
    chat = read_tokenizer(chat_directory)
    chat.tokenizer.enable_padding(length=64)
    chat.tokenizer.enable_truncation(2)
    chat.tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": {"content": "<|im_start|>", "lstrip": False}})
    )
    templates = [{"name": "tool", "template": "no"}, {"name": "default", "template": "yes"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 258]}))
    read = read_tokenizer(tmp_path)
    assert read.chat_template == "yes"
    assert read.special_tokens == {
        "bos": "<|im_start|>",
        "eos": "<|im_end|>",
        "pad": "<|im_end|>",
    }
    assert read.eos_ids == (257, 258)
    assert read.tokenizer.encode("four").ids == list(b"four")


def test_a_directory_without_a_usable_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"tokenizer\.json: no such file"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json is not a tokenizer"):
        read_tokenizer(tmp_path)
