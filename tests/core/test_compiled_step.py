"""What XLA is given to compute: no weight gradient, no merged weight, one compilation."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lora
from lora_jax.models.decoder import Decoder, init_params
from lora_jax.models.presets import TINY

ROWS, LENGTH = 2, 24


@pytest.fixture(autouse=True)
def _float64():
    """Here float32, whatever the other tests of the core use."""


def compiled_step(mode, config=TINY):
    decoder = Decoder(config)
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)

    def model_fn(params, tokens):
        return decoder.apply({"params": params}, tokens)[0]

    plan = lora.plan(model_fn, params, tokens, config=lora.LoraConfig(4, targets=".*_proj/kernel"))
    adapted = lora.adapt(model_fn, plan, mode=mode)
    tx = optax.adamw(1e-3)

    def step(adapter, opt_state, params, tokens):
        def loss(adapter):
            return adapted(params, adapter, tokens).mean()

        grads = jax.grad(loss)(adapter)
        updates, opt_state = tx.update(grads, opt_state, adapter)
        return optax.apply_updates(adapter, updates), opt_state

    adapter = jax.eval_shape(lambda: lora.init(jax.random.key(0), params, plan))
    opt_state = jax.eval_shape(tx.init, adapter)
    step = jax.jit(step, donate_argnums=(0, 1))
    return step.lower(adapter, opt_state, params, tokens).compile(), plan


def products_of_a_weights_shape(compiled, plan):
    """Results of dots that have the shape of a frozen weight: dW or A·B."""
    weights = {tuple(sorted((site.fan_in, site.fan_out))) for site in plan.values()}
    shapes = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", compiled.as_text())
    assert shapes, "the compiled text has no dots to look at"
    dims = (tuple(int(d) for d in shape.split(",") if d != "1") for shape in shapes)
    return [shape for shape in dims if tuple(sorted(shape)) in weights]


@pytest.mark.parametrize("remat", [False, True])
def test_no_weight_gradient_and_no_merged_weight(remat):
    config = replace(TINY, remat=remat)
    assert not products_of_a_weights_shape(*compiled_step("low_rank", config))


def test_merging_in_the_forward_pass_would_show():
    found = products_of_a_weights_shape(*compiled_step("merge"))
    assert (64, 160) in found or (160, 64) in found


def test_donated_bytes_are_three_times_the_adapter():
    compiled, plan = compiled_step("low_rank")
    optimizer_count = 4
    donated = compiled.memory_analysis().alias_size_in_bytes
    assert donated == 3 * 4 * plan.trainable + optimizer_count


def test_merge_mode_gives_the_same_loss_and_gradients():
    decoder = Decoder(TINY)
    params = init_params(jax.random.key(0), TINY)
    tokens = jax.random.randint(jax.random.key(1), (ROWS, LENGTH), 0, TINY.vocab_size)

    def model_fn(params, tokens):
        return decoder.apply({"params": params}, tokens)[0]

    plan = lora.plan(model_fn, params, tokens, config=lora.LoraConfig(4, targets=".*_proj/kernel"))
    adapter = jax.tree.map(
        lambda leaf: 0.05 * jax.random.normal(jax.random.key(2), leaf.shape),
        lora.init(jax.random.key(0), params, plan),
    )

    @partial(jax.jit, static_argnums=1)
    @partial(jax.value_and_grad, argnums=0)
    def loss_and_gradients(adapter, mode):
        logits = lora.adapt(model_fn, plan, mode=mode)(params, adapter, tokens)
        each = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        return each.mean()

    ours, our_grads = loss_and_gradients(adapter, "low_rank")
    merged, merged_grads = loss_and_gradients(adapter, "merge")
    assert abs(ours - merged) < 1e-5
    for a, b in zip(jax.tree.leaves(our_grads), jax.tree.leaves(merged_grads), strict=True):
        assert np.linalg.norm(a - b) < 2e-5 * np.linalg.norm(b)


def test_another_adapter_of_the_plan_does_not_compile_again():
    params = {"w": jnp.ones((4, 6))}
    x = jnp.ones((2, 4))
    plan = lora.plan(
        lambda p, x: x @ p["w"], params, x, config=lora.LoraConfig(rank=2, targets="w")
    )
    traces = []

    @jax.jit
    def run(adapter):
        traces.append(1)
        return lora.adapt(lambda p, x: x @ p["w"], plan)(params, adapter, x)

    for seed in range(3):
        run(lora.init(jax.random.key(seed), params, plan))
    assert len(traces) == 1


def test_eight_adapters_share_one_base_product():
    params = {"w": jnp.ones((4, 6))}
    x = jnp.ones((2, 4))
    plan = lora.plan(
        lambda p, x: x @ p["w"], params, x, config=lora.LoraConfig(rank=2, targets="w")
    )
    adapters = jax.vmap(lambda key: lora.init(key, params, plan))(
        jax.random.split(jax.random.key(0), 8)
    )
    adapted = lora.adapt(lambda p, x: x @ p["w"], plan)
    together = jax.vmap(adapted, in_axes=(None, 0, None))
    jaxpr = jax.make_jaxpr(together)(params, adapters, x)
    base = [
        eqn
        for eqn in jaxpr.eqns
        if eqn.primitive.name == "dot_general" and any(v.aval.shape == (4, 6) for v in eqn.invars)
    ]
    assert len(base) == 1
    assert base[0].outvars[0].aval.shape == (2, 6)
