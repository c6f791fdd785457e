"""The Python of the README runs as it stands there."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

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
        exec(block, given)


def test_there_are_blocks():
    assert len(BLOCKS) >= 2
