"""The Python of the README runs as it stands there."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import lora_jax as lora
from interop.keymap_rows import keymap
from interop.state_dicts import from_torch
from interop.testing import load_adapter
from interop.torch_lora import apply_lora, by_name

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def names():
    """What the README says is given: a model function, parameters, a batch, a loss."""
    key = jax.random.key(0)
    kernel = {"kernel": jax.random.normal(key, (32, 32))}
    params = {f"{name}_proj": kernel for name in ("q", "k", "v", "o", "gate", "up", "down")}
    space = {"params": params, "batch": jnp.ones((2, 32)), "key": key}

    def model_fn(params, batch):
        for layer in params.values():
            batch = jnp.tanh(batch @ layer["kernel"])
        return batch

    def loss(adapter, params, batch):
        return (space["adapted"](params, adapter, batch) ** 2).sum()

    return {**space, "model_fn": model_fn, "loss": loss}, space


def two_sides():
    """What the README says is given for `assert_equivalent`: one adapted layer, twice."""
    module = torch.nn.Sequential(torch.nn.Linear(4, 3))
    table = keymap(("fc/kernel", "0.weight", "linear"), ("fc/bias", "0.bias"))
    like = {"fc": {"kernel": np.zeros((4, 3)), "bias": np.zeros(3)}}
    params = from_torch(module.state_dict(), table, like)

    def jax_fn(params, x):
        return x @ params["fc"]["kernel"] + params["fc"]["bias"]

    inputs = np.ones((2, 4), np.float32)
    config = lora.LoraConfig(rank=2, targets="fc/kernel")
    plan = lora.plan(jax_fn, params, inputs, config=config)
    adapter = lora.init(jax.random.key(0), params, plan)
    adapter = {path: pair._replace(b=pair.b + 1) for path, pair in adapter.items()}
    apply_lora(module, by_name("0"), rank=2, alpha=config.alpha)
    load_adapter(module, adapter, plan, params, table)
    return {
        "torch_module": module, "jax_fn": jax_fn, "params": params, "inputs": inputs,
        "adapter": adapter, "plan": plan, "keymap": table,
    }  # fmt: skip


@pytest.mark.parametrize("block", BLOCKS, ids=lambda text: text.splitlines()[0][:40])
def test_block_runs(block):
    given, space = names()
    if "adapted = " in block:
        before, after = block.split("grads = ")
        exec(before, given)
        space["adapted"] = given["adapted"]
        exec("grads = " + after, given)
        assert set(given["grads"]) == {f"{name}/kernel" for name in given["params"]}
    else:
        exec(block, given | two_sides() if "assert_equivalent" in block else given)


def test_there_are_blocks():
    assert len(BLOCKS) >= 2
