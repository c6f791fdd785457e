"""Files of the tutorials and of MiniMind compute what their own modules do."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn
from torch_lora_models import MLP, WIDTH, Transformer, adapted

import lora_jax as lora
from interop.adapter_file import FileAdapter, delta_weight
from interop.adapter_format import BaseModule, Given
from interop.adapter_formats import format_of, open_content, read, write
from interop.adapter_plan import to_plan
from interop.keymaps import Keymap, Rule
from interop.torch_lora import by_name, by_regex
from interop.torch_lora_files import save_adapter

from module_cases import pair
from rotary_oracle import halves_rotated, neighbours_rotated


@pytest.mark.parametrize("format", ["loralib", "lora_layer"])
def test_the_tutorials_files_compute_what_their_layers_do(format, tmp_path):
    model, names = adapted(Transformer, by_regex(r".*(q|down)"), alpha=6)
    save_adapter(model, tmp_path / "adapter.pth", format)
    assert format_of(open_content(tmp_path / "adapter.pth")) == format
    file = read(tmp_path / "adapter.pth", Given(alpha=6))
    assert {*file.modules} == {*names}
    for name in names:
        layer = model.get_submodule(name)
        x = torch.randn(5, layer.original_layer.in_features)
        expected = (layer(x) - layer.original_layer(x)).detach()
        assert expected.abs().max() > 0.1
        np.testing.assert_allclose(
            x.numpy() @ delta_weight(file.modules[name]).T, expected, 1e-3, 1e-4
        )
    write(tmp_path / "back.pth", file, format)
    stored, original = (
        torch.load(tmp_path / name, weights_only=True) for name in ("back.pth", "adapter.pth")
    )
    assert stored.keys() == original.keys()
    assert all(torch.equal(stored[name], original[name]) for name in stored)


def test_a_tutorials_file_is_used_by_our_functions(tmp_path):
    model, _ = adapted(MLP, by_name("up"), alpha=6)
    save_adapter(model, tmp_path / "adapter.pth")
    kernel = jnp.asarray(model.up.original_layer.weight.detach().numpy().T)
    bias = model.up.original_layer.bias.detach().numpy()
    table = Keymap((Rule("kernel", "up.weight", (1, 0), "linear"),))
    adapter, plan = to_plan(
        read(tmp_path / "adapter.pth", Given(alpha=6)), {"kernel": kernel}, table
    )
    x = torch.randn(5, WIDTH)
    ours = lora.adapt(lambda params, x: x @ params["kernel"] + bias, plan)
    found = ours({"kernel": kernel}, adapter, jnp.asarray(x.numpy()))
    np.testing.assert_allclose(found, model.up(x).detach(), rtol=1e-4, atol=1e-5)


class LoRA(nn.Module):
    """What MiniMind binds to a linear layer."""

    def __init__(self, features, rank):
        super().__init__()
        self.A, self.B = (
            nn.Linear(features, rank, bias=False),
            nn.Linear(rank, features, bias=False),
        )
        nn.init.normal_(self.A.weight, std=0.02)
        nn.init.normal_(self.B.weight)

    def forward(self, x):
        return self.B(self.A(x))


def minimind_model(names, features=8, rank=3):
    """Square linear layers with MiniMind's module, under nested names."""
    torch.manual_seed(0)
    model = nn.Module()
    for name in names:
        *parents, last = name.split(".")
        node = model
        for parent in parents:
            if parent not in dict(node.named_children()):
                node.add_module(parent, nn.Module())
            node = node.get_submodule(parent)
        node.add_module(last, nn.Linear(features, features, bias=False))
        node.get_submodule(last).lora = LoRA(features, rank)
    return model


FIRST = [f"layers.{i}.attention.{name}" for i in range(2) for name in ("wq", "wo")]
SECOND = [f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "o_proj")]


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("names", [FIRST, SECOND], ids=["first", "second"])
def test_minimind_files_compute_what_its_modules_do(names, wrapper, tmp_path):
    model = minimind_model(names)
    state = {
        wrapper + name: tensor.half()
        for name, tensor in model.state_dict().items()
        if "lora" in name
    }
    torch.save(state, tmp_path / "lora.pth")
    assert format_of(open_content(tmp_path / "lora.pth")) == "minimind"
    file = read(tmp_path / "lora.pth")
    assert [*file.modules] == names
    assert bool(file.notes) == (names is FIRST)
    for name, module in file.modules.items():
        own, x = model.get_submodule(name).lora.half(), torch.randn(5, 8)
        assert module.scale == 1
        expected = own.float()(x).detach()
        assert expected.abs().max() > 0.01
        np.testing.assert_allclose(x.numpy() @ delta_weight(module).T, expected, 1e-4, 1e-5)


def test_what_is_written_for_minimind_it_loads(tmp_path):
    scales = dict(zip(SECOND, (1.0, 2.0, 1.0, 1.0), strict=True))
    modules = {
        name: pair(2 + (name == SECOND[0]), (8,), 8, scale) for name, scale in scales.items()
    }
    notes = write(
        tmp_path / "lora.pth", FileAdapter("x", modules), "minimind", Given(dtype="float16")
    )
    assert notes[0] == "scale multiplied into B: 'model.layers.0.self_attn.o_proj'"
    assert notes[1].startswith("filled up with zeros to rank 3: ")
    stored = torch.load(tmp_path / "lora.pth", weights_only=True)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    model = minimind_model(SECOND)
    for name, module in modules.items():
        own = {
            k.removeprefix(f"{name}.lora."): t for k, t in stored.items() if f"{name}.lora." in k
        }
        model.get_submodule(name).lora.load_state_dict(own)
        x = torch.randn(5, 8)
        found = model.get_submodule(name).lora(x).detach()
        np.testing.assert_allclose(found, x.numpy() @ delta_weight(module).T, rtol=1e-2, atol=1e-2)


def test_minimind_gets_factors_of_every_square_layer(tmp_path):
    """Its loader takes a file for all of them or fails."""
    base = {name: BaseModule("linear", (8, 8)) for name in SECOND}
    base |= {"model.layers.0.mlp.up_proj": BaseModule("linear", (24, 8)),
             "model.embed_tokens": BaseModule("embedding", (8, 8))}  # fmt: skip
    file = FileAdapter("x", {SECOND[0]: pair(3, (8,), 8, 1.0)})
    notes = write(tmp_path / "lora.pth", file, "minimind", Given(base=base))
    assert notes[0].startswith(f"zeros for what its readers expect as well: '{SECOND[1]}'")
    assert notes[1] == "its readers have to be told rank=3"
    stored = torch.load(tmp_path / "lora.pth", weights_only=True)
    minimind_model(SECOND).load_state_dict(stored, strict=False)
    assert {*stored} == {f"{name}.lora.{part}.weight" for name in SECOND for part in "AB"}
    found = read(tmp_path / "lora.pth").modules
    assert [name for name in SECOND if delta_weight(found[name]).any()] == [SECOND[0]]


def test_names_of_the_first_generation_become_llamas_and_so_does_the_rotation(tmp_path):
    heads, head_dim, tokens = 2, 4, 5
    names = ["layers.0.attention.wq", "layers.0.attention.wk", "layers.0.feed_forward.w1"]
    model = minimind_model(names)
    state = {name: t for name, t in model.state_dict().items() if "lora" in name}
    torch.save(state, tmp_path / "lora.pth")
    file = read(tmp_path / "lora.pth", Given(head_dim=head_dim))
    assert [*file.modules] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.mlp.gate_proj",
    ]
    x, angles = torch.randn(tokens, 8), torch.rand(tokens, head_dim // 2)
    old, new = [], []
    for name, llama in zip(names[:2], file.modules, strict=False):
        linear = model.get_submodule(name)
        own = (linear(x) + linear.lora(x)).reshape(tokens, heads, head_dim)
        old.append(neighbours_rotated(own, angles))
        weight = linear.weight.view(heads, head_dim // 2, 2, 8).transpose(1, 2).reshape(8, 8)
        total = weight + torch.tensor(delta_weight(file.modules[llama]))
        new.append(halves_rotated((x @ total.T).reshape(tokens, heads, head_dim), angles))
    scores = [torch.einsum("thd,shd->hts", *each) for each in (old, new)]
    assert scores[0].abs().max() > 0.1
    torch.testing.assert_close(*scores)
    known = {name: BaseModule("linear", (8, 8)) for name in names}
    assert [*read(tmp_path / "lora.pth", Given(head_dim=4, base=known)).modules] == names


REFUSED = {
    "minimind": (
        {"a": pair(2, (8,), 6), "b": pair(2, (8,), 8, dora=True)},
        r"minimind files can't hold 'b', which have DoRA.*square layers alone, not 'a'",
    ),
    "loralib": (
        {"b": pair(2, (8,), 8, dora=True)},
        "loralib files can't hold 'b', which have DoRA",
    ),
    "lora_layer": ({"b": pair(2, (8,), 8, kind="embedding")}, "'b', which are of kinds"),
}


@pytest.mark.parametrize("format", REFUSED)
def test_what_the_formats_cannot_hold(format, tmp_path):
    modules, message = REFUSED[format]
    file = FileAdapter("mine", modules, {"c.weight": np.ones(3)})
    with pytest.raises(lora.InputError, match=message) as caught:
        write(tmp_path / "lora.pth", file, format)
    assert "'c.weight'" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_names_with_and_without_a_wrapper_are_refused(tmp_path):
    state = {"module.a.lora.A.weight": torch.ones(1, 2), "a.lora.A.weight": torch.ones(1, 2)}
    torch.save(state, tmp_path / "lora.pth")
    with pytest.raises(lora.InputError, match="both with and without a wrapper's prefix"):
        read(tmp_path / "lora.pth")
