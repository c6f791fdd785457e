"""MiniMind's experts and adapter files against torch and PEFT."""

import jax
import numpy as np
import pytest
import torch
from peft import PeftModel

from interop import adapter_formats, hf, peft, torch_lora
from interop.adapter_format import Given
from interop.adapter_plan import base_modules, from_plan, to_plan
from interop.families import keymap_of
from interop.hf_config import from_attributes
from interop.torch_lora_files import load_adapter, save_adapter
from lora_jax.models.experts import ExpertsForm

from minimind_adapter import adapted_model, apply_lora
from minimind_options import model_config
from minimind_sides import close, options, spread_out, started, torch_model
from minimind_training import fresh_params

# Experts

LEAF_OF = {"wq": "layers/self_attn/q_proj/kernel", "wo": "layers/self_attn/o_proj/kernel"}


def pairs(tree, model):
    """Entries of a tree like the adapter, at each layer and expert, beside torch's layers."""
    for name, layer in torch_lora.lora_layers(model).items():
        place = tuple(int(part) for part in name.split(".") if part.isdigit())
        entry = tree[LEAF_OF.get(name[-2:], "layers/mlp/experts/down_proj")]
        yield entry.a[place].T, layer.lora_A
        yield entry.b[place].T, layer.lora_B


def test_experts_forward_balance_and_gradients():
    said = options(use_moe=True, targets=("square", ".*/experts/down_proj"))
    config = model_config(said)
    assert config.experts == ExpertsForm(4, 2, 192, renormalised=True, shared_width=192)
    params = fresh_params(jax.random.key(3), config)
    plan, fresh = apply_lora(config, params, said)
    assert fresh["layers/mlp/experts/down_proj"].a.shape == (2, 4, 192, 16)
    adapter = spread_out(fresh)
    model = torch_model(config, params)
    torch_lora.apply_lora(model, torch_lora.by_regex(r".*\.w[qo]|.*\.experts\.\d\.w2"), rank=16)
    for array, parameter in pairs(adapter, model):
        parameter.data = torch.from_numpy(np.array(array))

    random = np.random.default_rng(0)
    tokens = random.integers(0, 700, (2, 30))
    pull = random.normal(size=(2, 30, 700)).astype("f4") / 100
    apply = adapted_model(config, plan)

    def pulled(adapter):
        logits, aux = apply(adapter, params, tokens)
        return (logits * pull).sum() + aux, (logits, aux)

    run = jax.jit(jax.grad(pulled, has_aux=True))
    grads, (logits, aux) = run(adapter)
    expected = model(torch.from_numpy(tokens))
    balance = model.aux_loss()
    ((expected * torch.from_numpy(pull)).sum() + balance).backward()
    close(logits, expected.detach())
    close(aux, balance.detach())
    assert abs(run(fresh)[1][0] - logits).max() > 0.1
    for grad, parameter in pairs(grads, model):
        assert abs(parameter.grad).max() > 1e-2
        close(grad, parameter.grad)


# Files


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_pth_is_read_and_written_byte_for_byte(dtype, tmp_path):
    start = started(options(), tmp_path, spread=0.1)
    save_adapter(start.theirs, tmp_path / "theirs.pth", "minimind", getattr(torch, dtype))
    keymap = keymap_of(start.config)
    given = Given(base=base_modules(start.params, keymap), dtype=dtype)
    read = adapter_formats.read(tmp_path / "theirs.pth", given)
    file = from_plan(*to_plan(read, start.params, keymap), keymap, params=start.params)
    adapter_formats.write(tmp_path / "ours.pth", file, "minimind", given)
    theirs, ours = (
        torch.load(tmp_path / f"{name}.pth", weights_only=True) for name in ("theirs", "ours")
    )
    assert len(theirs) == 8
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert ours[name].numpy().tobytes() == tensor.numpy().tobytes()
    load_adapter(start.theirs, tmp_path / "ours.pth", "minimind")


CURRENT = {
    "model_type": "minimind", "hidden_size": 64, "vocab_size": 700, "num_hidden_layers": 2,
}  # fmt: skip


@pytest.mark.parametrize("generation", ["first", "current"])
def test_peft_computes_what_minimind_does(generation, tmp_path):
    tokens = np.random.default_rng(1).integers(0, 700, (2, 30))
    if generation == "first":
        start = started(options(), tmp_path, spread=0.1)
        config, params, plan, adapter, _ = start
    else:
        config = from_attributes(CURRENT)
        params = fresh_params(jax.random.key(3), config)
        plan, adapter = apply_lora(config, params, options())
        adapter = spread_out(adapter)
        file = from_plan(adapter, plan, keymap_of(config), params=params)
        adapter_formats.write(tmp_path / "lora.pth", file, "minimind")
    counterpart, halves = hf.in_transformers(config, params)
    given = Given(head_dim=config.head_dim) if generation == "first" else Given()
    file = adapter_formats.read(tmp_path / "lora.pth", given)
    keymap = keymap_of(counterpart)
    peft_adapter, peft_plan = to_plan(file, halves, keymap)
    peft.write(tmp_path / "peft", peft_adapter, peft_plan, keymap=keymap, params=halves)
    model = PeftModel.from_pretrained(hf.to_transformers(config, params), tmp_path / "peft").eval()
    name = {"first": "LlamaForCausalLM", "current": "Qwen3ForCausalLM"}[generation]
    assert type(model.get_base_model()).__name__ == name
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits
        with model.disable_adapter():
            base = model(torch.from_numpy(tokens)).logits
    close(adapted_model(config, plan)(adapter, params, tokens)[0], expected)
    assert abs(expected - base).max() > 0.1
