"""GGUF models against the gguf package's dequantiser and transformers' own GGUF loading."""

import contextlib
import dataclasses
import re
from operator import attrgetter

import gguf as gguf_package
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM

from interop import gguf, hf
from interop.conversion import flatten, to_torch
from interop.gguf_file import open_gguf
from interop.keymaps import LLAMA
from lora_jax.errors import InputError
from lora_jax.models.presets import SMOLLM2_135M

from small_models import (
    BLOCKS,
    SMALL,
    VARIANTS,
    decoder_logits,
    gguf_tensors,
    random_params,
    stored,
    to_neighbours,
    write_gguf,
)

QUANTISED = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1]
K_QUANTS = [Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K]


def torch_logits(model, tokens):
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


def loaded_by_transformers(path):
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


def assert_same_weights(params, model):
    ours = to_torch(params, LLAMA)
    theirs = dict(model.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name].detach().numpy(), name)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_unquantised_parameters_come_back_exactly(tmp_path, changes):
    config = dataclasses.replace(SMALL, **changes)
    params = random_params(config)
    read, back = gguf.read(write_gguf(tmp_path / "a.gguf", config, params))
    assert read == config
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(flatten(back)[path], leaf, path)


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)
def test_each_quantisation_is_what_the_package_dequantises(tmp_path, kind):
    params = random_params(BLOCKS)
    config, back = gguf.read(write_gguf(tmp_path / "a.gguf", BLOCKS, params, kind=kind))
    assert config == BLOCKS
    for path, leaf in flatten(params).items():
        expected = leaf
        if not path.endswith("scale"):  # norms stay F32
            rows = np.ascontiguousarray(leaf.swapaxes(1, 2) if path.endswith("kernel") else leaf)
            packed = gguf_package.dequantize(stored(rows, kind), kind).reshape(rows.shape)
            expected = packed.swapaxes(1, 2) if path.endswith("kernel") else packed
            assert np.abs(expected - leaf).max() < np.abs(leaf).max() / 7
        np.testing.assert_array_equal(flatten(back)[path], expected, path)


@pytest.mark.parametrize("kind", K_QUANTS, ids=lambda kind: kind.name)
def test_k_quants_are_what_the_package_dequantises(tmp_path, kind):
    generator = np.random.default_rng(0)
    values, width = GGML_QUANT_SIZES[kind]
    written = {}
    writer = gguf_package.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_uint32("llama.block_count", BLOCKS.num_layers)
    for key, value in gguf.REQUIRED.items():
        if key != "block_count":
            add = writer.add_float32 if "epsilon" in key else writer.add_uint32
            add(f"llama.{key}", attrgetter(value)(BLOCKS))
    writer.add_uint32("llama.attention.head_count_kv", BLOCKS.num_kv_heads)
    writer.add_uint32("llama.vocab_size", BLOCKS.vocab_size)
    for name, array in gguf_tensors(BLOCKS, random_params(BLOCKS)):
        if array.ndim == 1:
            writer.add_tensor(name, array)
            continue
        blocks = generator.integers(0, 60, (array.shape[0], array.shape[1] // values * width))
        written[name] = blocks.astype(np.uint8)  # 0 to 60: finite scales
        writer.add_tensor(name, written[name], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _, params = gguf.read(tmp_path / "a.gguf")
    down = params["layers"]["mlp"]["down_proj"]["kernel"]
    key = params["layers"]["self_attn"]["k_proj"]["kernel"]
    for i in range(BLOCKS.num_layers):
        expected = gguf_package.dequantize(written[f"blk.{i}.ffn_down.weight"], kind)
        assert np.isfinite(expected).all()
        assert expected.std() > 0
        np.testing.assert_array_equal(down[i], expected.T)
        rows = gguf_package.dequantize(written[f"blk.{i}.attn_k.weight"], kind)
        np.testing.assert_array_equal(to_neighbours(key[i].T, BLOCKS.num_kv_heads), rows)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q4_1], ids=lambda kind: kind.name)
def test_transformers_reads_the_same_model_from_the_same_file(tmp_path, kind):
    config = dataclasses.replace(BLOCKS, tie_embeddings=False)
    path = write_gguf(tmp_path / "a.gguf", config, random_params(config), kind=kind)
    read, params = gguf.read(path)
    model = loaded_by_transformers(path)
    assert_same_weights(params, model)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 24))
    expected = torch_logits(model, tokens)
    np.testing.assert_allclose(decoder_logits(read, params, tokens), expected, atol=1e-4)
    attention = params["layers"]["self_attn"]
    for name, heads in (("q_proj", config.num_heads), ("k_proj", config.num_kv_heads)):
        attention[name]["kernel"] = np.stack(
            [to_neighbours(kernel.T, heads).T for kernel in attention[name]["kernel"]]
        )
    assert np.abs(decoder_logits(read, params, tokens) - expected).max() > 1e-2
    unpermuted = dataclasses.replace(read, rope_interleaved=True)
    np.testing.assert_allclose(decoder_logits(unpermuted, params, tokens), expected, atol=1e-4)


def test_a_dtype_can_be_chosen(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", SMALL, random_params(SMALL))
    config, params = gguf.read(path, dtype="bfloat16")
    assert config.dtype == "bfloat16"
    assert {str(leaf.dtype) for leaf in flatten(params).values()} == {"bfloat16"}


def test_the_header_is_what_the_package_reads(tmp_path):
    extra = [("general.name", "été"), ("some.number", 7)]
    path = write_gguf(tmp_path / "a.gguf", SMALL, random_params(SMALL), extra=extra)
    file, reference = open_gguf(path), gguf_package.GGUFReader(path)
    fields = {k: f.contents() for k, f in reference.fields.items() if not k.startswith("GGUF.")}
    assert file.metadata == fields
    for tensor in reference.tensors:
        assert file.rows(tensor.name).tobytes() == tensor.data.tobytes()


def test_a_file_cut_anywhere_is_refused_with_both_sizes(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", SMALL, random_params(SMALL))
    tensors = gguf_package.GGUFReader(path).tensors
    end = max(tensor.data_offset + tensor.n_bytes for tensor in tensors)
    whole, cut = path.read_bytes(), tmp_path / "cut.gguf"
    for size in (4, 5, 20, 100, 900, tensors[0].data_offset, end // 2, end - 1):
        cut.write_bytes(whole[:size])
        with pytest.raises(InputError, match=re.escape(str(cut))) as caught:
            gguf.read(cut)
        needed = f"its tensors end at {end}" if size >= tensors[0].data_offset else "its header"
        assert f"is cut short: {size} bytes, {needed}" in str(caught.value)
    cut.write_bytes(whole[:end])
    assert gguf.read(cut)[0] == SMALL


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda raw: raw[:4] + b"\x09\0\0\0" + raw[8:], "version 9, expected one of (2, 3)"),
        (lambda raw: raw[:4] + b"\0\0\0\x03" + raw[8:], "version 50331648"),
        (lambda raw: raw[:8] + b"\xff" * 8 + raw[16:], "is a damaged GGUF file"),
        (lambda raw: raw[:16] + b"\xff" * 8 + raw[24:], "keys, at most 50000"),
        (lambda raw: raw.replace(b"0.attn_q.", b"0.attn_k.", 1), "repeated tensors: blk.0.attn_k"),
        (lambda raw: raw.replace(b"general.arch", b"\xff\xfeneral.arch", 1), "can't decode byte"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path, damage, fault):
    path = write_gguf(tmp_path / "a.gguf", SMALL, random_params(SMALL))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=f"{re.escape(str(path))}.*{re.escape(fault)}"):
        gguf.read(path)


def test_no_byte_of_the_header_can_crash_the_reader(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", SMALL, random_params(SMALL))
    whole = path.read_bytes()
    for offset in range(0, gguf_package.GGUFReader(path).tensors[0].data_offset, 3):
        path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 0x81]) + whole[offset + 1 :])
        with contextlib.suppress(InputError):
            open_gguf(path)


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match=r"a\.gguf is not a GGUF file"):
        gguf.read(tmp_path / "a.gguf")
    with pytest.raises(InputError, match=r"b\.gguf: no such file"):
        gguf.read(tmp_path / "b.gguf")


def test_another_architecture_is_named_with_its_attributes(tmp_path):
    writer = gguf_package.GGUFWriter(tmp_path / "a.gguf", "qwen3moe")
    writer.add_block_count(2)
    writer.add_expert_count(8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        InputError, match=r"'qwen3moe' is not implemented .*block_count=2, expert_count=8"
    ):
        gguf.read(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("extra", "fault"),
    [
        ([("llama.rope.scaling.type", "yarn")], "not implemented: rope.scaling.type='yarn'"),
        ([("llama.expert_count", 8)], "not implemented: expert_count=8"),
        ([("llama.attention.sliding_window", 64)], "attention.sliding_window=64"),
        ([("llama.attention.key_length", 8)], "head sizes that differ: rope.dimension_count=16"),
        ([("llama.something.new", 1)], "not implemented: something.new=1"),
    ],
)
def test_attributes_that_are_not_implemented_are_refused(tmp_path, extra, fault):
    path = write_gguf(tmp_path / "a.gguf", SMALL, random_params(SMALL), extra=extra)
    with pytest.raises(InputError, match=re.escape(fault)):
        gguf.read(path)


def test_attributes_that_say_no_are_accepted(tmp_path):
    extra = [("llama.rope.scaling.type", "none"), ("llama.expert_count", 0)]
    path = write_gguf(tmp_path / "a.gguf", SMALL, random_params(SMALL), extra=extra)
    assert gguf.read(path)[0] == SMALL


def test_a_tensor_of_another_arithmetic_is_refused(tmp_path):
    """Llama 3 scales its rotations by a tensor that only shows among the weights."""
    path = tmp_path / "a.gguf"
    writer = gguf_package.GGUFWriter(path, "llama")
    writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))
    for key, field in gguf.REQUIRED.items():
        add = writer.add_float32 if "epsilon" in key else writer.add_uint32
        add(f"llama.{key}", attrgetter(field)(SMALL))
    writer.add_uint32("llama.vocab_size", SMALL.vocab_size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match=r"a\.gguf: .*unexpected: rope_freqs\.weight"):
        gguf.read(path)


QUESTION = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.slow
def test_smollm2_computes_what_torch_computes(smollm2_file):
    config = gguf.read_config(smollm2_file)
    assert config == SMOLLM2_135M
    params = gguf.read_params(smollm2_file, config)
    for name in ("blk.0.ffn_up.weight", "blk.29.ffn_down.weight"):
        _, i, module, _ = name.split(".")
        kernel = params["layers"]["mlp"][f"{module.removeprefix('ffn_')}_proj"]["kernel"][int(i)]
        packed = smollm2_file.rows(name), smollm2_file.tensors[name].kind
        np.testing.assert_array_equal(kernel.T, gguf_package.dequantize(*packed))
    tokenizer = gguf.read_tokenizer(smollm2_file).tokenizer
    tokens = np.array([tokenizer.encode(QUESTION).ids])
    expected = torch_logits(hf.to_transformers(config, params), tokens)
    np.testing.assert_allclose(decoder_logits(config, params, tokens), expected, atol=2e-4)
    assert tokenizer.decode([expected[0, -1].argmax()]) == "The"


@pytest.mark.slow
def test_smollm2_is_what_transformers_reads(smollm2_path, smollm2_file):
    config = gguf.read_config(smollm2_file)
    model = loaded_by_transformers(smollm2_path)
    assert_same_weights(gguf.read_params(smollm2_file, config), model)
    assert config.norm.eps == pytest.approx(model.config.rms_norm_eps, rel=1e-7)
    assert config.layer_kinds[0].rope.theta == model.config.rope_parameters["rope_theta"]
    assert config.max_positions == model.config.max_position_embeddings
