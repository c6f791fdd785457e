"""Every family against transformers: what it computes, its weights, its config, its adapters."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GenerationConfig

import lora_jax as lora
from interop import hf, torch_io
from interop.conversion import flatten, to_torch
from interop.families import FAMILIES, keymap_of
from interop.hf_attributes import REQUIRED
from interop.hf_config import fixed_attributes, from_attributes, to_attributes
from lora_jax.errors import InputError
from lora_jax.files import read_json
from lora_jax.models.decoder import Decoder, leaf_shapes
from lora_jax.models.forms import LayerKind, Rope
from lora_jax.models.generate import generate, language_model
from lora_jax.models.rope import frequencies

from family_cases import CASES, GPT2, OPT, SIZES, TOKENS, YARN, built, compiled, trace
from small_models import random_params

every_case = pytest.mark.parametrize("name", CASES)
every_family = pytest.mark.parametrize("name", FAMILIES)
# What caching and adapters may get wrong, once.
CACHED = (
    "mistral", "gemma3", "gpt2", "opt without biases", "phi3 while it grows",
)  # fmt: skip
ADAPTED = ("qwen3", "gemma3", "gpt2", "opt", "phi3")
PACKED = ("gemma3", "gpt2", "phi3 while it grows")


def logits_of(config):
    def model_fn(params, tokens):
        return Decoder(config).apply({"params": params}, tokens)[0]

    return model_fn


def close(actual, expected):
    """Within 1e-4, and within some roundings of the largest entry."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=min(1e-4, 3e-6 * np.ptp(expected)))


@every_case
def test_layers_and_logits_equal_transformers(name):
    case = built(name)
    hidden, logits = trace(case.config, case.params, TOKENS)
    close(hidden, case.hidden)
    close(logits, case.logits)
    changed = jax.tree.map(np.copy, case.params)
    changed["layers"]["self_attn"]["o_proj"]["kernel"][1] *= -1
    assert np.abs(trace(case.config, changed, TOKENS)[1] - case.logits).max() > 1e-2


@every_case
def test_weights_and_config_go_back_as_they_came(name, tmp_path):
    case = built(name)
    theirs = case.model.state_dict()
    for path, tensor in to_torch(case.params, keymap_of(case.config)).items():
        assert np.ascontiguousarray(tensor).tobytes() == theirs[path].numpy().tobytes(), path
    hf.write(tmp_path / "out", case.config, case.params)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(model) is type(case.model)
    assert not any(report.values())
    with torch.no_grad():
        logits = model(torch.from_numpy(TOKENS), use_cache=False).logits.numpy()
    np.testing.assert_array_equal(logits, case.logits)
    config, params = hf.read(tmp_path / "out")
    assert config == case.config
    before = flatten(case.params)
    for path, leaf in flatten(params).items():
        assert leaf.tobytes() == before.pop(path).tobytes(), path
    assert not before


@pytest.mark.parametrize("name", CACHED)
def test_generation_with_a_cache_equals_transformers(name):
    """Unequal prompts in one batch of ours, each by itself without a cache in theirs."""
    case = built(name)
    prompts = [TOKENS[0, :5].tolist(), TOKENS[1, :13].tolist()]
    answers = generate(language_model(case.config), case.params, prompts, max_new_tokens=8)
    for prompt, answer in zip(prompts, answers, strict=True):
        settings = GenerationConfig(do_sample=False, max_new_tokens=8, use_cache=False)
        theirs = case.model.generate(torch.tensor([prompt]), generation_config=settings)
        assert answer == theirs[0, len(prompt) :].tolist()
    assert len({token for answer in answers for token in answer}) > 1


@pytest.mark.parametrize("name", ADAPTED)
def test_an_adapter_is_low_rank_in_every_layer(name):
    case = built(name)

    config = lora.LoraConfig(rank=2, targets="all-linear")
    plan = lora.plan(logits_of(case.config), case.params, TOKENS, config=config)
    kernels = {path for path in leaf_shapes(case.config) if path.endswith("kernel")}
    assert {site.path for site in plan.sites} == kernels - {"lm_head/kernel"}
    assert not [use for site in plan.sites for use in site.uses if use.merged_because]
    assert all(site.shape[0] == case.config.num_layers for site in plan.sites)
    fresh = lora.init(jax.random.key(0), case.params, plan)
    key = jax.random.key(1)
    adapter = {
        path: pair._replace(b=0.1 * jax.random.normal(key, pair.b.shape))
        for path, pair in fresh.items()
    }
    adapted = compiled(lora.adapt(logits_of(case.config), plan))(case.params, adapter, TOKENS)
    merged = lora.merge(case.params, adapter, plan)
    close(adapted, np.asarray(trace(case.config, merged, TOKENS)[1]))
    assert np.abs(adapted - case.logits).max() > 0.1


@pytest.mark.parametrize("target", ["attention", "mlp"])
def test_presets_know_fused_weights(target):
    for name in ("gpt2", "phi3"):
        case = built(name)
        config = lora.LoraConfig(rank=2, targets=target)
        plan = lora.plan(logits_of(case.config), case.params, TOKENS, config=config)
        block = {"attention": "layers/self_attn/", "mlp": "layers/mlp/"}[target]
        kernels = {path for path in leaf_shapes(case.config) if path.endswith("kernel")}
        expected = {path for path in kernels if path.startswith(block)}
        assert {site.path for site in plan.sites} == expected
        assert len(expected) == 2


@pytest.mark.parametrize("name", PACKED)
def test_packed_rows_see_only_themselves(name):
    case = built(name)
    lengths = np.array([6, 18])
    tokens = np.concatenate([row[:length] for row, length in zip(TOKENS, lengths, strict=True)])
    positions = np.concatenate([np.arange(length) for length in lengths])
    segments = np.repeat([1, 2], lengths)
    packed, _ = compiled(Decoder(case.config).apply)(
        {"params": case.params}, tokens[None], positions[None], segments[None]
    )
    for row, length, part in zip(TOKENS, lengths, (slice(6), slice(6, 24)), strict=True):
        with torch.no_grad():
            alone = case.model(torch.from_numpy(row[None, :length]), use_cache=False).logits
        close(packed[0, part], alone[0].numpy())


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("mistral", (LayerKind(Rope(500.0), 8),)),
        ("qwen2 late windows", (LayerKind(Rope(500.0), 5),)),
        ("smollm3", (LayerKind(Rope(500.0)),)),
        ("gemma3", (LayerKind(Rope(5e3), 5), LayerKind(Rope(5e3)))),
    ],
    ids=str,
)
def test_other_windows_or_rotations_are_seen(name, other):
    case = built(name)
    wrong = dataclasses.replace(case.config, layer_kinds=other)
    logits = trace(wrong, case.params, TOKENS)[1]
    assert np.abs(logits - case.logits).max() > 1e-2


def test_gradients_through_recomputed_blocks_equal_transformers():
    case = built("gemma3")
    config = dataclasses.replace(case.config, remat=True)

    def loss(params):
        return (Decoder(config).apply({"params": params}, TOKENS)[0] ** 2).mean()

    gradients = to_torch(compiled(jax.grad(loss))(case.params), keymap_of(config))
    case.model.zero_grad()
    (case.model(torch.from_numpy(TOKENS), use_cache=False).logits ** 2).mean().backward()
    for path, weight in case.model.named_parameters():
        expected = weight.grad.numpy()
        np.testing.assert_allclose(
            gradients[path], expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=path
        )


def test_dynamic_scaling_refuses_rows_that_would_stretch():
    case = built("llama dynamic")
    longer = np.zeros((1, 65), np.int32)
    with pytest.raises(InputError, match="a row of 65 tokens exceeds max_positions=64"):
        jax.eval_shape(Decoder(case.config).apply, {"params": case.params}, longer)


def test_the_last_position_of_dynamic_scaling_is_answered():
    case = built("llama dynamic")
    prompt = [*TOKENS[0], *TOKENS[1, :16]]  # 40 tokens, which are padded to 64
    answers = generate(language_model(case.config), case.params, [prompt], max_new_tokens=24)
    settings = GenerationConfig(do_sample=False, max_new_tokens=24, use_cache=False)
    theirs = case.model.generate(torch.tensor([prompt]), generation_config=settings)
    assert answers[0] == theirs[0, 40:].tolist()


@pytest.mark.parametrize(
    ("name", "strip"), [("gpt2", "transformer."), ("opt", "model.")], ids=["gpt2", "opt"]
)
def test_names_of_older_files(name, strip):
    case = built(name)
    weights = to_torch(case.params, keymap_of(case.config))
    older = {path.removeprefix(strip): tensor for path, tensor in weights.items()}
    for path, leaf in flatten(hf.params_of(case.config, older)).items():
        np.testing.assert_array_equal(leaf, flatten(case.params)[path])


# config.json

SMALLEST = {
    "gpt2": GPT2,
    "opt": OPT,
    "minimind_first": {"model_type": "minimind", "dim": 32, "n_heads": 4},
    "minimind_moe": {**SIZES, "model_type": "minimind", "use_moe": True},
    "minimind_first_moe": {"model_type": "minimind", "dim": 32, "n_heads": 4, "use_moe": True},
}
# What has to be said for an attribute to be refused.
BESIDE = {
    "max_window_layers": {"use_sliding_window": True},
    "num_local_experts": {"num_experts": 4},
}


def smallest(name):
    """Attributes of a family with nothing but sizes."""
    return {"model_type": name, **SMALLEST.get(name, SIZES)}


def refusal(attributes):
    with pytest.raises(InputError) as raised:
        from_attributes(attributes)
    return str(raised.value)


@every_family
def test_what_is_unknown_is_refused_with_its_value(name):
    from_attributes(smallest(name))
    message = refusal(smallest(name) | {"mystery_factor": 0.25, "quantization_config": {"bits": 4}})
    assert "mystery_factor=0.25 (unknown attribute)" in message
    assert "quantization_config={'bits': 4} (unknown attribute)" in message


@every_family
def test_what_is_fixed_is_refused_otherwise(name):
    for attribute, known in fixed_attributes(FAMILIES[name], smallest(name)).items():
        for value in known:
            if attribute != "model_type":
                from_attributes(smallest(name) | {attribute: value})
        other = {"model_type": "falcon", "architectures": ["Other"]}.get(attribute, 7)
        said = BESIDE.get(attribute, {}) | {attribute: other}
        assert f"{attribute}={other!r}" in refusal(smallest(name) | said)


@every_family
def test_what_is_harmless_changes_nothing(name):
    said = dict.fromkeys(FAMILIES[name].harmless, 0.125)
    assert from_attributes(smallest(name) | said) == from_attributes(smallest(name))


@every_family
def test_handled_attributes_are_required_and_typed(name):
    for attribute in FAMILIES[name].handled:
        wrong = refusal(smallest(name) | {attribute.name: "several"})
        assert f"{attribute.name}='several'" in wrong
        if attribute.default is REQUIRED:
            less = {k: v for k, v in smallest(name).items() if k != attribute.name}
            assert f"{attribute.name} is missing" in refusal(less)


@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith("minimind")])
def test_absent_attributes_have_the_defaults_of_transformers(name):
    import transformers

    sizes = smallest(name)
    if name not in SMALLEST:
        sizes = {k: v for k, v in sizes.items() if k not in ("head_dim", "max_position_embeddings")}
    config_class = getattr(transformers, FAMILIES[name].architecture).config_class
    theirs = config_class(**sizes).to_dict() | {"dtype": "float32"}
    assert from_attributes(sizes) == from_attributes(theirs)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "smollm3"])
def test_a_null_for_key_heads_is_one_for_each_query_head(name):
    import transformers

    sizes = smallest(name) | {"num_attention_heads": 8, "num_key_value_heads": None}
    theirs = getattr(transformers, FAMILIES[name].architecture).config_class(**sizes).to_dict()
    assert from_attributes(sizes) == from_attributes(theirs)
    assert from_attributes(sizes).num_kv_heads == 8


@pytest.mark.parametrize(
    ("said", "rounded"),
    [
        ({}, True),
        ({"truncate": True}, True),
        ({"truncate": False}, False),
        ({"truncate": None}, False),
    ],
)
def test_the_ends_of_a_ramp_are_rounded_as_transformers_rounds_them(said, rounded):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    yarn = {**YARN, "original_max_position_embeddings": 64, **said}
    attributes = smallest("llama") | {"rope_theta": 500.0, "rope_parameters": yarn}
    theirs, _ = ROPE_INIT_FUNCTIONS["yarn"](LlamaConfig(**attributes))
    config = from_attributes(attributes)
    rope = config.layer_kinds[0].rope
    np.testing.assert_allclose(frequencies(config, rope).per_feature, theirs, rtol=1e-6)
    assert rope.scaling.truncate == rounded
    scaling = dataclasses.replace(rope.scaling, truncate=not rounded)
    other = frequencies(config, dataclasses.replace(rope, scaling=scaling)).per_feature
    assert not np.allclose(other, theirs, rtol=1e-3)


SETTINGS = (
    "rope_type", "type", "factor", "rope_theta", "short_factor", "long_factor", "beta_fast",
    "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "full_attention",
    "partial_rotary_factor", "attention_factor",
)  # fmt: skip
REFUSED = {
    "no such layer type": ("qwen3", {"layer_types": ["chunked_attention"] * 3}),
    "too few layer types": ("qwen3", {"layer_types": ["full_attention"]}),
    "sliding without a window": ("qwen2", {"layer_types": ["sliding_attention"] * 3}),
    "windows of no width": ("gemma3_text", {"sliding_window": None}),
    "one rotation for two": ("gemma3_text", {"rope_parameters": {"rope_theta": 5e3}}),
    "norms after": ("opt", {"do_layer_norm_before": False}),
    "projected embeddings": ("opt", {"word_embed_proj_dim": 16}),
    "rotations of a learned table": ("gpt2", {"rope_theta": 1e4}),
    "a part of each head": ("qwen2", {"partial_rotary_factor": 0.5}),
    "both directions": ("gemma3_text", {"use_bidirectional_attention": True}),
    "a billion layers": ("smollm3", {"num_hidden_layers": 10**9}),
    "a period of nothing": ("gemma3_text", {"sliding_window_pattern": 0}),
    "no number": ("llama", {"rope_theta": float("inf")}),
}


@pytest.mark.parametrize(("name", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_implemented_is_refused(name, said):
    message = refusal(smallest(name) | said)
    for attribute, value in said.items():
        assert f"{attribute}={value!r}" in message or f"{attribute} is {value}" in message


def test_factors_that_do_not_fit_a_head():
    scaling = {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0] * 4}
    assert "short_factor has 1 entries for 4 frequencies" in refusal(
        smallest("phi3") | {"rope_scaling": scaling}
    )


def test_what_a_family_cannot_say_is_not_written():
    config = dataclasses.replace(built("qwen3 windows").config, family="llama")
    with pytest.raises(
        InputError, match=r"layer_kinds=.* has no counterpart .* of llama"
    ) as raised:
        to_attributes(config, dtype="float32")
    assert "heads=True" in str(raised.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
    | st.sampled_from(["sliding_attention", "llama3", "yarn", "longrope", "gelu"]),
    lambda some: st.lists(some, max_size=4)
    | st.dictionaries(st.sampled_from(SETTINGS), some, max_size=4),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=300, deadline=1000, derandomize=True, database=None)
@given(st.data())
def test_whatever_an_attribute_holds_it_is_read_or_refused(data):
    name = data.draw(st.sampled_from(sorted(FAMILIES)))
    names = [attribute.name for attribute in FAMILIES[name].handled]
    said = data.draw(st.dictionaries(st.sampled_from([*names, "model_type"]), JSON, max_size=2))
    try:
        config = from_attributes(smallest(name) | said)
    except InputError:
        return
    for kind in config.layer_kinds:
        if kind.rope:
            assert np.isfinite(frequencies(config, kind.rope).per_feature).all()


# MiniMind

FIRST = {"model_type": "minimind", "dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 61}


def test_the_first_minimind_is_llama_with_rotated_neighbours(tmp_path):
    config = from_attributes(FIRST)
    assert (config.intermediate_size, config.num_kv_heads, config.family) == (
        128, 2, "minimind_first",
    )  # fmt: skip
    params = random_params(config)
    _, logits = trace(config, params, TOKENS)
    with torch.no_grad():
        theirs = hf.to_transformers(config, params)
        close(logits, theirs(torch.from_numpy(TOKENS)).logits.numpy())
    names = to_torch(params, keymap_of(config))
    order = torch.from_numpy(names["layers.1.attention.wk.weight"].copy())
    halves = order.view(2, 4, 2, 32).transpose(1, 2).reshape(16, 32)
    assert torch.equal(halves, theirs.state_dict()["model.layers.1.self_attn.k_proj.weight"])
    halved = dataclasses.replace(config, rope_interleaved=False)
    assert np.abs(trace(halved, params, TOKENS)[1] - logits).max() > 1e-2


def test_a_pth_of_the_first_minimind_is_read(tmp_path):
    config = from_attributes(FIRST)
    params = random_params(config, "float16")
    weights = {
        name: torch.from_numpy(a.copy()) for name, a in to_torch(params, keymap_of(config)).items()
    }
    weights["output.weight"] = weights["tok_embeddings.weight"]
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in weights.items()}
    torch.save(wrapped, tmp_path / "full_sft_32.pth")
    read = hf.params_of(config, torch_io.read(tmp_path / "full_sft_32.pth"))
    for path, leaf in flatten(read).items():
        assert leaf.tobytes() == flatten(params)[path].tobytes(), path


@pytest.mark.parametrize("scaling", [None, {"type": "yarn", "factor": 16, "beta_fast": 32,
    "beta_slow": 1, "attention_factor": 1.0, "original_max_position_embeddings": 16}],
    ids=["plain", "yarn"])  # fmt: skip
def test_the_current_minimind_is_qwen3(scaling, tmp_path):
    said = {**SIZES, "model_type": "minimind", "rope_scaling": scaling, "flash_attn": True}
    config = from_attributes(said | {"inference_rope_scaling": scaling is not None})
    assert config.norm.heads
    params = random_params(config)
    hf.write(tmp_path / "out", config, params)
    assert hf.read(tmp_path / "out")[0] == config
    written = read_json(tmp_path / "out" / "config.json")
    assert written["inference_rope_scaling"] is (scaling is not None)
    theirs = hf.to_transformers(config, params)
    assert type(theirs).__name__ == "Qwen3ForCausalLM"
    with torch.no_grad():
        close(trace(config, params, TOKENS)[1], theirs(torch.from_numpy(TOKENS)).logits.numpy())


STRETCHED = {"type": "yarn", "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0}


@pytest.mark.parametrize("group", ["rope_scaling", "rope_parameters"])
def test_minimind_stretches_rotations_only_where_it_says_so(group):
    said = {**SIZES, "model_type": "minimind", group: STRETCHED}
    config = from_attributes(said | {"inference_rope_scaling": True})
    assert config.layer_kinds[0].rope.scaling.factor == 16
    for other in (said, said | {"inference_rope_scaling": False}):
        assert "inference_rope_scaling=False (known: True" in refusal(other)
    plain = said | {group: None, "inference_rope_scaling": True}
    assert "inference_rope_scaling=True (known: False" in refusal(plain)
