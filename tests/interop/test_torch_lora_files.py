"""Adapter files of the tutorials: read and written by their own modules, and strictly."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch_lora_models import (
    MLP,
    VOCAB,
    WIDTH,
    Transformer,
    adapted,
    build,
)

import lora_jax as lora
from interop.lora_pth import LAYOUTS
from interop.torch_lora import (
    apply_lora,
    by_name,
    by_regex,
    merge,
    parameter_counts,
    unmerge,
)
from interop.torch_lora_files import load_adapter, save_adapter


class MiniMindLoRA(nn.Module):
    """The module that MiniMind binds as ``lora`` to a linear layer."""

    def __init__(self):
        super().__init__()
        self.A, self.B = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, 2 * WIDTH, bias=False)

    def forward(self, x):
        return self.B(self.A(x))


class LoRALayer(nn.Module):
    """The tutorials' layer with the input axis first."""

    def __init__(self):
        super().__init__()
        self.lora_A = nn.Parameter(torch.zeros(WIDTH, 4))
        self.lora_B = nn.Parameter(torch.zeros(4, 2 * WIDTH))

    def forward(self, x):
        return x @ self.lora_A @ self.lora_B * (6 / 4)


READERS = {
    "minimind": (MiniMindLoRA, "up.lora.", None),
    "lora_layer": (LoRALayer, "up.lora.", 6),
}


@pytest.mark.parametrize("format", READERS)
def test_the_tutorials_modules_read_and_write_our_files(format, tmp_path):
    reader, prefix, alpha = READERS[format]
    model, _ = adapted(MLP, by_name("up"), alpha=alpha)
    save_adapter(model, tmp_path / "a.pth", format)
    stored = torch.load(tmp_path / "a.pth", weights_only=True)
    theirs, x = reader(), torch.randn(5, WIDTH)
    theirs.load_state_dict({name.removeprefix(prefix): t for name, t in stored.items()})
    expected = model.up(x) - model.up.original_layer(x)
    assert (theirs(x) - expected).abs().max() < 1e-5 < expected.abs().max()

    torch.save({prefix + n: t for n, t in theirs.state_dict().items()}, tmp_path / "b.pth")
    fresh = build(MLP)
    apply_lora(fresh, by_name("up"), rank=4, alpha=alpha)
    load_adapter(fresh, tmp_path / "b.pth", format)
    assert torch.equal(fresh.up(x), model.up(x))


@pytest.mark.parametrize("format", LAYOUTS)
def test_save_and_load_hold_the_adapter_alone(format, tmp_path):
    alpha = 6 if LAYOUTS[format].any_scale else None
    select = by_regex(r".*(q|down)")
    model, names = adapted(Transformer, select, alpha=alpha)
    save_adapter(model, tmp_path / "adapter.pth", format)
    stored = torch.load(tmp_path / "adapter.pth", weights_only=True)
    assert sum(t.numel() for t in stored.values()) == parameter_counts(model)[0]
    other = build(Transformer)
    assert apply_lora(other, select, rank=4, alpha=alpha) == names
    tokens = torch.arange(VOCAB)[None]
    assert (other(tokens) - model(tokens)).abs().max() > 0.1
    load_adapter(other, tmp_path / "adapter.pth", format)
    assert torch.equal(other(tokens), model(tokens))
    merge(model)
    save_adapter(model, tmp_path / "merged.pth", format)
    again = torch.load(tmp_path / "merged.pth", weights_only=True)
    assert stored.keys() == again.keys()
    assert all(torch.equal(stored[name], again[name]) for name in stored)


def test_a_file_in_float16_is_read_into_float32_factors(tmp_path):
    model, _ = adapted(MLP, by_name("up"), alpha=None)
    exact = model.up.lora_A.detach().clone()
    save_adapter(model, tmp_path / "a.pth", "minimind", torch.float16)
    load_adapter(model, tmp_path / "a.pth", "minimind")
    assert model.up.lora_A.dtype == torch.float32
    assert torch.equal(model.up.lora_A, exact.half().float())


def test_every_tensor_that_does_not_fit_is_named(tmp_path):
    model, _ = adapted(MLP, by_name("up", "down"))
    save_adapter(model, tmp_path / "a.pth")
    stored = torch.load(tmp_path / "a.pth", weights_only=True)
    stored["extra"] = stored.pop("up.lora_A")
    stored["up.lora_B"] = stored["up.lora_B"].T
    stored["down.lora_A"][0, 0] = math.nan
    torch.save(stored, tmp_path / "b.pth")
    before = copy.deepcopy(model.state_dict())
    problems = [
        "down.lora_A is not finite",
        "extra is unexpected",
        "up.lora_A is missing",
        r"up.lora_B has shape \(4, 32\), expected \(32, 4\)",
    ]
    with pytest.raises(lora.InputError, match="; ".join(problems)):
        load_adapter(model, tmp_path / "b.pth")
    assert all(torch.equal(before[n], value) for n, value in model.state_dict().items())


def test_what_files_refuse(tmp_path):
    model, _ = adapted(MLP, by_name("up"))
    with pytest.raises(lora.InputError, match=r"a scaling of 1: up has 1\.5; adapt with"):
        save_adapter(model, tmp_path / "a.pth", "minimind")
    with pytest.raises(lora.InputError, match="no adapter format 'zip': there are loralib"):
        save_adapter(model, tmp_path / "a.pth", "zip")
    wide = copy.deepcopy(model)
    wide.up.lora_A.data[0, 0] = 1e5
    with pytest.raises(lora.InputError, match=r"not finite in up\.lora_A"):
        save_adapter(wide, tmp_path / "a.pth", dtype=torch.float16)
    assert not list(tmp_path.iterdir())
    save_adapter(model, tmp_path / "a.pth")
    merge(model)
    with pytest.raises(lora.InputError, match="up is merged: unmerge first"):
        load_adapter(model, tmp_path / "a.pth")
    unmerge(model)
    (tmp_path / "b.pth").write_bytes(pickle.dumps(print, protocol=2))
    with pytest.raises(lora.InputError, match="read safely"):
        load_adapter(model, tmp_path / "b.pth")
