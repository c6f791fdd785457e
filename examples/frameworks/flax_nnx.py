"""Flax NNX: nnx.split gives the parameters and a graph definition, nnx.merge the model again.

The layers are made by nnx.vmap and run by nnx.scan, so that their kernels have a layer axis in
front: every layer has an A and a B of its own.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import lora_jax as lora

CONFIG = lora.LoraConfig(rank=4, alpha=8, targets=r".*/(kernel|embedding)")


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(32, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 32, decode=False, rngs=rngs)
        self.up = nnx.Linear(32, 64, rngs=rngs)
        self.down = nnx.Linear(64, 32, rngs=rngs)

    def __call__(self, hidden):
        hidden += self.attention(self.norm(hidden))
        return hidden + self.down(nnx.silu(self.up(hidden)))


class Classifier(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(16, 32, rngs=rngs)
        self.layers = nnx.vmap(Block)(rngs.split(3))
        self.head = nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, tokens):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(hidden, layer):
            return layer(hidden)

        return self.head(run(self.embed(tokens), self.layers)[:, -1])


def task():
    """Which is the largest of eight tokens?"""
    x = np.random.default_rng(0).integers(0, 16, (64, 8))
    graphdef, params = nnx.split(Classifier(nnx.Rngs(0)))
    return lambda state, x: nnx.merge(graphdef, state)(x), params, x, x.max(axis=1)


def main():
    model_fn, params, x, y = task()

    plan = lora.plan(model_fn, params, x, config=CONFIG)
    adapter = lora.init(jax.random.key(1), params, plan)
    adapted = jax.jit(lora.adapt(model_fn, plan))

    def loss(adapter, params, x, y):
        logits = adapted(params, adapter, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(adapter, state, params, x, y):
        value, grads = jax.value_and_grad(loss)(adapter, params, x, y)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(adapter, updates), state, value

    optimizer = optax.adam(1e-2)
    state, losses = optimizer.init(adapter), []
    for _ in range(100):
        adapter, state, value = step(adapter, state, params, x, y)
        losses.append(float(value))

    merged = lora.merge(params, adapter, plan)

    print(lora.explain(plan))
    print(f"loss {losses[0]:.3f} before, {losses[-1]:.3f} after")
    logits, of_merged = adapted(params, adapter, x), jax.jit(model_fn)(merged, x)
    gap = jnp.abs(of_merged - logits).max() / jnp.abs(logits).max()
    print(f"merged and adapted differ by {gap:.0e} of the largest logit")
    return adapted, plan, adapter, merged, losses


if __name__ == "__main__":
    main()
