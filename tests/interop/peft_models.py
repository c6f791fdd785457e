"""What the table of PEFT cases needs to know of a model, and what every kind of model shares."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

from interop.conversion import from_torch
from interop.keymaps import Keymap, Rule

RNG = np.random.default_rng(0)
BATCH = 5


class Kind(NamedTuple):
    """A model on both sides."""

    build: Callable[[], nn.Module]
    function: Callable[..., jax.Array]
    """``function(params, *inputs)``."""
    keymap: Keymap
    shapes: dict[str, tuple[int, ...]] | None
    """Of the leaves by path; as in torch, under torch's names, where there are none."""
    inputs: tuple[np.ndarray, ...]
    read: Callable[[dict[str, np.ndarray]], Any] | None = None
    """The parameters from torch's state dict, where shapes don't say it all."""


def torch_model(kind: Kind) -> nn.Module:
    """The same weights every time."""
    torch.manual_seed(0)
    model = kind.build().eval()
    for parameter in model.parameters():  # Biases and norms as they are after some training.
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def params_of(kind: Kind) -> Any:
    """The parameters of the function, from the torch model's."""
    state = {name: tensor.numpy() for name, tensor in torch_model(kind).state_dict().items()}
    if kind.read is not None:
        return jax.tree.map(jnp.asarray, kind.read(state))
    if kind.shapes is None:
        own = state.keys() - kind.keymap.copies.keys()
        return {name: jnp.asarray(state[name]) for name in own}
    params = from_torch(state, kind.keymap, kind.shapes)
    return jax.tree.map(jnp.asarray, params)


def torch_outputs(model: nn.Module, kind: Kind) -> np.ndarray:
    with torch.no_grad():
        outputs = model(*map(torch.tensor, kind.inputs))
    return getattr(outputs, "logits", outputs).numpy()


def named(**kinds: str) -> Keymap:
    """A table for parameters under torch's own names, in torch's own layout."""
    return Keymap(tuple(Rule(name.replace("__", "."), name.replace("__", "."), (), kind)
                        for name, kind in kinds.items()))  # fmt: skip


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def normed(x, scale, bias):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale + bias


TOKENS = RNG.integers(0, 20, (2, 9))
