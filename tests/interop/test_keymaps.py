"""The tables against transformers' and gguf's own names, and strictness in both directions."""

import dataclasses

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from interop.conversion import flatten, from_torch, nest, to_torch
from interop.hf_config import to_attributes
from interop.keymaps import LLAMA, LLAMA_GGUF, Keymap, Rule, leaf_path, module_name
from lora_jax.errors import InputError
from lora_jax.models.decoder import leaf_shapes
from lora_jax.models.forms import AttentionForm

from clocks import within
from small_models import SMALL, VARIANTS, random_params

variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())


@variants
def test_names_and_shapes_are_those_of_transformers(changes):
    config = dataclasses.replace(SMALL, **changes)
    model = LlamaForCausalLM(LlamaConfig(**to_attributes(config, dtype="float32")))
    theirs = {name: tuple(p.shape) for name, p in model.named_parameters()}  # tied ones once
    ours = {name: a.shape for name, a in to_torch(random_params(config), LLAMA).items()}
    assert ours == theirs


def test_gguf_names_are_those_of_the_gguf_package():
    config = dataclasses.replace(SMALL, tie_embeddings=False, attention=AttentionForm(bias=True))
    params = random_params(config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_layers)
    translated = [
        names.get_name(name, try_suffixes=(".weight", ".bias")) for name in to_torch(params, LLAMA)
    ]
    assert translated == list(to_torch(params, LLAMA_GGUF))


@pytest.mark.parametrize("table", [LLAMA, LLAMA_GGUF], ids=["torch", "gguf"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_round_trip_is_byte_equal(table, dtype):
    config = dataclasses.replace(SMALL, tie_embeddings=False, attention=AttentionForm(bias=True))
    params = random_params(config, dtype)
    back = from_torch(to_torch(params, table), table, leaf_shapes(config))
    ours, theirs = flatten(params), flatten(back)
    assert list(ours) == list(theirs)
    for path, leaf in ours.items():
        assert theirs[path].dtype == leaf.dtype
        assert theirs[path].tobytes() == leaf.tobytes(), path


def test_every_layer_goes_to_its_own_tensor_transposed():
    params = random_params(SMALL)
    weights = to_torch(params, LLAMA)
    kernels = params["layers"]["mlp"]["up_proj"]["kernel"]
    for i, kernel in enumerate(kernels):
        np.testing.assert_array_equal(weights[f"model.layers.{i}.mlp.up_proj.weight"], kernel.T)
    assert not np.array_equal(kernels[0], kernels[1])


def test_jax_arrays_are_leaves_too():
    params = jax.tree.map(lambda leaf: jax.numpy.asarray(leaf, "bfloat16"), random_params(SMALL))
    weights = to_torch(params, LLAMA)
    assert {array.dtype for array in weights.values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_the_result_owns_its_memory_and_the_input_is_untouched():
    weights = {n: a.copy() for n, a in to_torch(random_params(SMALL), LLAMA).items()}
    before = {name: array.copy() for name, array in weights.items()}
    for leaf in flatten(from_torch(weights, LLAMA, leaf_shapes(SMALL))).values():
        leaf[...] = 0
    for name, array in weights.items():
        np.testing.assert_array_equal(array, before[name])


def test_dtype_can_be_chosen():
    back = from_torch(
        to_torch(random_params(SMALL, "bfloat16"), LLAMA),
        LLAMA,
        leaf_shapes(SMALL),
        dtype="float32",
    )
    assert {leaf.dtype for leaf in flatten(back).values()} == {np.dtype("float32")}


def test_everything_that_does_not_fit_is_in_one_error():
    weights = to_torch(random_params(SMALL), LLAMA)
    del weights["model.norm.weight"]
    for i in range(SMALL.num_layers):
        del weights[f"model.layers.{i}.mlp.up_proj.weight"]
    weights["model.layers.0.self_attn.q_norm.weight"] = np.ones(16, np.float32)
    weights["model.layers.1.mlp.gate_proj.weight"] = np.ones((3, 5), np.float32)
    weights["model.layers.2.mlp.down_proj.weight"] = np.ones((64, 96), np.int8)
    with pytest.raises(InputError) as caught:
        from_torch(weights, LLAMA, leaf_shapes(SMALL))
    for part in (
        "missing: model.layers.{0..2}.mlp.up_proj.weight, model.norm.weight",
        "unexpected: model.layers.0.self_attn.q_norm.weight",
        "model.layers.1.mlp.gate_proj.weight is (3, 5), expected (96, 64)",
        "not floating point: model.layers.2.mlp.down_proj.weight is int8",
        "model.layers.{i}.mlp.down_proj.weight is float32 and int8",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["x.{}.weight", "x{}.weight"])
def test_a_hundred_thousand_names_make_a_short_error(name):
    one = np.ones(2, np.float32)
    weights = to_torch(random_params(SMALL), LLAMA)
    weights |= {name.format(2 * n): one for n in range(100_000)}
    with pytest.raises(InputError, match=r"unexpected: .*(,\.\.\.}|and 99950 more)") as caught:
        within(1, lambda: from_torch(weights, LLAMA, leaf_shapes(SMALL)))
    assert len(str(caught.value)) < 2000


def test_rotary_buffers_of_old_checkpoints_are_ignored():
    weights = to_torch(random_params(SMALL), LLAMA)
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(8) for i in range(3)}
    from_torch(weights | buffers, LLAMA, leaf_shapes(SMALL))
    with pytest.raises(InputError, match=r"unexpected: .*inv_freq_scale"):
        from_torch(
            weights | {"model.rotary_emb.inv_freq_scale": np.ones(8)}, LLAMA, leaf_shapes(SMALL)
        )


def test_a_tied_head_may_be_repeated_but_not_differ():
    weights = to_torch(random_params(SMALL), LLAMA)
    head = weights["model.embed_tokens.weight"].copy()
    from_torch(weights | {"lm_head.weight": head}, LLAMA, leaf_shapes(SMALL))
    head[0, 0] += 1
    with pytest.raises(InputError, match=r"not the copy it should be: lm_head\.weight of model"):
        from_torch(weights | {"lm_head.weight": head}, LLAMA, leaf_shapes(SMALL))


def test_unknown_leaves_are_named():
    with pytest.raises(InputError, match=r"no tensor name for layers/q_norm/scale"):
        to_torch({"layers": {"q_norm": {"scale": np.ones((2, 3))}}}, LLAMA)


def test_module_names_and_leaf_paths_are_inverses():
    weights = [rule for rule in LLAMA.rules if rule.name.endswith(".weight")]
    for rule in weights:
        layer = (11,) * rule.stack
        assert leaf_path(module_name(rule.path, LLAMA, layer), LLAMA) == (rule.path, layer)
    model = LlamaForCausalLM(LlamaConfig(**to_attributes(SMALL, dtype="float32")))
    names = {module_name(rule.path, LLAMA, (2,) * rule.stack) for rule in weights}
    assert names <= {name for name, _ in model.named_modules()}


@pytest.mark.parametrize(
    ("ask", "fault"),
    [
        (lambda: module_name("layers/mlp/up_proj/kernel", LLAMA), "1 stack axes"),
        (lambda: module_name("norm/scale", LLAMA, (1,)), "0 stack axes"),
        (lambda: module_name("norm/kernel", LLAMA), "no module holds 'norm/kernel'"),
        (lambda: leaf_path("model.layers.01.mlp.up_proj", LLAMA), "no leaf for module"),
        (lambda: leaf_path("model.layers.1.mlp", LLAMA), "no leaf for module"),
    ],
)
def test_names_that_mean_nothing_are_refused(ask, fault):
    with pytest.raises(InputError, match=fault):
        ask()


EXPERTS = Keymap(
    (
        Rule("moe/gate_up", "h.{i}.experts.{e}.gate.weight", (1, 0), "linear", (0, 2)),
        Rule("moe/gate_up", "h.{i}.experts.{e}.up.weight", (1, 0), "linear", (1, 2)),
        Rule("conv_{i}/kernel", "convs.{i}.weight", (3, 2, 0, 1), "conv"),
    )
)


def test_experts_parts_and_leaves_of_single_layers():
    rng = np.random.default_rng(0)
    shapes = {
        "moe/gate_up": (2, 3, 4, 10),
        "conv_0/kernel": (3, 3, 2, 5),
        "conv_1/kernel": (1,) * 4,
    }
    leaves = {path: rng.normal(size=shape) for path, shape in shapes.items()}
    tensors = to_torch(nest(leaves), EXPERTS)
    assert len(tensors) == 2 * 3 * 2 + 2
    for i, e in np.ndindex(2, 3):
        both = leaves["moe/gate_up"][i, e]
        np.testing.assert_array_equal(tensors[f"h.{i}.experts.{e}.gate.weight"], both[:, :5].T)
        np.testing.assert_array_equal(tensors[f"h.{i}.experts.{e}.up.weight"], both[:, 5:].T)
    assert tensors["convs.0.weight"].shape == (5, 2, 3, 3)
    back = flatten(from_torch(tensors, EXPERTS, shapes))
    assert all(np.array_equal(back[path], leaf) for path, leaf in leaves.items())
    short = {name: t for name, t in tensors.items() if name != "h.1.experts.2.up.weight"}
    with pytest.raises(InputError, match=r"missing: h\.1\.experts\.2\.up\.weight"):
        from_torch(short, EXPERTS, shapes)
