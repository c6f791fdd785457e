"""torchtune's files: its documented maths in torch, and rotary rows by what attention gives."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import lora_jax as lora
from interop.adapter_file import FileAdapter, delta_weight
from interop.adapter_format import BaseModule, Given
from interop.adapter_formats import read, write

from module_cases import pair
from rotary_oracle import halves_rotated, neighbours_rotated
from small_models import SMALL

HEADS, KEY_HEADS, HEAD_DIM, WIDTH = 4, 2, 4, 16
SHAPES = {
    "layers.0.attn.q_proj": (HEADS * HEAD_DIM, WIDTH),
    "layers.0.attn.k_proj": (KEY_HEADS * HEAD_DIM, WIDTH),
    "layers.0.attn.v_proj": (KEY_HEADS * HEAD_DIM, WIDTH),
    "layers.0.attn.output_proj": (WIDTH, HEADS * HEAD_DIM),
    "layers.0.mlp.w1": (24, WIDTH),
    "layers.0.mlp.w2": (WIDTH, 24),
    "layers.0.mlp.w3": (24, WIDTH),
    "output": (30, WIDTH),
}
LLAMA = [
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.down_proj", "mlp.up_proj",
]  # fmt: skip
NAMES = dict(zip(SHAPES, [*(f"model.layers.0.{name}" for name in LLAMA), "lm_head"], strict=True))
GIVEN = Given(alpha=6, head_dim=HEAD_DIM)


def checkpoint(dora=False):
    """An adapter checkpoint of torchtune's own names and orders."""
    torch.manual_seed(0)
    tensors = {}
    for name, (out, inputs) in SHAPES.items():
        tensors[f"{name}.lora_a.weight"] = torch.randn(3, inputs)
        tensors[f"{name}.lora_b.weight"] = torch.randn(out, 3)
        if dora:
            tensors[f"{name}.magnitude"] = torch.rand(out) + 1
    return tensors


def effective(name, weight, tensors):
    """A weight as torchtune's LoRALinear or DoRALinear uses it, in its own order of rows."""
    total = weight + 6 / 3 * tensors[f"{name}.lora_b.weight"] @ tensors[f"{name}.lora_a.weight"]
    magnitude = tensors.get(f"{name}.magnitude")
    return total if magnitude is None else total * (magnitude / total.norm(dim=1))[:, None]


def ours(name, weight, file):
    """The same from what was read, in Hugging Face's order."""
    module = file.modules[name]
    total = weight + torch.tensor(delta_weight(module))
    if module.magnitude is None:
        return total
    return total * (torch.tensor(module.magnitude) / total.norm(dim=1))[:, None]


def half_rows(weight, heads):
    """Rows from neighbours to halves, as the converter of base weights has them."""
    view = weight.view(heads, HEAD_DIM // 2, 2, weight.shape[1])
    return view.transpose(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("dora", [False, True])
def test_checkpoints_of_torchtune_compute_what_it_computes(dora, tmp_path):
    tensors = checkpoint(dora)
    torch.save(tensors, tmp_path / "adapter_0.pt")
    file = read(tmp_path / "adapter_0.pt", GIVEN)
    assert {*file.modules} == {*NAMES.values()}
    assert "neighbours of q and k, as most of its models do" in file.notes[0]
    assert len(file.notes) == 1 + dora
    x, angles = torch.randn(5, WIDTH), torch.rand(5, HEAD_DIM // 2)
    rotated = []
    for name, shape in SHAPES.items():
        weight, turned = torch.randn(shape), name.endswith(("q_proj", "k_proj"))
        heads = shape[0] // HEAD_DIM
        theirs = x @ effective(name, weight, tensors).T if shape[1] == WIDTH else None
        if turned:
            mine = x @ ours(NAMES[name], half_rows(weight, heads), file).T
            rotated.append((
                neighbours_rotated(theirs.reshape(5, heads, HEAD_DIM), angles),
                halves_rotated(mine.reshape(5, heads, HEAD_DIM), angles),
            ))  # fmt: skip
            continue
        found = ours(NAMES[name], weight, file)
        assert (found - weight).abs().max() > 0.1
        torch.testing.assert_close(found, effective(name, weight, tensors))
    (queries, own_queries), (keys, own_keys) = rotated
    scores = torch.einsum("thd,shd->hts", queries[:, :KEY_HEADS], keys)
    own_scores = torch.einsum("thd,shd->hts", own_queries[:, :KEY_HEADS], own_keys)
    assert scores.abs().max() > 0.1
    torch.testing.assert_close(scores, own_scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("dora", [False, True])
def test_what_is_written_for_torchtune_is_what_it_reads(suffix, dora, tmp_path):
    tensors = checkpoint(dora)
    torch.save(tensors, tmp_path / "adapter_0.pt")
    notes = write(tmp_path / f"back{suffix}", read(tmp_path / "adapter_0.pt", GIVEN), "torchtune",
                  Given(head_dim=HEAD_DIM))  # fmt: skip
    assert "lora_rank=3 and lora_alpha=6" in notes[0]
    if suffix == ".pt":
        stored = torch.load(tmp_path / "back.pt", weights_only=True)
        assert stored.keys() == tensors.keys()
        assert all(torch.equal(stored[name], tensors[name]) for name in stored)
    else:
        again = read(tmp_path / "back.safetensors", GIVEN)
        assert {*again.modules} == {*NAMES.values()}


@pytest.mark.parametrize("dora", [False, True])
def test_every_layer_has_what_one_has_as_in_torchtunes_models(dora, tmp_path):
    base = {f"model.layers.{i}.{name}": BaseModule("linear", (16, 16))
            for i in range(2) for name in LLAMA}  # fmt: skip
    given = GIVEN._replace(base=base | {"lm_head": BaseModule("linear", (16, 16))})
    names = ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.up_proj")
    file = FileAdapter("x", {name: pair(3, (16,), 16, 2.0, dora=dora) for name in names})
    if dora:
        with pytest.raises(lora.InputError, match=r"would have DoRA in 'model\.layers\.0\.mlp"):
            write(tmp_path / "a.pt", file, "torchtune", given)
        return
    notes = write(tmp_path / "a.pt", file, "torchtune", given)
    assert notes[0].startswith("zeros for what its readers expect as well: 'model.layers.0.mlp.ga")
    found = read(tmp_path / "a.pt", given).modules
    adapted = ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert {*found} == {f"model.layers.{i}.{name}" for i in range(2) for name in adapted}
    assert {name for name, module in found.items() if delta_weight(module).any()} == {*names}


def test_alpha_comes_from_the_config_beside(tmp_path):
    torch.save(checkpoint(), tmp_path / "adapter_model.pt")
    (tmp_path / "adapter_config.json").write_text('{"r": 3, "lora_alpha": 12}')
    told = {read(tmp_path, Given(head_dim=4, alpha=alpha)).modules["lm_head"].scale
            for alpha in (None, 6)}  # fmt: skip
    assert told == {4.0, 2.0}


def test_models_that_rotate_halves_keep_their_rows(tmp_path):
    tensors = checkpoint()
    torch.save(tensors, tmp_path / "adapter_0.pt")
    file = read(tmp_path / "adapter_0.pt", Given(alpha=6, rotary="halves"))
    found = file.modules["model.layers.0.self_attn.q_proj"]
    assert np.array_equal(found.b, tensors["layers.0.attn.q_proj.lora_b.weight"])


@pytest.mark.parametrize(
    ("family", "rotary", "keeps", "note"),
    [
        ("qwen2", None, True, "rotate halves of q and k, as its qwen2 does"),
        ("qwen3", None, True, "rotate halves of q and k, as its qwen3 does"),
        ("phi3", None, True, "rotate halves of q and k, as its phi3 does"),
        ("mistral", None, False, "rotate neighbours of q and k, as its mistral does"),
        ("qwen2", "neighbours", False, "rotate neighbours of q and k, as given"),
        ("llama", "halves", True, "rotate halves of q and k, as given"),
    ],
)
def test_the_family_says_what_rotates_unless_it_is_given(family, rotary, keeps, note, tmp_path):
    tensors = checkpoint()
    torch.save(tensors, tmp_path / "adapter_0.pt")
    given = GIVEN._replace(config=replace(SMALL, family=family), rotary=rotary)
    file = read(tmp_path / "adapter_0.pt", given)
    assert note in file.notes[0]
    found, own = file.modules["model.layers.0.self_attn.q_proj"].b, "layers.0.attn.q_proj"
    assert np.array_equal(found, tensors[f"{own}.lora_b.weight"]) == keeps
    notes = write(tmp_path / "back.pt", file, "torchtune", given._replace(alpha=None))
    assert note in notes[-1]
    stored = torch.load(tmp_path / "back.pt", weights_only=True)
    assert all(torch.equal(stored[name], tensors[name]) for name in stored)


@pytest.mark.parametrize(
    ("given", "rename", "message"),
    [
        (Given(head_dim=4), {}, "don't hold alpha"),
        (Given(alpha=float("nan"), head_dim=4), {}, "alpha is nan"),
        (Given(alpha="6", head_dim=4), {}, "alpha is '6'"),
        (Given(alpha=6), {}, "order of neighbours: give head_dim"),
        (Given(alpha=6, head_dim=3), {}, "head_dim is 3, expected a positive even"),
        (Given(alpha=6, head_dim=6), {}, "are no heads of 6"),
        (GIVEN, {"output": "layers.0.attn.wq"}, "'layers.0.attn.wq' are no modules of torchtune"),
    ],
)
def test_what_torchtune_files_are_refused_for(given, rename, message, tmp_path):
    tensors = {
        next(
            (name.replace(old, new) for old, new in rename.items() if name.startswith(old)), name
        ): t
        for name, t in checkpoint().items()
    }
    torch.save(tensors, tmp_path / "adapter_0.pt")
    with pytest.raises(lora.InputError, match=message):
        read(tmp_path / "adapter_0.pt", given)


def test_what_torchtune_files_cannot_hold(tmp_path):
    modules = {"model.embed_tokens": pair(2, (4,), 4, kind="embedding")}
    with pytest.raises(lora.InputError, match=r"which are of kinds.*are no modules of Llama's"):
        write(tmp_path / "a.pt", FileAdapter("mine", modules), "torchtune", GIVEN)
