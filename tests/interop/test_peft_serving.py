"""Adapters written for servers, which know one rank and one alpha for all."""

import json

import numpy as np
import pytest

import lora_jax as lora
from interop import peft, torch_io
from interop.conversion import to_torch
from interop.keymaps import LLAMA
from interop.peft import CONFIG, WEIGHTS

from peft_cases import (
    PROJECTIONS,
    K,
    Q,
    base_params,
    load_with_peft,
    moved,
    our_logits,
    planned,
    torch_logits,
)

UNEVEN = dict(
    targets=(
        lora.Rule(Q, rank=(2, 0, 5), alpha=(3.0, 1.0, 8.0)),
        lora.Rule(K, rank=2),
        lora.Rule(r".*down_proj/kernel", alpha=1.0),
        r".*_proj/kernel",
    )
)
EVEN = dict(targets=(lora.Rule(Q, rank=2, alpha=4), r".*_proj/kernel"))


@pytest.fixture(scope="module")
def params():
    return base_params()


@pytest.fixture(scope="module", params=[UNEVEN, EVEN], ids=["uneven", "even scale"])
def pair(request, params):
    plan = planned(params, rank=4, alpha=8, **request.param)
    return moved(params, plan), plan


@pytest.fixture
def directory(tmp_path, pair):
    peft.write(tmp_path / "served", *pair, keymap=LLAMA, for_serving=True)
    return tmp_path / "served"


def as_a_server_reads(directory):
    """ΔW by module, from r, lora_alpha and the tensors alone, as vLLM does."""
    config = json.loads((directory / CONFIG).read_text())
    tensors = {n: np.asarray(t, np.float64) for n, t in torch_io.read(directory / WEIGHTS).items()}
    modules = {name.removesuffix(".lora_A.weight") for name in tensors if "lora_A" in name}
    scale = config["lora_alpha"] / config["r"]
    return {
        m.removeprefix("base_model.model."): scale
        * (tensors[f"{m}.lora_B.weight"] @ tensors[f"{m}.lora_A.weight"])
        for m in modules
    }


def updates(params, adapter, plan):
    """ΔW by module, from our own merging."""
    merged, base = (
        {n: np.asarray(t, np.float64) for n, t in to_torch(tree, LLAMA).items()}
        for tree in (lora.merge(params, adapter, plan), params)
    )
    return {name.removesuffix(".weight"): merged[name] - base[name] for name in base}


def largest_difference(params, pair, directory):
    expected = updates(params, *pair)
    served = as_a_server_reads(directory)
    return max(np.abs(served[name] - expected[name]).max() for name in served)


def test_a_server_computes_our_update(params, pair, directory):
    assert largest_difference(params, pair, directory) < 2e-6
    touched = {n for n, update in updates(params, *pair).items() if np.abs(update).max() > 1e-3}
    assert touched <= set(as_a_server_reads(directory))


def test_what_is_written_otherwise_is_computed_wrongly_by_a_server(tmp_path, params):
    plan = planned(params, rank=4, alpha=8, **UNEVEN)
    pair = moved(params, plan), plan
    peft.write(tmp_path / "plain", *pair, keymap=LLAMA)
    assert largest_difference(params, pair, tmp_path / "plain") > 1e-2


def test_peft_computes_the_same_function(params, pair, directory):
    ours, theirs = our_logits(params, *pair), torch_logits(load_with_peft(params, directory))
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()


def test_there_is_one_rank_and_no_extra(directory):
    config = json.loads((directory / CONFIG).read_text())
    ranks = {t.shape[0] for n, t in torch_io.read(directory / WEIGHTS).items() if "lora_A" in n}
    assert ranks == {config["r"]}
    assert config["target_modules"] == PROJECTIONS
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    assert config["bias"] == "none"
    assert config["modules_to_save"] is None
    assert "use_dora" not in config


def test_it_says_what_was_folded(tmp_path, params):
    plan = planned(params, rank=4, alpha=8, **UNEVEN)
    notes = peft.write(tmp_path / "a", moved(params, plan), plan, keymap=LLAMA, for_serving=True)
    by_path = dict(note.split(": ", 1) for note in notes)
    assert by_path[repr(Q)] == (
        "rank 0, 2, 5 filled up with zeros to 5, scale 1.5, 1.6 multiplied into B"
    )
    assert by_path[repr(K)] == "rank 2 filled up with zeros to 5, scale 4 multiplied into B"


def test_a_common_scale_is_kept_and_said_nothing_of(tmp_path, params):
    plan = planned(params, rank=4, alpha=6, targets=Q)
    adapter = moved(params, plan)
    assert peft.write(tmp_path / "a", adapter, plan, keymap=LLAMA, for_serving=True) == ()
    peft.write(tmp_path / "b", adapter, plan, keymap=LLAMA)
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_what_servers_do_not_load_is_refused_by_name(tmp_path, params):
    targets = (
        "embed_tokens/embedding",
        lora.Rule("norm/scale", variant="full"),
        Q,
    )
    plan = planned(params, rank=2, alpha=4, targets=targets)
    with pytest.raises(lora.InputError) as raised:
        peft.write(
            tmp_path / "a",
            moved(params, plan),
            plan,
            keymap=LLAMA,
            params=params,
            for_serving=True,
        )
    assert "'embed_tokens/embedding' is embedding" in str(raised.value)
    assert "'norm/scale' is full" in str(raised.value)
    assert Q not in str(raised.value)
    assert not (tmp_path / "a").exists()
