"""PEFT directories against real PEFT: what we write computes our function there, and back."""

import json
import os
import stat
import time
import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import peft as reference
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

import lora_jax as lora
from interop import hf, peft, torch_io
from interop.keymaps import LLAMA, Keymap, Rule, module_name
from interop.manifest import MANIFEST
from interop.peft import CONFIG, PICKLED_WEIGHTS, WEIGHTS
from interop.peft_config import PeftConfig, adapted_modules, config_of, module_names
from lora_jax.models.config import DecoderConfig
from lora_jax.models.decoder import Decoder, init_params, param_shapes
from lora_jax.site import Plan, Site

DECODER = DecoderConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    tie_embeddings=False,
)
TOKENS = np.random.default_rng(0).integers(0, DECODER.vocab_size, (2, 24))
PROJECTIONS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
Q, K = "layers/self_attn/q_proj/kernel", "layers/self_attn/k_proj/kernel"
Q_A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


def model_fn(params, tokens):
    return Decoder(DECODER).apply({"params": params}, tokens)[0]


@pytest.fixture(scope="module")
def params():
    leaves = init_params(jax.random.key(0), DECODER)
    # Larger projections, so that attention is not uniform.
    return jax.tree.map(lambda leaf: 4 * leaf if leaf.ndim == 3 else leaf, leaves)


def planned(params, **config):
    axes = {"layers/.*": "stack in out", "(lm_head|embed_tokens)/.*": "in out"}
    return lora.plan_from_axes(params, lora.LoraConfig(**config), axes)


def trained(params, **config):
    """A plan and an adapter that is zero nowhere."""
    plan = planned(params, **config)
    rng = np.random.default_rng(1)

    def normal(std, shape):
        return jnp.asarray(rng.normal(0, std, shape), jnp.float32)

    return {
        s.path: lora.LoraPair(normal(0.1, s.a_shape), normal(0.2, s.b_shape)) for s in plan.sites
    }, plan


@pytest.fixture(scope="module")
def pair(params):
    return trained(params, rank=4, alpha=8, targets=r".*_proj/kernel")


@pytest.fixture
def directory(tmp_path, pair):
    peft.write(tmp_path / "adapter", *pair, keymap=LLAMA)
    return tmp_path / "adapter"


def our_logits(params, adapter, plan):
    return np.asarray(jax.jit(lora.adapt(model_fn, plan))(params, adapter, TOKENS))


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def load_with_peft(params, directory):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # What PEFT calls in transformers, whatever the adapter.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        return reference.PeftModel.from_pretrained(hf.to_transformers(DECODER, params), directory)


def edit_config(directory, **changes):
    """As another program would: the manifest goes."""
    (directory / MANIFEST).unlink(missing_ok=True)
    path = directory / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory, edit):
    (directory / MANIFEST).unlink(missing_ok=True)
    tensors = {n: np.array(t) for n, t in torch_io.read(directory / WEIGHTS).items()}
    edit(tensors)
    torch_io.write(directory / WEIGHTS, tensors)


EXPORTS = {
    "all projections": dict(rank=4, alpha=8, targets=r".*_proj/kernel"),
    "alpha not integral": dict(rank=3, alpha=3.3, targets=r".*(q|v)_proj/kernel"),
    "rslora": dict(rank=8, alpha=8, targets=r".*mlp/.*", use_rslora=True),
    "untied head": dict(rank=4, alpha=8, targets=("lm_head/kernel", r".*o_proj/kernel")),
    "head alone": dict(rank=4, alpha=8, targets="lm_head/kernel"),
    "ranks and alphas differ": dict(
        rank=4,
        alpha=8,
        targets=(
            lora.Rule(r".*/k_proj/kernel", rank=2),
            lora.Rule(r".*/down_proj/kernel", rank=16, alpha=5.5),
            lora.Rule(r".*/o_proj/kernel", alpha=1),
            r".*_proj/kernel",
        ),
    ),
}


@pytest.mark.parametrize("config", EXPORTS.values(), ids=EXPORTS)
def test_peft_computes_our_function(tmp_path, params, config):
    adapter, plan = trained(params, **config)
    peft.write(tmp_path / "adapter", adapter, plan, keymap=LLAMA, base_model_name="org/base")
    model = load_with_peft(params, tmp_path / "adapter")
    theirs = torch_logits(model)
    np.testing.assert_allclose(our_logits(params, adapter, plan), theirs, atol=1e-5, rtol=0)
    with model.disable_adapter():
        assert np.abs(theirs - torch_logits(model)).max() > 0.1


@pytest.mark.parametrize("config", EXPORTS.values(), ids=EXPORTS)
def test_reading_gives_back_what_was_written(tmp_path, params, config):
    adapter, plan = trained(params, **config)
    peft.write(tmp_path / "one", adapter, plan, keymap=LLAMA, base={"name": "x"})
    read, read_plan = peft.read(tmp_path / "one", params, keymap=LLAMA)
    assert list(read_plan) == list(plan)
    assert read_plan.base_parameters == plan.base_parameters
    for mine, theirs in zip(plan.sites, read_plan.sites, strict=True):
        assert (mine.shape, mine.roles, mine.rank) == (theirs.shape, theirs.roles, theirs.rank)
        assert mine.scale == theirs.scale
    jax.tree.map(np.testing.assert_array_equal, adapter, read)
    peft.write(tmp_path / "two", read, read_plan, keymap=LLAMA, base={"name": "x"})
    for name in (CONFIG, WEIGHTS, MANIFEST):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


IMPORTS = {
    "plain": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "rslora": dict(r=4, lora_alpha=8, target_modules=["q_proj"], use_rslora=True),
    "all-linear": dict(r=4, lora_alpha=8, target_modules="all-linear"),
    "regular expression": dict(r=4, lora_alpha=8, target_modules=r".*\.(q_proj|up_proj)"),
    "exclusion": dict(r=4, lora_alpha=8, target_modules=PROJECTIONS, exclude_modules=["q_proj"]),
    "patterns": dict(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "k_proj", "down_proj", "lm_head"],
        rank_pattern={"self_attn.q_proj": 2, r"model\.layers\.\d+\.mlp\.down_proj": 6},
        alpha_pattern={"q_proj": 3.5, "^lm_head": 1},
    ),
    "patterns and rslora": dict(
        r=4, lora_alpha=8, target_modules=["q_proj", "k_proj"], rank_pattern={"q_proj": 9},
        use_rslora=True,
    ),
}  # fmt: skip


def save_with_peft(params, directory, config, **kwargs):
    torch.manual_seed(0)
    config = reference.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = reference.get_peft_model(hf.to_transformers(DECODER, params), config).eval()
        model.save_pretrained(directory, save_embedding_layers=False, **kwargs)
    return model


@pytest.mark.parametrize("config", IMPORTS.values(), ids=IMPORTS)
def test_we_compute_the_function_of_an_adapter_from_peft(tmp_path, params, config):
    model = save_with_peft(params, tmp_path, config)
    adapter, plan = peft.read(tmp_path, params, keymap=LLAMA)
    theirs = torch_logits(model)
    np.testing.assert_allclose(our_logits(params, adapter, plan), theirs, atol=1e-5, rtol=0)
    with model.disable_adapter():
        assert np.abs(theirs - torch_logits(model)).max() > 0.1


def test_pickled_weights_are_read_where_there_are_no_others(tmp_path, params):
    save_with_peft(params, tmp_path, IMPORTS["plain"], safe_serialization=False)
    assert (tmp_path / PICKLED_WEIGHTS).exists()
    pickled, _ = peft.read(tmp_path, params, keymap=LLAMA)
    save_with_peft(params, tmp_path / "safe", IMPORTS["plain"])
    safe, _ = peft.read(tmp_path / "safe", params, keymap=LLAMA)
    jax.tree.map(np.testing.assert_array_equal, pickled, safe)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, np.float64])
def test_other_floats_become_float32(directory, params, pair, dtype):
    edit_tensors(directory, lambda t: t.update({n: t[n].astype(dtype) for n in t}))
    read, _ = peft.read(directory, params, keymap=LLAMA)
    expected = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype).astype("f4"), pair[0])
    jax.tree.map(np.testing.assert_array_equal, read, expected)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(read)} == {"float32"}


def test_shapes_are_enough_to_read(directory, params):
    by_shape = peft.read(directory, param_shapes(DECODER), keymap=LLAMA)
    by_value = peft.read(directory, params, keymap=LLAMA)
    jax.tree.map(np.testing.assert_array_equal, by_shape[0], by_value[0])
    assert by_shape[1] == by_value[1]


def test_files_follow_the_umask(tmp_path, pair):
    before = os.umask(0o027)
    try:
        peft.write(tmp_path / "adapter", *pair, keymap=LLAMA)
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "adapter").iterdir()}
    assert modes == {CONFIG: 0o640, WEIGHTS: 0o640, MANIFEST: 0o640}
    assert stat.S_IMODE((tmp_path / "adapter").stat().st_mode) == 0o750


def test_bytes_do_not_depend_on_the_order_of_the_adapter(tmp_path, directory, pair):
    adapter, plan = pair
    backwards = dict(reversed(adapter.items())), replace(plan, sites=plan.sites[::-1])
    peft.write(tmp_path / "backwards", *backwards, keymap=LLAMA)
    for name in (CONFIG, WEIGHTS, MANIFEST):
        assert (tmp_path / "backwards" / name).read_bytes() == (directory / name).read_bytes()


def test_targets_are_suffixes_where_these_say_it_all(directory):
    assert json.loads((directory / CONFIG).read_text())["target_modules"] == PROJECTIONS


def test_targets_are_full_names_where_a_suffix_would_match_more():
    keymap = Keymap(
        (
            Rule("encoder/kernel", "encoder.{i}.proj.weight", True),
            Rule("decoder/kernel", "decoder.{i}.proj.weight", True),
        )
    )
    site = Site("encoder/kernel", (2, 4, 6), "float32", ("stack", "in", "out"), 2, 1.0)
    config = config_of(Plan((site,), 48), keymap, None, None)
    assert config["target_modules"] == ["encoder.0.proj", "encoder.1.proj"]


def test_patterns_are_for_one_leaf_each(params):
    """So that PEFT, which takes the first that matches, does not depend on their order."""
    targets = tuple(lora.Rule(f".*/{n}/kernel", rank=r + 1) for r, n in enumerate(PROJECTIONS))
    plan = planned(params, rank=1, alpha=8, targets=targets)
    patterns = config_of(plan, LLAMA, None, None)["rank_pattern"]
    assert len(patterns) == len(PROJECTIONS) - 1
    for site in plan.sites:
        for module in module_names(site, LLAMA):
            for beside in (module, f"other.{module}", f"{module}_too"):
                keys = [key for key in patterns if get_pattern_key([key], beside) == key]
                ranks = [patterns[key] for key in keys]
                assert ranks == ([site.rank] if beside == module and site.rank != 1 else [])


@given(st.floats(1e-3, 1e3), st.integers(1, 256), st.booleans())
def test_alpha_reads_back_to_the_same_scale(alpha, rank, use_rslora):
    def through_a_file(scale):
        site = Site("lm_head/kernel", (4, 6), "float32", ("in", "out"), rank, scale)
        config = config_of(Plan((site,), 24), LLAMA, None, None)
        config = PeftConfig(rank, config["lora_alpha"], False, None, None, ["lm_head"], None)
        return config.lora_alpha, adapted_modules(config, ["lm_head"])["lm_head"].scale

    scale = alpha / (rank**0.5 if use_rslora else rank)
    written, once = through_a_file(scale)
    assert once == pytest.approx(scale, rel=1e-14, abs=0)
    assert through_a_file(once) == (written, once)


@pytest.mark.parametrize(("alpha", "rank"), [(16, 3), (1, 49), (3.3, 7), (32, 12), (0.1, 3)])
def test_alpha_is_written_as_it_was_given(alpha, rank):
    site = Site("lm_head/kernel", (4, 6), "float32", ("in", "out"), rank, alpha / rank)
    written = config_of(Plan((site,), 24), LLAMA, None, None)["lora_alpha"]
    assert written == alpha
    assert type(written) is type(alpha)


def test_the_base_is_kept_in_the_manifest(tmp_path, pair):
    base = {"name": "org/base", "digest": "0" * 64}
    peft.write(tmp_path / "adapter", *pair, keymap=LLAMA, base=base)
    assert peft.base_of(tmp_path / "adapter") == base


def test_a_directory_from_peft_says_nothing_about_its_base(tmp_path, params):
    save_with_peft(params, tmp_path, IMPORTS["plain"])
    assert peft.base_of(tmp_path) == {}


def message_of(call, *args, **kwargs):
    with pytest.raises(lora.InputError) as raised:
        call(*args, **kwargs)
    return str(raised.value)


def without(name):
    return lambda tensors: tensors.pop(name)


def changed(name, change):
    return lambda tensors: tensors.update({name: change(tensors[name])})


def poisoned(value):
    def poison(tensor):
        tensor[0, 0] = value
        return tensor

    return poison


TENSOR_FAULTS = {
    "missing": (without(Q_A), ("missing", Q_A)),
    "unexpected": (
        lambda t: t.update({"base_model.model.lm_head.lora_A.weight": np.zeros((4, 64), "f4")}),
        ("unexpected", "lm_head.lora_A"),
    ),
    "renamed": (
        lambda t: t.update({Q_A.removeprefix("base_model.model."): t.pop(Q_A)}),
        ("missing", "unexpected", Q_A.removeprefix("base_model.model.")),
    ),
    "another rank": (changed(Q_A, lambda x: x[:3]), (Q_A, "(3, 64)", "(4, 64)")),
    "transposed": (changed(Q_A, np.transpose), (Q_A, "(64, 4)", "(4, 64)")),
    "integers": (changed(Q_A, lambda x: x.astype(np.int32)), (Q_A, "int32")),
    "not a number": (changed(Q_A, poisoned(np.nan)), ("not finite", Q_A)),
    "infinite": (changed(Q_A, poisoned(np.inf)), ("not finite", Q_A)),
    "too large for float32": (
        changed(Q_A, lambda x: poisoned(1e300)(x.astype("f8"))), ("not finite", Q_A)
    ),
}  # fmt: skip


@pytest.mark.parametrize(("edit", "named"), TENSOR_FAULTS.values(), ids=TENSOR_FAULTS)
def test_tensors_that_do_not_fit_are_named(directory, params, edit, named):
    edit_tensors(directory, edit)
    message = message_of(peft.read, directory, params, keymap=LLAMA)
    assert all(part in message for part in (str(directory), *named)), message


def test_everything_wrong_is_named_at_once(directory, params):
    def spoil(tensors):
        keys = [Q_A.replace("layers.1", f"layers.{layer}") for layer in range(3)]
        del tensors[keys[0]]
        tensors[keys[1]] = tensors[keys[1]].T
        tensors[keys[2]][0] = np.nan
        tensors["stray"] = np.zeros(3)

    edit_tensors(directory, spoil)
    message = message_of(peft.read, directory, params, keymap=LLAMA)
    assert all(part in message for part in ("missing", "unexpected: stray", "wrong", "not finite"))


def test_a_long_list_is_cut_and_counted(directory, params):
    edit_tensors(directory, lambda tensors: tensors.update(dict.fromkeys("abcdefgh", np.ones(1))))
    message = message_of(peft.read, directory, params, keymap=LLAMA)
    assert "unexpected: a, b, c, d, e and 3 more" in message


CONFIG_FAULTS = {
    "peft_type": ("IA3", "'LORA'"),
    "r": (0, "at least 1"),
    "lora_alpha": (float("nan"), "positive finite"),
    "use_rslora": ("yes", "true or false"),
    "rank_pattern": ({"q_proj": -1}, "integer of at least 1"),
    "alpha_pattern": ({"q_proj": "16"}, "positive finite"),
    "target_modules": (None, "module names or a pattern"),
    "exclude_modules": ([1], "module names or a pattern"),
    "bias": ("all", "isn't supported"),
    "init_lora_weights": ("pissa", "convert"),
    "use_dora": (True, "DoRA"),
    "modules_to_save": (["lm_head"], "trained whole"),
    "lora_bias": (True, "a bias on B"),
    "trainable_token_indices": ([1, 2], "token rows"),
    "alora_invocation_tokens": ([5], "activated"),
    "target_parameters": (["experts.gate_up_proj"], "bare parameters"),
    "layers_to_transform": ([0, 1], "some layers"),
    "layer_replication": ([[0, 2], [1, 3]], "repeated"),
    "use_tomorrows_lora": ({"a": 1}, "not known"),
}


@pytest.mark.parametrize("key", CONFIG_FAULTS)
def test_config_keys_that_change_the_function_are_refused(directory, params, key):
    value, reason = CONFIG_FAULTS[key]
    edit_config(directory, **{key: value})
    message = message_of(peft.read, directory, params, keymap=LLAMA)
    assert f"{key} is {value!r}" in message
    assert reason in message


@pytest.mark.parametrize("value", [True, 10**400, -1, "8", 2.5, None, float("inf")])
def test_ranks_and_alphas_must_be_sensible(directory, params, value):
    edit_config(directory, r=value, lora_alpha=value if value != 2.5 else 0)
    message = message_of(peft.read, directory, params, keymap=LLAMA)
    assert "lora_alpha is" in message or value == 10**400
    assert "r is" in message or "expected" in message


@pytest.mark.parametrize("init", ["olora", "corda", "loftq", "lora_ga", "mica", "pissa_niter_4"])
def test_adapters_against_a_changed_base_are_refused(directory, params, init):
    edit_config(directory, init_lora_weights=init)
    assert init in message_of(peft.read, directory, params, keymap=LLAMA)


def test_unknown_keys_that_say_nothing_are_let_pass(directory, params):
    edit_config(
        directory, tomorrow=None, later=False, never=[], peft_version="99", lora_dropout=0.5
    )
    peft.read(directory, params, keymap=LLAMA)


KEYS = ("target_modules", "exclude_modules", "rank_pattern")
BOMBS = (r"((\w+\.?)+)+x", r"(\w|\w)" * 40 + "x", r"(.*)*" * 20 + "x")


@pytest.mark.parametrize("pattern", ["(", "(?i", "*", "[a"])
@pytest.mark.parametrize("key", KEYS)
def test_what_is_no_pattern_is_named(directory, params, key, pattern):
    edit_config(directory, **{key: {pattern: 4} if key == "rank_pattern" else pattern})
    message = message_of(peft.read, directory, params, keymap=LLAMA)
    assert f"{pattern}" in message
    assert "is not a regular expression" in message


def test_a_pattern_can_not_hang_the_reader(directory, params, monkeypatch):
    monkeypatch.setattr("interop.peft_config._MATCHING_SECONDS", 0.5)
    for key, pattern in zip(KEYS, BOMBS, strict=True):
        edit_config(directory, target_modules=PROJECTIONS, exclude_modules=None)
        edit_config(directory, **{key: {pattern: 4} if key == "rank_pattern" else pattern})
        start = time.perf_counter()
        message = message_of(peft.read, directory, params, keymap=LLAMA)
        assert "take over 0.5 s" in message
        assert time.perf_counter() - start < 5


TARGET_FAULTS = {
    "nothing": (["query"], ("['query']", "no module")),
    "embedding": (["q_proj", "embed_tokens"], ("model.embed_tokens", "not a linear layer")),
    "norm": (["q_proj", "model.norm"], ("model.norm", "not a linear layer")),
    "one layer": (
        [*PROJECTIONS[:4], *PROJECTIONS[5:], "layers.1.self_attn.q_proj"],
        (Q, "no adapter in layers 0, 2", "rank 4 and scale 2 in layers 1"),
    ),
}


@pytest.mark.parametrize(("targets", "named"), TARGET_FAULTS.values(), ids=TARGET_FAULTS)
def test_targets_that_do_not_fit_are_named(directory, params, targets, named):
    edit_config(directory, target_modules=targets)
    message = message_of(peft.read, directory, params, keymap=LLAMA)
    assert all(part in message for part in named), message


def test_a_target_without_a_leaf_is_named(directory, params):
    edit_config(directory, target_modules=[*PROJECTIONS, "lm_head"])
    tied = {name: leaf for name, leaf in params.items() if name != "lm_head"}
    message = message_of(peft.read, directory, tied, keymap=LLAMA)
    assert "'lm_head' has no leaf 'lm_head/kernel'" in message


def test_layers_of_unequal_rank_or_scale_are_named(tmp_path, params):
    config = dict(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "k_proj"],
        rank_pattern={r"layers\.0\.self_attn\.q_proj": 2},
        alpha_pattern={r"layers\.2\.self_attn\.k_proj": 1},
    )
    save_with_peft(params, tmp_path, config)
    message = message_of(peft.read, tmp_path, params, keymap=LLAMA)
    assert f"{Q!r} needs one rank and scale" in message
    assert "rank 2 and scale 4 in layers 0; rank 4 and scale 2 in layers 1, 2" in message
    assert f"{K!r} needs one rank and scale" in message


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_one_flipped_bit_is_found(directory, params, name):
    content = bytearray((directory / name).read_bytes())
    content[-20] ^= 1
    (directory / name).write_bytes(content)
    message = message_of(peft.read, directory, params, keymap=LLAMA)
    assert name in message.split(": ", 1)[1]
    assert "sha256" in message


def test_a_flipped_bit_is_not_found_without_the_manifest(directory, params):
    """The control for the test above: the digest finds it, not the format."""
    content = bytearray((directory / WEIGHTS).read_bytes())
    content[-20] ^= 1
    (directory / WEIGHTS).write_bytes(content)
    (directory / MANIFEST).unlink()
    peft.read(directory, params, keymap=LLAMA)


BAD_FILES = {
    "no weights": (WEIGHTS, None, "no such file"),
    "no config": (CONFIG, None, "no such file"),
    "config is not JSON": (CONFIG, "{", "not JSON"),
    "config is too large": (CONFIG, " " * (1 << 21), "more than"),
    "config is too deep": (CONFIG, '{"r": ' + "[" * 100_000 + "]" * 100_000 + "}", "deeply"),
    "manifest of tomorrow": (MANIFEST, '{"format_version": 2}', "format_version 2"),
    "manifest without files": (MANIFEST, '{"format_version": 1}', "files=None"),
    "manifest of another file": (
        MANIFEST,
        '{"format_version": 1, "base": {}, "files": {"../x": {}}}',
        "../x",
    ),
}


@pytest.mark.parametrize(("name", "content", "reason"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_named(directory, params, name, content, reason):
    if name != MANIFEST:
        (directory / MANIFEST).unlink()
    (directory / name).unlink()
    if content is not None:
        (directory / name).write_text(content)
    message = message_of(peft.read, directory, params, keymap=LLAMA)
    assert name in message
    assert reason in message


def test_a_file_that_is_gone_is_named_by_the_manifest(directory, params):
    (directory / WEIGHTS).unlink()
    assert WEIGHTS in message_of(peft.read, directory, params, keymap=LLAMA)


def test_no_directory(tmp_path, params):
    assert "no such directory" in message_of(peft.read, tmp_path / "x", params, keymap=LLAMA)


def test_sites_that_have_no_linear_form_are_refused_by_name(tmp_path, params, pair):
    plan = planned(params, rank=2, alpha=4, targets=("embed_tokens/embedding", r".*q_proj/.*"))
    heads = Site("layers/self_attn/v_proj/kernel", (3, 4, 16, 32), "float32",
                 ("stack", "in", "in", "out"), 2, 1.0)  # fmt: skip
    other = Site("router/kernel", (4, 6), "float32", ("in", "out"), 2, 1.0)
    plan = replace(plan, sites=(*plan.sites, heads, other))
    adapter = {
        s.path: lora.LoraPair(jnp.full(s.a_shape, jnp.nan), jnp.ones(s.b_shape)) for s in plan.sites
    }
    message = message_of(peft.write, tmp_path / "adapter", adapter, plan, keymap=LLAMA)
    assert "'embed_tokens/embedding' is not the weight of a linear layer" in message
    assert "v_proj/kernel' has axis roles ('stack', 'in', 'in', 'out')" in message
    assert "'router/kernel' belongs to no known torch module" in message
    assert f"{Q!r} holds values that are not finite" in message
    assert list(tmp_path.iterdir()) == []


def test_a_plan_without_sites_is_refused(tmp_path):
    assert "no sites" in message_of(peft.write, tmp_path / "a", {}, Plan((), 0), keymap=LLAMA)


def test_what_is_there_is_not_overwritten_unless_told(directory, params, pair):
    before = (directory / WEIGHTS).read_bytes()
    doubled = jax.tree.map(lambda leaf: 2 * leaf, pair[0]), pair[1]
    assert str(directory) in message_of(peft.write, directory, *doubled, keymap=LLAMA)
    assert (directory / WEIGHTS).read_bytes() == before
    peft.write(directory, *doubled, keymap=LLAMA, overwrite=True)
    jax.tree.map(
        np.testing.assert_array_equal, peft.read(directory, params, keymap=LLAMA)[0], doubled[0]
    )
    assert [entry.name for entry in directory.parent.iterdir()] == [directory.name]


def test_a_directory_with_other_files_is_never_replaced(directory, pair):
    (directory / "thesis.tex").write_text("years of work")
    message = message_of(peft.write, directory, *pair, keymap=LLAMA, overwrite=True)
    assert "thesis.tex" in message
    assert (directory / "thesis.tex").exists()


def test_module_names_follow_the_layers():
    site = Site(Q, (3, 64, 64), "float32", ("stack", "in", "out"), 2, 1.0)
    assert module_names(site, LLAMA) == [module_name(Q, LLAMA, layer) for layer in range(3)]
