"""Adapter directories that are wrong in one way each, and what the one error must name."""

import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from interop import peft
from interop.keymaps import LLAMA
from interop.peft import CONFIG, WEIGHTS
from lora_jax.manifest import MANIFEST
from lora_jax.models.forms import AttentionForm
from lora_jax.site import Plan, Site

from peft_cases import (
    DECODER,
    PROJECTIONS,
    Q_A,
    K,
    Q,
    base_params,
    edit_config,
    edit_tensors,
    moved,
    planned,
    save_with_peft,
    trained,
)

TIED = replace(DECODER, tie_embeddings=True)


@pytest.fixture(scope="module")
def params():
    return base_params()


@pytest.fixture(scope="module")
def pair(params):
    return trained(params, rank=4, alpha=8, targets=r".*_proj/kernel")


@pytest.fixture
def directory(tmp_path, pair):
    peft.write(tmp_path / "adapter", *pair, keymap=LLAMA)
    return tmp_path / "adapter"


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
    "target_modules": ({"q_proj": 1}, "module names or a pattern"),
    "exclude_modules": ([1], "module names or a pattern"),
    "bias": ("some", "one of ('none', 'all', 'lora_only')"),
    "init_lora_weights": ("pissa_niter_2", "convert"),
    "use_dora": ("yes", "true or false"),
    "ensure_weight_tying": (1, "true or false"),
    "modules_to_save": ("lm_head", "a list of module names"),
    "lora_bias": (1, "true or false"),
    "trainable_token_indices": ([1, 1], "a list of different tokens"),
    "alora_invocation_tokens": ([5], "activated"),
    "target_parameters": ("experts.down", "a list of parameter names"),
    "layers_to_transform": ([0, -1], "a layer or a list of layers"),
    "layers_pattern": ([1], "a name or a list of names"),
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


@pytest.mark.parametrize("init", ["corda", "loftq", "lora_ga", "pissa_niter_4"])
def test_adapters_against_a_changed_base_are_refused(directory, params, init):
    edit_config(directory, init_lora_weights=init)
    assert init in message_of(peft.read, directory, params, keymap=LLAMA)


def test_unknown_keys_that_say_nothing_are_let_pass(directory, params):
    edit_config(
        directory, tomorrow=None, later=False, never=[], peft_version="99", lora_dropout=0.5
    )
    peft.read(directory, params, keymap=LLAMA)


KEYS = ("target_modules", "exclude_modules", "rank_pattern")
BOMBS = (r"((\w+\.?)+)+x", r"(.|.)" * 25 + "x", r"(.?)" * 30 + ".{31}x")


@pytest.mark.parametrize("pattern", ["(", "(?i", "*", "[a"])
@pytest.mark.parametrize("key", KEYS)
def test_what_is_no_pattern_is_named(directory, params, key, pattern):
    edit_config(directory, **{key: {pattern: 4} if key == "rank_pattern" else pattern})
    message = message_of(peft.read, directory, params, keymap=LLAMA)
    assert f"{pattern}" in message
    assert "is not a regular expression" in message


def test_a_pattern_can_not_hang_the_reader(directory, params, monkeypatch):
    monkeypatch.setattr("interop.peft_patterns._MATCHING_SECONDS", 0.5)
    for key, pattern in zip(KEYS, BOMBS, strict=True):
        edit_config(directory, target_modules=PROJECTIONS, exclude_modules=None)
        edit_config(directory, **{key: {pattern: 4} if key == "rank_pattern" else pattern})
        start = time.perf_counter()
        message = message_of(peft.read, directory, params, keymap=LLAMA)
        assert "take over 0.5 s" in message
        assert time.perf_counter() - start < 5


TARGET_FAULTS = {
    "nothing": (["query"], ("['query']", "no module")),
    "norm": (["q_proj", "model.norm"], ("model.norm", "not a linear layer or an embedding")),
    "one layer": (
        [*PROJECTIONS[:4], *PROJECTIONS[5:], "layers.1.self_attn.q_proj"],
        ("unexpected", Q_A.replace("layers.1", "layers.0"), Q_A.replace("layers.1", "layers.2")),
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


CONTRADICTIONS = {
    "layers of a pattern": (
        dict(target_modules=r".*_proj", layers_to_transform=[1]), "target_modules is a pattern"
    ),
    "pattern without layers": (dict(layers_pattern="layers"), "without layers_to_transform"),
    "no pattern of layers": (
        dict(layers_pattern="(", layers_to_transform=[1]), "not a regular expression"
    ),
    "no pattern of saved": (dict(modules_to_save=["("]), "not a regular expression"),
    "head and tokens": (
        dict(trainable_token_indices={"lm_head": [1]}), "'lm_head', which is no embedding table"
    ),
    "unknown tokens": (dict(trainable_token_indices=[1, 96]), "[96] are outside the 96 rows"),
    "adapted and in rows": (
        dict(target_modules=["embed_tokens"], trainable_token_indices=[1]),
        "'embed_tokens/embedding' is adapted and trained in some rows",
    ),
    "whole and in rows": (
        dict(modules_to_save=["embed_tokens"], trainable_token_indices=[1]),
        "'embed_tokens/embedding' is trained whole and trained in some rows",
    ),
    "one layer whole": (
        dict(modules_to_save=["layers.1.input_layernorm"]),
        "'layers/input_layernorm/scale' is trained whole in layers 1 alone",
    ),
    "one layer with magnitudes": (
        dict(use_dora=True, layers_to_transform=1), f"{Q!r} has DoRA in layers 1 alone"
    ),
    "tensors of the saved": (dict(modules_to_save=["lm_head"]), "missing: base_model.model.lm"),
    "magnitudes": (dict(use_dora=True), "self_attn.k_proj.lora_magnitude_vector"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "reason"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_configs_that_can_not_be_followed_are_refused(directory, params, changes, reason):
    edit_config(directory, **changes)
    assert reason in message_of(peft.read, directory, params, keymap=LLAMA)


@pytest.fixture(scope="module")
def tied():
    return base_params(TIED)


def test_an_adapter_of_one_side_of_tied_weights_is_refused(tmp_path, tied):
    save_with_peft(tied, tmp_path, dict(r=2, target_modules=["embed_tokens"]), TIED)
    message = message_of(peft.read, tmp_path, tied, keymap=LLAMA)
    assert "'embed_tokens/embedding' is also the weight of lm_head" in message


def test_tied_adapters_that_went_different_ways_are_refused(tmp_path, tied):
    config = dict(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
    save_with_peft(tied, tmp_path, config, TIED)
    head = "base_model.model.lm_head.lora_A.weight"
    edit_tensors(tmp_path, changed(head, lambda tensor: tensor + 1))
    message = message_of(peft.read, tmp_path, tied, keymap=LLAMA)
    assert f"{head} differs from base_model.model.model.embed_tokens.lora_embedding_B" in message


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


def test_sites_that_peft_has_no_form_for_are_refused_by_name(tmp_path, params, pair):
    plan = planned(params, rank=2, alpha=4, targets=("embed_tokens/embedding", r".*q_proj/.*"))
    heads = Site("layers/self_attn/v_proj/kernel", (3, 4, 16, 32), "float32",
                 ("stack", "in", "in", "out"), 2, 1.0)  # fmt: skip
    norm = Site("norm/scale", (8, 8), "float32", ("in", "out"), 2, 1.0)
    other = Site("router/kernel", (4, 6), "float32", ("in", "out"), 2, 1.0)
    plan = replace(plan, sites=(*plan.sites, heads, norm, other))
    adapter = {
        s.path: lora.LoraPair(jnp.full(s.a_shape, jnp.nan), jnp.ones(s.b_shape)) for s in plan.sites
    }
    message = message_of(peft.write, tmp_path / "adapter", adapter, plan, keymap=LLAMA)
    assert "'embed_tokens/embedding' is stored according to what else the model has" in message
    assert "'norm/scale' is not the weight of a linear layer or an embedding" in message
    assert "v_proj/kernel' has axis roles ('stack', 'in', 'in', 'out')" in message
    assert "'router/kernel' belongs to no known torch module" in message
    assert f"{Q!r} holds values that are not finite" in message
    assert list(tmp_path.iterdir()) == []


EMBEDDING = "embed_tokens/embedding"
FULL = {"variant": "full"}
BIASED = replace(DECODER, attention=AttentionForm(bias=True))
UNWRITABLE = {
    "two variants": (
        DECODER,
        (lora.Rule(Q, variant="dora"), K),
        (f"variant 'dora' of {Q!r} beside 'lora' of {K!r}",),
    ),
    "no pair": (DECODER, (lora.Rule("norm/scale", **FULL),), ("no low-rank pair",)),
    "rows of a linear layer": (
        DECODER,
        (lora.Rule("lm_head/kernel", variant="rows", rows=(1,)), Q),
        ("'lm_head/kernel' is not an embedding table",),
    ),
    "two magnitudes": (
        TIED,
        (lora.Rule(EMBEDDING, variant="dora"),),
        ("'embed_tokens/embedding' is tied to lm_head", "magnitude of its own"),
    ),
    "a weight without its bias": (
        BIASED,
        (lora.Rule(K, **FULL), Q),
        ("model.layers.0.self_attn.k_proj.bias", "train these too"),
    ),
    "some biases": (
        BIASED,
        (lora.Rule(".*k_proj/bias", **FULL), Q),
        ("k_proj.bias", "('lora_only')", "('all')"),
    ),
}


@pytest.mark.parametrize(("decoder", "targets", "named"), UNWRITABLE.values(), ids=UNWRITABLE)
def test_plans_that_peft_has_no_form_for_are_refused(decoder, targets, named):
    params = base_params(decoder)
    plan = planned(params, rank=2, alpha=4, targets=targets)
    message = message_of(peft.require_writable, plan, keymap=LLAMA, params=params)
    assert all(part in message for part in named), message


def test_values_beyond_a_layers_rank_are_refused(tmp_path, params):
    plan = planned(params, rank=(1, 3, 2), alpha=4, targets=Q)
    adapter = moved(params, plan)
    filled = {Q: adapter[Q]._replace(b=adapter[Q].b.at[2, 2, 5].set(1e-9))}
    message = message_of(peft.write, tmp_path / "x", filled, plan, keymap=LLAMA)
    assert f"{Q!r} holds values beyond its ranks (1, 3, 2)" in message
    peft.write(tmp_path / "x", adapter, plan, keymap=LLAMA)


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
