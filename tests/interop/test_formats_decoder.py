"""A whole decoder with an adapter of each format: its logits here and in torch."""

import copy
import json

import jax
import loralib
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lora_jax as lora
from interop.adapter_file import ModuleAdapter
from interop.adapter_format import Given
from interop.adapter_formats import read, write
from interop.adapter_plan import base_modules, from_plan, to_plan
from interop.hf import to_transformers
from interop.keymaps import LLAMA

from small_models import SMALL, decoder_logits, random_params

HEAD_DIM, HIDDEN = SMALL.head_dim, SMALL.hidden_size
TOKENS = np.random.default_rng(0).integers(0, SMALL.vocab_size, (2, 9))
LAYERS = range(SMALL.num_layers)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(np.asarray, random_params(SMALL))


@pytest.fixture(scope="module")
def torch_model(params):
    return to_transformers(SMALL, params)


def logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def random(*shape):
    return torch.randn(shape) / shape[-1] ** 0.5


def attention(model, layer):
    return model.model.layers[layer].self_attn


def as_loralib(model, path):
    """Query and value projections become loralib's layers."""
    for layer in LAYERS:
        for name in ("q_proj", "v_proj"):
            own = getattr(attention(model, layer), name)
            new = loralib.Linear(own.in_features, own.out_features, r=2 + layer, lora_alpha=6,
                                 bias=False, merge_weights=False)  # fmt: skip
            new.weight.data = own.weight.data
            new.lora_B.data = random(*new.lora_B.shape)
            setattr(attention(model, layer), name, new)
    torch.save(loralib.lora_state_dict(model), path / "lora.pt")
    return path / "lora.pt"


class MiniMindLoRA(nn.Module):
    """What MiniMind binds to a square linear layer."""

    def __init__(self):
        super().__init__()
        self.A, self.B = (nn.Linear(*s, bias=False) for s in ((HIDDEN, 4), (4, HIDDEN)))

    def forward(self, x):
        return self.B(self.A(x))


def as_minimind(model, path):
    """Square projections get MiniMind's module, in half precision on the disk."""
    for layer in LAYERS:
        for name in ("q_proj", "o_proj"):
            own = getattr(attention(model, layer), name)
            own.lora = MiniMindLoRA().half().float()
            plain = own.forward
            own.forward = lambda x, plain=plain, added=own.lora: plain(x) + added(x)
    state = {name: t.half() for name, t in model.state_dict().items() if ".lora." in name}
    torch.save(state, path / "lora.pth")
    return path / "lora.pth"


def as_mlx(model, path):
    """DoRA of mlx-lm on output projections, folded into the torch weights."""
    tensors = {}
    for layer in LAYERS:
        weight = attention(model, layer).o_proj.weight
        a, b, m = random(HIDDEN, 3), random(3, HIDDEN), torch.rand(HIDDEN) + 0.5
        name = f"model.layers.{layer}.self_attn.o_proj"
        tensors |= {f"{name}.lora_a": a, f"{name}.lora_b": b, f"{name}.m": m}
        total = weight.data + (2.0 * b.T) @ a.T
        weight.data = (m / total.norm(dim=1))[:, None] * total
    save_file(tensors, path / "adapters.safetensors")
    config = {"fine_tune_type": "dora", "num_layers": 3,
              "lora_parameters": {"rank": 3, "scale": 2.0, "dropout": 0.0}}  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def as_torchtune(model, path):
    """torchtune's query and key rows rotate with their neighbours; folded in by its converter."""
    tensors = {}
    for layer in LAYERS:
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = getattr(attention(model, layer), name).weight
            a, b = random(3, HIDDEN), random(weight.shape[0], 3)
            tensors[f"layers.{layer}.attn.{name}.lora_a.weight"] = a
            tensors[f"layers.{layer}.attn.{name}.lora_b.weight"] = b
            if name != "v_proj":
                halves = b.view(-1, HEAD_DIM // 2, 2, 3).transpose(1, 2)
                b = halves.reshape(b.shape)
            weight.data += 6 / 3 * b @ a
    torch.save(tensors, path / "adapter_0.pt")
    return path / "adapter_0.pt"


MAKE = {"loralib": as_loralib, "minimind": as_minimind, "mlx": as_mlx, "torchtune": as_torchtune}
GIVEN = Given(alpha=6, head_dim=HEAD_DIM)
SUFFIX = {"loralib": ".pt", "lora_layer": ".pth", "kohya": ".safetensors", "mlx": "",
          "torchtune": ".safetensors"}  # fmt: skip


@pytest.mark.parametrize("format", MAKE)
def test_a_decoder_has_the_logits_that_torch_has(format, params, torch_model, tmp_path):
    torch.manual_seed(0)
    model = copy.deepcopy(torch_model)
    source = MAKE[format](model, tmp_path)
    file = read(source, GIVEN._replace(base=base_modules(params, LLAMA)))
    adapter, plan = to_plan(file, params, LLAMA)
    ours = decoder_logits(SMALL, lora.merge(params, adapter, plan), TOKENS)
    theirs, base = logits(model), logits(torch_model)
    assert np.abs(theirs - base).max() > 0.1
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()


def test_adapting_is_merging(params, torch_model, tmp_path):
    torch.manual_seed(0)
    model = copy.deepcopy(torch_model)
    adapter, plan = to_plan(read(as_loralib(model, tmp_path), GIVEN), params, LLAMA)
    adapted = lora.adapt(lambda params, tokens: decoder_logits(SMALL, params, tokens), plan)
    theirs = logits(model)
    assert np.abs(adapted(params, adapter, TOKENS) - theirs).max() < 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("format", SUFFIX)
def test_an_adapter_from_here_goes_through_every_format(format, params, tmp_path):
    config = lora.LoraConfig(rank=4, alpha=6, targets=r"layers/.*_proj/kernel")
    plan = lora.plan_from_axes(params, config, {".*": "stack in out"})
    rng = np.random.default_rng(0)
    adapter = {
        path: lora.LoraPair(
            *(rng.normal(size=s).astype("f4") for s in (site.a_shape, site.b_shape))
        )
        for path, site in plan.items()
    }
    file, path = from_plan(adapter, plan, LLAMA, params=params), tmp_path / f"a{SUFFIX[format]}"
    assert isinstance(file.modules["model.layers.2.mlp.up_proj"], ModuleAdapter)
    write(path, file, format, GIVEN)
    told = GIVEN._replace(base=base_modules(params, LLAMA))
    again, plan_again = to_plan(read(path, told), params, LLAMA)
    assert plan_again == plan
    assert jax.tree.all(jax.tree.map(np.array_equal, again, adapter))
