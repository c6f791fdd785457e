"""PEFT directories against real PEFT: what we write computes our function there, and back."""

import json
import os
import stat
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

import lora_jax as lora
from interop import peft
from interop.keymaps import LLAMA, Keymap, Rule, module_name
from interop.peft import CONFIG, PICKLED_WEIGHTS, WEIGHTS
from interop.peft_config_writing import config_of
from interop.peft_layout import settings_of
from interop.peft_matching import PeftConfig, adapted_modules
from interop.peft_modules import Base
from lora_jax.manifest import MANIFEST
from lora_jax.models.decoder import param_shapes
from lora_jax.paths import named_leaves
from lora_jax.site import Plan, Site

from peft_cases import (
    DECODER,
    PROJECTIONS,
    Q,
    base_params,
    edit_tensors,
    load_with_peft,
    our_logits,
    planned,
    save_with_peft,
    torch_logits,
    trained,
)


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
    np.testing.assert_allclose(our_logits(params, adapter, plan), theirs, atol=5e-6, rtol=0)
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


PLAIN = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])


def test_pickled_weights_are_read_where_there_are_no_others(tmp_path, params):
    save_with_peft(params, tmp_path, PLAIN, safe_serialization=False)
    assert (tmp_path / PICKLED_WEIGHTS).exists()
    pickled, _ = peft.read(tmp_path, params, keymap=LLAMA)
    save_with_peft(params, tmp_path / "safe", PLAIN)
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
            Rule("encoder/kernel", "encoder.{i}.proj.weight", (1, 0), "linear"),
            Rule("decoder/kernel", "decoder.{i}.proj.weight", (1, 0), "linear"),
        )
    )
    site = Site("encoder/kernel", (2, 4, 6), "float32", ("stack", "in", "out"), 2, 1.0)
    config = config_of(Plan((site,), 48), Base(keymap, {site.path: site}), None, None)
    assert config["target_modules"] == ["encoder.0.proj", "encoder.1.proj"]


def test_patterns_are_for_one_leaf_each(params):
    """So that PEFT, which takes the first that matches, does not depend on their order."""
    targets = tuple(lora.Rule(f".*/{n}/kernel", rank=r + 1) for r, n in enumerate(PROJECTIONS))
    plan = planned(params, rank=1, alpha=8, targets=targets)
    patterns = config_of(plan, Base(LLAMA, named_leaves(params)), None, None)["rank_pattern"]
    assert len(patterns) == len(PROJECTIONS) - 1
    for site in plan.sites:
        for module in settings_of(site, Base(LLAMA)):
            for beside in (module, f"other.{module}", f"{module}_too"):
                keys = [key for key in patterns if get_pattern_key([key], beside) == key]
                ranks = [patterns[key] for key in keys]
                assert ranks == ([site.rank] if beside == module and site.rank != 1 else [])


@given(st.floats(1e-3, 1e3), st.integers(1, 256), st.booleans())
def test_alpha_reads_back_to_the_same_scale(alpha, rank, use_rslora):
    def through_a_file(scale):
        site = Site("lm_head/kernel", (4, 6), "float32", ("in", "out"), rank, scale)
        config = config_of(Plan((site,), 24), Base(LLAMA, {site.path: site}), None, None)
        flag = config.get("use_rslora", False)
        config = PeftConfig(rank, config["lora_alpha"], ["lm_head"], use_rslora=flag)
        return config.lora_alpha, adapted_modules(config, ["lm_head"])["lm_head"].scale

    scale = alpha / (rank**0.5 if use_rslora else rank)
    written, once = through_a_file(scale)
    assert once == pytest.approx(scale, rel=1e-14, abs=0)
    assert through_a_file(once) == (written, once)


@pytest.mark.parametrize(("alpha", "rank"), [(16, 3), (1, 49), (3.3, 7), (32, 12), (0.1, 3)])
def test_alpha_is_written_as_it_was_given(alpha, rank):
    site = Site("lm_head/kernel", (4, 6), "float32", ("in", "out"), rank, alpha / rank)
    written = config_of(Plan((site,), 24), Base(LLAMA, {site.path: site}), None, None)["lora_alpha"]
    assert written == alpha
    assert type(written) is type(alpha)


def test_the_base_is_kept_in_the_manifest(tmp_path, pair):
    base = {"name": "org/base", "digest": "0" * 64}
    peft.write(tmp_path / "adapter", *pair, keymap=LLAMA, base=base)
    assert peft.base_of(tmp_path / "adapter") == base


def test_a_directory_from_peft_says_nothing_about_its_base(tmp_path, params):
    save_with_peft(params, tmp_path, PLAIN)
    assert peft.base_of(tmp_path) == {}


def test_module_names_follow_the_layers():
    site = Site(Q, (3, 64, 64), "float32", ("stack", "in", "out"), 2, 1.0)
    assert [*settings_of(site, Base(LLAMA))] == [
        module_name(Q, LLAMA, (layer,)) for layer in range(3)
    ]
