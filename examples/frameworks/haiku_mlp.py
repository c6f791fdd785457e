"""Haiku: hk.transform makes of a function with modules a pure one of a dictionary of parameters."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lora

CONFIG = lora.LoraConfig(rank=4, alpha=8, targets=r"mlp/.*/w")


def task():
    """Which of its first four coordinates is the largest in magnitude?"""
    x = jnp.float32(np.random.default_rng(0).normal(size=(256, 16)))
    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([64, 64, 4])(x)))
    params = model.init(jax.random.key(0), x)
    return model.apply, params, x, jnp.abs(x[:, :4]).argmax(axis=1)


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
