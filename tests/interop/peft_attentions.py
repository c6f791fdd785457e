"""The same for a bag of words, attention, experts of every form, and GPT-2 by its own names."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from torch import nn

from interop.keymaps import Keymap, Rule

from peft_models import BATCH, TOKENS, Kind, named, normal, normed


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

ATTENTION_KINDS = {
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
