"""Small torch models, and each as a plain function over its weights: a row a kind.

A kind is what the table of PEFT cases needs to know of a model. The functions are what somebody
writes who has a torch model and moves to JAX: jnp over weights in torch's own layout, or in
Flax's, layers one by one or stacked.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from jax import lax
from torch import nn

from interop.keymaps import Keymap, Rule, from_torch

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


def normed(x, scale, bias):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale + bias


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


# A bag of words, attention, and experts of every form.


class BagOfWords(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.out = nn.Embedding(20, 8), nn.Linear(8, 5)

    def forward(self, ids):
        return self.out(torch.tanh(self.words(ids).mean(1)))


def bag_function(params, ids):
    hidden = jnp.tanh(params["words.weight"][ids].mean(1))
    return hidden @ params["out.weight"].T + params["out.bias"]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mha, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 5)

    def forward(self, x):
        return self.out(self.mha(x, x, x, need_weights=False)[0])


def attention_function(params, x):
    batch, time, width = x.shape
    qkv = x @ params["mha.in_proj_weight"].T + params["mha.in_proj_bias"]
    q, k, v = qkv.reshape(batch, time, 3, 2, width // 2).transpose(2, 0, 3, 1, 4)
    weights = jax.nn.softmax(q @ k.swapaxes(-1, -2) / np.sqrt(width // 2))
    mixed = (weights @ v).swapaxes(1, 2).reshape(batch, time, width)
    mixed = mixed @ params["mha.out_proj.weight"].T + params["mha.out_proj.bias"]
    return mixed @ params["out.weight"].T + params["out.bias"]


EXPERTS, WIDE = 3, 6


class Experts(nn.Module):
    """A weight for all experts, (expert, out, in)."""

    def __init__(self, width: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(0.5 * torch.randn(EXPERTS, 2 * WIDE, width))
        self.down_proj = nn.Parameter(0.5 * torch.randn(EXPERTS, width, WIDE))

    def forward(self, x):
        gate, up = torch.einsum("bi,eoi->beo", x, self.gate_up_proj).chunk(2, -1)
        return torch.einsum("beo,eio->bei", torch.sigmoid(gate) * up, self.down_proj)


class TransposedExperts(nn.Module):
    """The same, (expert, in, out), as gpt-oss has them."""

    is_transposed = True

    def __init__(self, width: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(0.5 * torch.randn(EXPERTS, width, 2 * WIDE))
        self.down_proj = nn.Parameter(0.5 * torch.randn(EXPERTS, WIDE, width))

    def forward(self, x):
        gate, up = torch.einsum("bi,eio->beo", x, self.gate_up_proj).chunk(2, -1)
        return torch.einsum("beo,eoi->bei", torch.sigmoid(gate) * up, self.down_proj)


class Expert(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, WIDE), nn.Linear(WIDE, width)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


class ExpertList(nn.Module):
    """A module for each expert."""

    def __init__(self, width: int):
        super().__init__()
        self.each = nn.ModuleList([Expert(width) for _ in range(EXPERTS)])

    def forward(self, x):
        return torch.stack([expert(x) for expert in self.each], 1)


class Mixture(nn.Module):
    def __init__(self, experts: Callable[[int], nn.Module], width: int = 8):
        super().__init__()
        self.router, self.experts = nn.Linear(width, EXPERTS), experts(width)

    def forward(self, x):
        weights = torch.softmax(self.router(x), -1)
        return torch.einsum("be,bei->bi", weights, self.experts(x))


def routed(params, x, experts):
    weights = jax.nn.softmax(x @ params["router.weight"].T + params["router.bias"])
    return jnp.einsum("be,bei->bi", weights, experts)


def mixture_function(params, x, axes="eoi"):
    back = "eio" if axes == "eoi" else "eoi"
    hidden = jnp.einsum(f"bi,{axes}->beo", x, params["experts.gate_up_proj"])
    gate, up = jnp.split(hidden, 2, -1)
    hidden = jax.nn.sigmoid(gate) * up
    return routed(params, x, jnp.einsum(f"beo,{back}->bei", hidden, params["experts.down_proj"]))


def mixture_names(kind: str) -> Keymap:
    return Keymap((
        Rule("router.weight", "router.weight", (), "linear"), Rule("router.bias", "router.bias"),
        Rule("experts.gate_up_proj", "experts.gate_up_proj", (), kind),
        Rule("experts.down_proj", "experts.down_proj", (), kind),
    ))  # fmt: skip


def expert_list_function(params, x):
    up, down = params["up"], params["down"]
    hidden = jnp.tanh(jnp.einsum("bi,eio->beo", x, up["kernel"]) + up["bias"])
    out = jnp.einsum("beo,eoi->bei", hidden, down["kernel"]) + down["bias"]
    return routed(params, x, out)


EXPERT_LIST = Keymap((
    Rule("router.weight", "router.weight", (), "linear"), Rule("router.bias", "router.bias"),
    Rule("up/kernel", "experts.each.{e}.up.weight", (1, 0), "linear"),
    Rule("up/bias", "experts.each.{e}.up.bias"),
    Rule("down/kernel", "experts.each.{e}.down.weight", (1, 0), "linear"),
    Rule("down/bias", "experts.each.{e}.down.bias"),
))  # fmt: skip
EXPERT_LIST_SHAPES = {
    "router.weight": (EXPERTS, 8), "router.bias": (EXPERTS,),
    "up/kernel": (EXPERTS, 8, WIDE), "up/bias": (EXPERTS, WIDE),
    "down/kernel": (EXPERTS, WIDE, 8), "down/bias": (EXPERTS, 8),
}  # fmt: skip


# GPT-2, whose Conv1D keeps weights as (in, out), under its own names.

GPT2 = transformers.GPT2Config(
    n_layer=2, n_head=2, n_embd=16, vocab_size=40, n_positions=12,
    resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0,
)  # fmt: skip


def gpt2_function(params, tokens):
    p = {name.removeprefix("transformer."): leaf for name, leaf in params.items()}
    time = tokens.shape[1]
    x = p["wte.weight"][tokens] + p["wpe.weight"][:time]
    causal = jnp.tril(jnp.ones((time, time), bool))
    for i in range(GPT2.n_layer):
        h = {n.removeprefix(f"h.{i}."): leaf for n, leaf in p.items() if n.startswith(f"h.{i}.")}
        y = normed(x, h["ln_1.weight"], h["ln_1.bias"])
        qkv = y @ h["attn.c_attn.weight"] + h["attn.c_attn.bias"]
        q, k, v = qkv.reshape(*tokens.shape, 3, GPT2.n_head, -1).transpose(2, 0, 3, 1, 4)
        scores = jnp.where(causal, q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]), -jnp.inf)
        mixed = (jax.nn.softmax(scores) @ v).swapaxes(1, 2).reshape(x.shape)
        x = x + mixed @ h["attn.c_proj.weight"] + h["attn.c_proj.bias"]
        y = normed(x, h["ln_2.weight"], h["ln_2.bias"])
        y = jax.nn.gelu(y @ h["mlp.c_fc.weight"] + h["mlp.c_fc.bias"], approximate=True)
        x = x + y @ h["mlp.c_proj.weight"] + h["mlp.c_proj.bias"]
    return normed(x, p["ln_f.weight"], p["ln_f.bias"]) @ p["wte.weight"].T


_CONV1D = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
_GPT2_MODULES = {
    "transformer.wte": "embedding", "transformer.wpe": "embedding", "lm_head": "linear",
    **{f"transformer.h.{{i}}.{name}": "linear_in_out" for name in _CONV1D},
}  # fmt: skip
GPT2_NAMES = Keymap(
    (
        *(Rule(f"{n}.weight", f"{n}.weight", (), kind) for n, kind in _GPT2_MODULES.items()),
        *(Rule(f"transformer.h.{{i}}.{n}.bias", f"transformer.h.{{i}}.{n}.bias") for n in _CONV1D),
        *(Rule(f"transformer.{n}.{p}", f"transformer.{n}.{p}")
          for n in ("h.{i}.ln_1", "h.{i}.ln_2", "ln_f") for p in ("weight", "bias")),
    ),
    copies={"lm_head.weight": "transformer.wte.weight"},
)  # fmt: skip
TOKENS = RNG.integers(0, 20, (2, 9))

KINDS = {
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
    "bag of words": Kind(
        BagOfWords, bag_function,
        named(words__weight="embedding", out__weight="linear", out__bias="other"),
        None, (TOKENS,),
    ),
    "attention": Kind(
        Attention, attention_function,
        named(mha__in_proj_weight="linear", mha__in_proj_bias="other",
              mha__out_proj__weight="linear", mha__out_proj__bias="other",
              out__weight="linear", out__bias="other"),
        None, (normal(2, 4, 8),),
    ),
    "experts": Kind(
        lambda: Mixture(Experts), mixture_function, mixture_names("parameter"), None,
        (normal(BATCH, 8),),
    ),
    "transposed experts": Kind(
        lambda: Mixture(TransposedExperts), functools.partial(mixture_function, axes="eio"),
        mixture_names("parameter_in_out"), None, (normal(BATCH, 8),),
    ),
    "expert by expert": Kind(
        lambda: Mixture(ExpertList), expert_list_function, EXPERT_LIST, EXPERT_LIST_SHAPES,
        (normal(BATCH, 8),),
    ),
    "GPT-2": Kind(
        lambda: transformers.GPT2LMHeadModel(GPT2), gpt2_function, GPT2_NAMES, None, (TOKENS,)
    ),
}  # fmt: skip
