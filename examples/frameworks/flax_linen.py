"""Flax Linen: a decoder with layers stacked by nn.scan, each recomputed by nn.remat.

The kernels of the scanned layers have a layer axis in front: every layer has an A and a B of its
own. The embedding is also the head, and both uses share one pair.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lora

CONFIG = lora.LoraConfig(rank=4, alpha=8, targets=r".*/(kernel|embedding)")


class Block(nn.Module):
    @nn.compact
    def __call__(self, hidden):
        mask = nn.make_causal_mask(hidden[..., 0])
        attention = nn.MultiHeadDotProductAttention(num_heads=4, name="attention")
        hidden += attention(nn.RMSNorm()(hidden), mask=mask)
        up = nn.Dense(64, name="up")(nn.RMSNorm()(hidden))
        return hidden + nn.Dense(32, name="down")(nn.silu(up)), None


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(16, 32, name="embed")
        positions = self.param("positions", nn.initializers.normal(0.2), (tokens.shape[1], 32))
        options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 3}
        layers = nn.scan(nn.remat(Block), **options)(name="layers")
        hidden, _ = layers(embed(tokens) + positions)
        return embed.attend(nn.RMSNorm()(hidden))


def task():
    """Say the token before this one; the first says itself."""
    x = np.random.default_rng(0).integers(0, 16, (32, 12))
    y = np.concatenate([x[:, :1], x[:, :-1]], axis=1)
    model = Decoder()
    return model.apply, jax.jit(model.init)(jax.random.key(0), x), x, y


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
