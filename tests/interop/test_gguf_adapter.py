"""llama.cpp adapter files against the runtime's arithmetic, written out in NumPy."""

import dataclasses
import math
import subprocess
import sys

import gguf as gguf_package
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

import lora_jax as lora
from interop.adapter_file import delta_weight
from interop.adapter_plan import from_plan, to_plan
from interop.conversion import from_torch, to_torch
from interop.gguf_adapter import read, read_for_inspection
from interop.gguf_adapter_writing import write
from interop.keymaps import LLAMA, LLAMA_GGUF
from lora_jax.errors import InputError
from lora_jax.models.decoder import leaf_shapes

from gguf_adapters import gguf_name, random_adapter, stored_factors, write_with_package
from small_models import SMALL, decoder_logits, gguf_tensors, random_params

UNTIED = dataclasses.replace(SMALL, num_layers=2, tie_embeddings=False)
CONFIGS = {
    "tied": SMALL,
    "untied": UNTIED,
    "wide_heads": dataclasses.replace(UNTIED, head_dim=24, num_kv_heads=1),
}
Q_PROJ = "model.layers.0.self_attn.q_proj"
TOKENS = np.random.default_rng(3).integers(0, SMALL.vocab_size, (2, 12))


def package_view(path):
    """Metadata and dequantised tensors as the gguf package reads them."""
    reader = gguf_package.GGUFReader(path)
    fields = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    tensors = {t.name: gguf_package.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    return fields, tensors


def runtime_weights(base, path):
    """What llama.cpp multiplies with: W + alpha / rank · B A, and 1 for an alpha of 0."""
    fields, stored = package_view(path)
    alpha = fields.get("adapter.lora.alpha", 0.0)
    weights = dict(base)
    for name in {name.rpartition(".")[0] for name in stored}:
        a, b = stored[f"{name}.lora_a"], stored[f"{name}.lora_b"]
        scale = alpha / b.shape[1] if alpha else 1.0
        weights[name] = base[name] + scale * (a @ b.T if name == "token_embd.weight" else b @ a)
    return weights


def loaded(config, weights):
    """Parameters from a base's tensors in llama.cpp's order."""
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}

    def halves(name, rows):
        n = next((heads[part] for part in name.split(".") if part in heads), None)
        if n is None:
            return rows
        return rows.reshape(n, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)

    weights = {name: halves(name, rows) for name, rows in weights.items()}
    return from_torch(weights, LLAMA_GGUF, leaf_shapes(config), dtype="float32")


def adapted(config, params, adapter):
    """The base with ΔW added to each weight, by torch name."""
    weights = to_torch(params, LLAMA)
    for name, module in adapter.modules.items():
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + delta_weight(module)
    return from_torch(weights, LLAMA, leaf_shapes(config))


def assert_same_modules(found, expected):
    assert found.modules.keys() == expected.modules.keys()
    for name, module in expected.modules.items():
        np.testing.assert_array_equal(found.modules[name].a, module.a, name)
        np.testing.assert_array_equal(found.modules[name].b, module.b, name)
        assert found.modules[name].kind == module.kind
        assert found.modules[name].scale == pytest.approx(module.scale, rel=1e-7)


def assert_runtime_computes(path, config, adapter, tolerance):
    """The runtime's weights are the base's with ΔW, and are not the base's."""
    params = random_params(config)
    base = dict(gguf_tensors(config, params))
    found = to_torch(loaded(config, runtime_weights(base, path)), LLAMA)
    expected = to_torch(adapted(config, params, adapter), LLAMA)
    for name, weight in to_torch(params, LLAMA).items():
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=tolerance)
        module = adapter.modules.get(name.removesuffix(".weight"))
        assert (np.abs(weight - expected[name]).max() > 1e-2) == bool(module and module.scale)


def test_what_is_read_computes_what_the_runtime_computes(tmp_path):
    params = random_params(UNTIED)
    adapter = random_adapter(UNTIED)
    path = write_with_package(tmp_path / "a.gguf", stored_factors(adapter, UNTIED))
    expected = loaded(UNTIED, runtime_weights(dict(gguf_tensors(UNTIED, params)), path))
    wanted = decoder_logits(UNTIED, expected, TOKENS)
    entries, plan = to_plan(read(path, UNTIED), params, LLAMA)
    found = decoder_logits(UNTIED, lora.merge(params, entries, plan), TOKENS)
    np.testing.assert_allclose(found, wanted, atol=2e-4)
    assert np.abs(decoder_logits(UNTIED, params, TOKENS) - wanted).max() > 1e-1
    in_file_order = read(path, dataclasses.replace(UNTIED, rope_interleaved=True))
    entries, plan = to_plan(in_file_order, params, LLAMA)
    wrong = decoder_logits(UNTIED, lora.merge(params, entries, plan), TOKENS)
    assert np.abs(wrong - wanted).max() > 1e-1


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(
    ("alpha", "kind"),
    [(6.0, Kind.F32), (0.8, Kind.F16), (6.0, Kind.BF16), (0.0, Kind.F32), (None, Kind.F32)],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_each_alpha_and_type_is_read_exactly(tmp_path, config, alpha, kind):
    adapter = random_adapter(config, scale=alpha / 4 if alpha else 1.0)
    tensors = stored_factors(adapter, config)
    path = write_with_package(tmp_path / "a.gguf", tensors, alpha=alpha, kind=kind)
    assert_same_modules(read(path, config), adapter)
    assert_runtime_computes(path, config, adapter, 1e-6)
    noted = any("alpha is 0 or absent" in note for note in read(path, config).notes)
    assert noted == (not alpha)


def test_a_quantised_adapter_is_what_the_package_dequantises(tmp_path):
    adapter = random_adapter(UNTIED, rank=32)
    path = write_with_package(tmp_path / "a.gguf", stored_factors(adapter, UNTIED), kind=Kind.Q8_0)
    assert_runtime_computes(path, UNTIED, read(path, UNTIED), 1e-6)


def ranks(module):
    return 2 + len(module) % 4


RANKS_AND_SCALES = {
    # rank, scale -> alpha, whether B changes
    "one alpha": (4, 1.5, 6.0, False),
    "one alpha, ranks that differ": (ranks, lambda m: 6 / ranks(m), 6.0, False),
    "an alpha that float32 rounds": (3, 0.1, float(np.float32(3 * 0.1)), False),
    "rank-stabilised": (ranks, lambda m: 6 / math.sqrt(ranks(m)), 5.0, True),
    "one scale, ranks that differ": (ranks, 1.5, 5.0, True),
    "scales that differ": (4, lambda m: 0.5 + len(m) % 2, 4.0, True),
    "no effect": (4, 0.0, 4.0, True),
    "against the base": (4, -1.5, 4.0, True),
}


@pytest.mark.parametrize(
    ("rank", "scale", "alpha", "folds"), RANKS_AND_SCALES.values(), ids=RANKS_AND_SCALES
)
def test_ranks_and_scales_are_written_so_that_the_runtime_has_them(
    tmp_path, rank, scale, alpha, folds
):
    adapter = random_adapter(UNTIED, rank=rank, scale=scale)
    path, again = tmp_path / "a.gguf", tmp_path / "b.gguf"
    notes = write(path, adapter, UNTIED)
    assert package_view(path)[0]["adapter.lora.alpha"] == alpha
    assert_runtime_computes(path, UNTIED, adapter, 2e-6 if folds else 1e-6)
    assert bool(notes) == folds
    if not folds:
        assert_same_modules(read(path, UNTIED), adapter)
    assert write(again, read(path, UNTIED), UNTIED) == ()
    assert path.read_bytes() == again.read_bytes()


def test_folded_scales_are_told(tmp_path):
    adapter = random_adapter(UNTIED, scale=lambda module: 3.0 if module == "lm_head" else 0.5)
    assert write(tmp_path / "a.gguf", adapter, UNTIED) == (
        "'model.embed_tokens' and 14 more: 0.5 multiplied into B",
        "'lm_head': 3 multiplied into B",
    )


def test_a_file_is_what_the_package_writes(tmp_path):
    """Also without regard to the order of the modules; layers of rank 0 are left out."""
    adapter = random_adapter(UNTIED)
    expected = stored_factors(adapter, UNTIED)
    none = adapter.modules[Q_PROJ]._replace(a=np.zeros((0, 64)), b=np.zeros((64, 0)))
    turned = dict(reversed(adapter.modules.items()))
    absent = {name: expected[f"blk.0.attn_q.weight.lora_{name}"] for name in "ab"}
    for name, changes in (("a", {}), ("b", {Q_PROJ: none})):
        write(tmp_path / name, adapter._replace(modules=turned | changes), UNTIED)
    fields, tensors = package_view(tmp_path / "a")
    identity = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}
    assert fields == identity | {"adapter.lora.alpha": 6.0}
    assert tensors.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(tensors[name], array, name)
    write(tmp_path / "c", adapter, UNTIED)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes()
    left = package_view(tmp_path / "b")[1].keys()
    assert expected.keys() - left == {f"blk.0.attn_q.weight.lora_{name}" for name in absent}


def test_rows_stay_where_the_model_rotates_neighbours_itself(tmp_path):
    adapter = random_adapter(UNTIED)
    interleaved = dataclasses.replace(UNTIED, rope_interleaved=True)
    write(tmp_path / "a", adapter, interleaved)
    assert_same_modules(read(tmp_path / "a", interleaved), adapter)
    stored = package_view(tmp_path / "a")[1]["blk.0.attn_q.weight.lora_b"]
    np.testing.assert_array_equal(stored, adapter.modules[Q_PROJ].b)
    assert (read(tmp_path / "a", UNTIED).modules[Q_PROJ].b != stored).any()


def test_float16_halves_the_file_and_rounds_once(tmp_path):
    adapter = random_adapter(UNTIED, scale=lambda module: 1 / (1 + len(module)))
    write(tmp_path / "a", adapter, UNTIED, dtype="float16")
    write(tmp_path / "b", adapter, UNTIED)
    assert (tmp_path / "a").stat().st_size < 0.6 * (tmp_path / "b").stat().st_size
    halves, whole = package_view(tmp_path / "a")[1], package_view(tmp_path / "b")[1]
    for name, array in whole.items():
        np.testing.assert_allclose(halves[name], array, rtol=2**-11, atol=2**-25)
    large = random_adapter(UNTIED, scale=lambda module: 1e6 if module == Q_PROJ else 1.0)
    with pytest.raises(InputError, match=r"values overflow float16: 'blk.0.attn_q.weight.lora_b'"):
        write(tmp_path / "c", large, UNTIED, dtype="float16")


def test_a_plan_goes_through_a_file_unchanged(tmp_path):
    params = random_params(UNTIED)
    entries, plan = to_plan(
        random_adapter(UNTIED, rank=ranks, scale=lambda m: 6 / ranks(m)), params, LLAMA
    )
    write(tmp_path / "a", from_plan(entries, plan, LLAMA, params=params), UNTIED)
    again, same_plan = to_plan(read(tmp_path / "a", UNTIED), params, LLAMA)
    assert same_plan == plan
    for path, entry in entries.items():
        np.testing.assert_array_equal(entry.a, again[path].a)
        np.testing.assert_array_equal(entry.b, again[path].b)


def test_norms_are_read_and_said_to_be_ignored_elsewhere(tmp_path):
    tensors = stored_factors(random_adapter(UNTIED), UNTIED)
    tensors["blk.1.ffn_norm.weight"] = np.arange(64, dtype=np.float32)
    path = write_with_package(tmp_path / "a", tensors)
    found = read(path, UNTIED)
    name = "model.layers.1.post_attention_layernorm.weight"
    assert found.whole.keys() == {name}
    np.testing.assert_array_equal(found.whole[name], np.arange(64))
    assert found.notes == (
        "norms are trained too: llama.cpp itself doesn't read them, and keeps the base's",
    )
    with pytest.raises(InputError, match=f"'{name}' is trained whole"):
        write(tmp_path / "b", found, UNTIED)


LOOK = """
import sys
from interop.gguf_adapter import read_for_inspection
found = read_for_inspection(sys.argv[1])
print({"jax", "torch"} & {*sys.modules}, [*found.modules][:2], *found.notes)
"""


def test_a_look_at_a_file_needs_neither_base_nor_jax(tmp_path):
    tensors = stored_factors(random_adapter(UNTIED), UNTIED)
    path = write_with_package(tmp_path / "a", tensors)
    printed = subprocess.check_output([sys.executable, "-c", LOOK, str(path)], text=True)
    names = "['token_embd', 'blk.0.ffn_down']"
    note = "names and the order of rows are the file's own: a base's config gives torch's"
    assert printed.strip() == f"set() {names} {note}"
    named = read_for_inspection(path).modules
    for name, module in read(path, UNTIED).modules.items():
        own = named[gguf_name(name).removesuffix(".weight")]
        assert own.kind == module.kind
        values = (np.linalg.svd(delta_weight(m), compute_uv=False) for m in (own, module))
        np.testing.assert_allclose(*values, atol=1e-5)
