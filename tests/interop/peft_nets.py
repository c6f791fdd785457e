"""Torch networks of plain layers, and each as a plain function over its weights: a row a kind.

The functions are what somebody writes who has a torch model and moves to JAX: jnp over weights in
torch's own layout, or in Flax's, layers one by one or stacked.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import lax
from torch import nn

from interop.keymaps import Keymap, Rule

from peft_models import BATCH, Kind, normal, normed

# A multilayer perceptron: in torch's layout, and with kernels of heads as Flax has them.


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 6)
    )


def mlp_function(params, x):
    for layer in ("0", "2"):
        x = jax.nn.relu(x @ params[f"{layer}.weight"].T + params[f"{layer}.bias"])
    return x @ params["4.weight"].T + params["4.bias"]


LINEAR_NAMES = Keymap((
    Rule("{i}.weight", "{i}.weight", (), "linear"), Rule("{i}.bias", "{i}.bias"),
))  # fmt: skip


def headed_mlp_function(params, x):
    x = jax.nn.relu(jnp.einsum("bi,ihd->bhd", x, params["up"]["kernel"]) + params["up"]["bias"])
    x = jnp.einsum("bhd,hde->be", x, params["mid"]["kernel"]) + params["mid"]["bias"]
    return jax.nn.relu(x) @ params["down"]["kernel"] + params["down"]["bias"]


HEADED = Keymap((
    Rule("up/kernel", "0.weight", ((1, 2), 0), "linear"), Rule("up/bias", "0.bias", ((0, 1),)),
    Rule("mid/kernel", "2.weight", (2, (0, 1)), "linear"), Rule("mid/bias", "2.bias"),
    Rule("down/kernel", "4.weight", (1, 0), "linear"), Rule("down/bias", "4.bias"),
))  # fmt: skip
HEADED_SHAPES = {
    "up/kernel": (12, 4, 4), "up/bias": (4, 4), "mid/kernel": (4, 4, 16), "mid/bias": (16,),
    "down/kernel": (16, 6), "down/bias": (6,),
}  # fmt: skip


# Blocks that are stacked in one leaf here, or a leaf each.


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.tanh(self.fc(self.norm(x)))


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(8, 5, bias=False)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def stacked_function(params, x):
    def layer(x, p):
        y = normed(x, p["norm"]["scale"], p["norm"]["bias"])
        return x + jnp.tanh(y @ p["fc"]["kernel"] + p["fc"]["bias"]), None

    return lax.scan(layer, x, params["layers"])[0] @ params["head"]["kernel"]


def _block_rules(ours: str) -> Keymap:
    return Keymap((
        Rule(f"{ours}/norm/scale", "layers.{i}.norm.weight"),
        Rule(f"{ours}/norm/bias", "layers.{i}.norm.bias"),
        Rule(f"{ours}/fc/kernel", "layers.{i}.fc.weight", (1, 0), "linear"),
        Rule(f"{ours}/fc/bias", "layers.{i}.fc.bias"),
        Rule("head/kernel", "head.weight", (1, 0), "linear"),
    ))  # fmt: skip


STACKED, UNROLLED = _block_rules("layers"), _block_rules("layers_{i}")
_BLOCK = {"norm/scale": (8,), "norm/bias": (8,), "fc/kernel": (8, 8), "fc/bias": (8,)}
STACKED_SHAPES = {"head/kernel": (8, 5), **{f"layers/{n}": (3, *s) for n, s in _BLOCK.items()}}
UNROLLED_SHAPES = {"head/kernel": (8, 5), **{
    f"layers_{i}/{n}": s for i in range(3) for n, s in _BLOCK.items()
}}  # fmt: skip


def unrolled_function(params, x):
    for i in range(3):
        p = params[f"layers_{i}"]
        y = normed(x, p["norm"]["scale"], p["norm"]["bias"])
        x = x + jnp.tanh(y @ p["fc"]["kernel"] + p["fc"]["bias"])
    return x @ params["head"]["kernel"]


# Convolutions of one to three dimensions, in torch's layout and in Flax's.


class ConvNet(nn.Module):
    def __init__(self, dimensions: int, **options: Any):
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        self.first = conv(3, 6, 3, padding=1, **options)
        self.second = conv(6, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = torch.relu(self.second(x))
        return self.head(x.flatten(2).mean(-1))


_LETTERS = ("H", "HW", "DHW")


def convolved(x, kernel, layout="OI", stride=1, dilation=1, padding=None):
    window = _LETTERS[x.ndim - 3]
    spec = {"OI": f"OI{window}", "IO": f"{window}IO"}[layout]
    ones = (1,) * len(window)
    size = kernel.shape[2] if layout == "OI" else kernel.shape[0]
    padding = [(size // 2, size // 2) if padding is None else (padding, padding)] * len(window)
    return lax.conv_general_dilated(
        x, kernel, [stride * one for one in ones], padding,
        rhs_dilation=[dilation * one for one in ones],
        dimension_numbers=(f"NC{window}", spec, f"NC{window}"),
    )  # fmt: skip


def with_channels(bias, x):
    return bias.reshape(-1, *(1,) * (x.ndim - 2))


def conv_function(params, x, stride=1, dilation=1, mode="constant"):
    padded = jnp.pad(x, [(0, 0), (0, 0), *[(1, 1)] * (x.ndim - 2)], mode=mode)
    x = convolved(padded, params["first.weight"], stride=stride, dilation=dilation, padding=0)
    x = jax.nn.relu(x + with_channels(params["first.bias"], x))
    x = convolved(x, params["second.weight"])
    x = jax.nn.relu(x + with_channels(params["second.bias"], x))
    return x.reshape(*x.shape[:2], -1).mean(-1) @ params["head.weight"].T + params["head.bias"]


CONV_NAMES = Keymap((
    Rule("first.weight", "first.weight", (), "conv"), Rule("first.bias", "first.bias"),
    Rule("second.weight", "second.weight", (), "conv"), Rule("second.bias", "second.bias"),
    Rule("head.weight", "head.weight", (), "linear"), Rule("head.bias", "head.bias"),
))  # fmt: skip


def flax_conv_function(params, x):
    x = convolved(x, params["first"]["kernel"], "IO")
    x = jax.nn.relu(x + with_channels(params["first"]["bias"], x))
    x = convolved(x, params["second"]["kernel"], "IO")
    x = jax.nn.relu(x + with_channels(params["second"]["bias"], x))
    return x.reshape(*x.shape[:2], -1).mean(-1) @ params["head"]["kernel"] + params["head"]["bias"]


FLAX_CONV = Keymap((
    Rule("first/kernel", "first.weight", (3, 2, 0, 1), "conv"), Rule("first/bias", "first.bias"),
    Rule("second/kernel", "second.weight", (3, 2, 0, 1), "conv"),
    Rule("second/bias", "second.bias"),
    Rule("head/kernel", "head.weight", (1, 0), "linear"), Rule("head/bias", "head.bias"),
))  # fmt: skip
FLAX_CONV_SHAPES = {
    "first/kernel": (3, 3, 3, 6), "first/bias": (6,), "second/kernel": (1, 1, 6, 8),
    "second/bias": (8,), "head/kernel": (8, 5), "head/bias": (5,),
}  # fmt: skip


NETS = {
    "mlp": Kind(mlp, mlp_function, LINEAR_NAMES, None, (normal(BATCH, 12),)),
    "mlp with heads": Kind(mlp, headed_mlp_function, HEADED, HEADED_SHAPES, (normal(BATCH, 12),)),
    "stacked": Kind(Blocks, stacked_function, STACKED, STACKED_SHAPES, (normal(BATCH, 8),)),
    "unrolled": Kind(Blocks, unrolled_function, UNROLLED, UNROLLED_SHAPES, (normal(BATCH, 8),)),
    "conv1d": Kind(lambda: ConvNet(1), conv_function, CONV_NAMES, None, (normal(2, 3, 7),)),
    "conv2d": Kind(lambda: ConvNet(2), conv_function, CONV_NAMES, None, (normal(2, 3, 5, 6),)),
    "conv3d": Kind(lambda: ConvNet(3), conv_function, CONV_NAMES, None, (normal(2, 3, 4, 3, 5),)),
    "conv2d of Flax": Kind(
        lambda: ConvNet(2), flax_conv_function, FLAX_CONV, FLAX_CONV_SHAPES, (normal(2, 3, 5, 6),)
    ),
    "strided conv2d": Kind(
        lambda: ConvNet(2, stride=2), functools.partial(conv_function, stride=2), CONV_NAMES,
        None, (normal(2, 3, 5, 6),),
    ),
    "dilated conv2d": Kind(
        lambda: ConvNet(2, dilation=2), functools.partial(conv_function, dilation=2), CONV_NAMES,
        None, (normal(2, 3, 5, 6),),
    ),
    "reflecting conv1d": Kind(
        lambda: ConvNet(1, padding_mode="reflect"),
        functools.partial(conv_function, mode="reflect"), CONV_NAMES, None, (normal(2, 3, 7),),
    ),
}  # fmt: skip
