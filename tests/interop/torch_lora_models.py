"""An MLP and a small transformer, each in torch and in JAX, with one adapter for both."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn
from torch.nn import functional

import lora_jax as lora
from interop.torch_lora import (
    apply_lora,
    by_name,
    by_regex,
    lora_layers,
)
from interop.torch_training import (
    Batch,
)

VOCAB, WIDTH, HEADS, STEPS = 23, 16, 2, 20


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, VOCAB)

    def forward(self, tokens):
        return self.down(functional.gelu(self.up(self.embed(tokens))))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        h = functional.layer_norm(x, (WIDTH,))
        q, k, v = (part(h).unflatten(-1, (HEADS, -1)) for part in (self.q, self.k, self.v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(WIDTH / HEADS)
        unseen = torch.ones(scores.shape[-2:]).triu(1).bool()
        attention = scores.masked_fill(unseen, -torch.inf).softmax(-1)
        x = x + self.o(torch.einsum("bhqk,bkhd->bqhd", attention, v).flatten(-2))
        return x + self.down(functional.gelu(self.up(functional.layer_norm(x, (WIDTH,)))))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(functional.layer_norm(x, (WIDTH,)))


def linear(params, name, x):
    y = x @ params[f"{name}.weight"]
    return y + params[f"{name}.bias"] if f"{name}.bias" in params else y


def jax_mlp(params, tokens):
    hidden = linear(params, "up", params["embed.weight"][tokens])
    return linear(params, "down", jax.nn.gelu(hidden, approximate=False))


def jax_norm(x):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)


def jax_block(params, name, x):
    heads = (*x.shape[:-1], HEADS, WIDTH // HEADS)
    q, k, v = (linear(params, f"{name}.{part}", jax_norm(x)).reshape(heads) for part in "qkv")
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(WIDTH / HEADS)
    seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    attention = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", attention, v).reshape(x.shape)
    x = x + linear(params, f"{name}.o", mixed)
    hidden = jax.nn.gelu(linear(params, f"{name}.up", jax_norm(x)), approximate=False)
    return x + linear(params, f"{name}.down", hidden)


def jax_transformer(params, tokens):
    x = params["embed.weight"][tokens]
    for layer in range(2):
        x = jax_block(params, f"layers.{layer}", x)
    return linear(params, "head", jax_norm(x))


MODELS = {
    "mlp": (MLP, jax_mlp, by_name("up", "down"), r"(up|down)\.weight"),
    "transformer": (
        Transformer,
        jax_transformer,
        by_regex(r"layers\.\d\.(q|v|o|down)"),
        r"layers\..\.(q|v|o|down)\.weight",
    ),
}


def build(make, seed=0):
    torch.manual_seed(seed)
    return make()


def fill(model, seed=1):
    """An adapter that is zero nowhere."""
    torch.manual_seed(seed)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_A, std=0.2)
        nn.init.normal_(layer.lora_B, std=0.2)
    return model


def adapted(make, select, **config):
    model = build(make)
    names = apply_lora(model, select, **{"rank": 4, "alpha": 6, **config})
    return fill(model), names


def data(count=3 * STEPS, width=7):
    """Micro-batches that train different numbers of positions."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (count, 2, width + 1))
    density = rng.uniform(0.2, 1, (count, 1, 1))
    weights = (rng.random((count, 2, width)) < density).astype(np.float32)
    weights[:, 0, -1] = 1
    return tokens[..., :-1], tokens[..., 1:], weights


def torch_batches(arrays):
    return [Batch(*map(torch.from_numpy, rows)) for rows in zip(*arrays, strict=True)]


def as_jax(model):
    """Parameters and adapter of lora_jax: every matrix but the embedding with its inputs first."""
    layers = lora_layers(model)
    params = {
        name.replace("original_layer.", ""): jnp.asarray(
            parameter.detach().numpy().T if parameter.ndim == 2 and "embed" not in name
            else parameter.detach().numpy()
        )
        for name, parameter in model.named_parameters()
        if "lora_" not in name
    }  # fmt: skip
    return params, {f"{name}.weight": pair(layer) for name, layer in layers.items()}


def pair(layer, of=lambda parameter: parameter.detach()):
    return lora.LoraPair(*(jnp.asarray(of(p).numpy().T) for p in (layer.lora_A, layer.lora_B)))


def both_sides(name, cast=lambda params: params):
    """A torch model, and its parameters, adapter and adapted function in JAX."""
    make, forward, select, pattern = MODELS[name]

    def jax_model(params, tokens):
        return forward(cast(params), tokens)

    model, names = adapted(make, select)
    params, adapter = as_jax(model)
    config = lora.LoraConfig(rank=4, alpha=6, targets=pattern)
    plan = lora.plan(jax_model, params, jnp.asarray(data()[0][0]), config=config)
    assert set(plan) == {f"{name}.weight" for name in names} == set(adapter)
    return model, params, adapter, jax.jit(lora.adapt(jax_model, plan))


def largest_gap(one, other):
    gaps = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), one, other)
    return max(jax.tree.leaves(gaps))
