"""Equinox: eqx.partition gives the parameters and the rest, eqx.combine the model again.

Its weights are laid out as in torch, (out, in), and stand on the left of the product; the model
takes one example, so it is vmapped.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lora

CONFIG = lora.LoraConfig(rank=4, alpha=8, targets=r"layers/\d+/weight")


def task():
    """Which of its first four coordinates is the largest in magnitude?"""
    model = eqx.nn.MLP(in_size=16, out_size=4, width_size=64, depth=2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_array)
    x = jnp.float32(np.random.default_rng(0).normal(size=(256, 16)))

    def model_fn(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    return model_fn, params, x, jnp.abs(x[:, :4]).argmax(axis=1)


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
