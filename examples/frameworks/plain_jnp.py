"""Plain jnp: the parameters are a dictionary and the model a function, with raw einsums in it.

`w2` is stored as (out, in) and stands on the left: that too is read from the trace.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lora

CONFIG = lora.LoraConfig(rank=4, alpha=8, targets=r"w\d")


def model_fn(params, x):
    hidden = jnp.tanh(x @ params["w1"] + params["b1"])
    hidden = jnp.tanh(jnp.einsum("oi,ni->no", params["w2"], hidden))
    return hidden @ params["w3"]


def task():
    """Which of its first four coordinates is the largest in magnitude?"""
    rng = np.random.default_rng(0)
    shapes = {"w1": (16, 64), "b1": (64,), "w2": (64, 64), "w3": (64, 4)}
    params = {name: jnp.float32(rng.normal(0, 1 / 8, shape)) for name, shape in shapes.items()}
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
