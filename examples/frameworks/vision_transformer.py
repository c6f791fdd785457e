"""A vision transformer in Flax, whose attention kernels have three axes.

`query`, `key` and `value` are (features, heads, head_dim), `out` is (heads, head_dim, features).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lora

CONFIG = lora.LoraConfig(rank=4, alpha=8, targets=r".*/kernel")


class Block(nn.Module):
    @nn.compact
    def __call__(self, hidden):
        attention = nn.MultiHeadDotProductAttention(num_heads=4, name="attention")
        hidden += attention(nn.LayerNorm()(hidden))
        up = nn.Dense(64, name="up")(nn.LayerNorm()(hidden))
        return hidden + nn.Dense(32, name="down")(nn.gelu(up))


class VisionTransformer(nn.Module):
    @nn.compact
    def __call__(self, images):
        patches = nn.Conv(32, (4, 4), strides=4, name="patches")(images)
        hidden = patches.reshape(len(images), -1, 32)
        hidden += self.param("positions", nn.initializers.normal(0.02), hidden.shape[1:])
        for i in range(2):
            hidden = Block(name=f"block_{i}")(hidden)
        return nn.Dense(4, name="head")(nn.LayerNorm()(hidden.mean(axis=1)))


def task():
    """Which way do the stripes run?"""
    rng = np.random.default_rng(0)
    y = np.arange(64) % 4
    rows, columns, angle = *np.mgrid[:12, :12], y[:, None, None] * np.pi / 4
    along = rows * np.cos(angle) + columns * np.sin(angle)
    stripes = np.sin(along + rng.uniform(0, 2 * np.pi, (64, 1, 1)))
    x = jnp.float32(stripes + rng.normal(0, 0.3, stripes.shape))[..., None]
    model = VisionTransformer()
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
