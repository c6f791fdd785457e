"""A mixture of experts: tokens sorted by expert, jax.lax.ragged_dot over the stacked kernels.

The expert axis is a stack axis: every expert has an A and a B of its own.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.lax import ragged_dot

import lora_jax as lora

EXPERTS = 4
CONFIG = lora.LoraConfig(rank=4, alpha=8, targets=r"router|up|down|head")


def model_fn(params, x):
    gates = jax.nn.softmax(x @ params["router"])
    expert = jnp.argmax(gates, axis=1)
    order = jnp.argsort(expert)
    group_sizes = jnp.bincount(expert, length=EXPERTS)
    hidden = jax.nn.gelu(ragged_dot(x[order], params["up"], group_sizes))
    routed = ragged_dot(hidden, params["down"], group_sizes)[jnp.argsort(order)]
    return (x + jnp.max(gates, axis=1, keepdims=True) * routed) @ params["head"]


def task():
    """Which of its first four coordinates is the largest in magnitude?"""
    rng = np.random.default_rng(0)
    shapes = {
        "router": (16, EXPERTS),
        "up": (EXPERTS, 16, 64),
        "down": (EXPERTS, 64, 16),
        "head": (16, 4),
    }
    params = {
        name: jnp.float32(rng.normal(0, shape[-2] ** -0.5, shape)) for name, shape in shapes.items()
    }
    x = jnp.float32(rng.normal(size=(256, 16)))
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
