"""Dropout on the input of A: reproducible, independent per use, off without a key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lora

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(7)
RATE = 0.25
ONES = jnp.ones((50, 40))


def masks(model_fn, params, x=ONES, key=KEY):
    """What the adapted function adds to the base: A and B are identities, so the mask itself."""
    config = lora.LoraConfig(rank=40, alpha=40, targets=".*w", dropout=RATE)
    plan = lora.plan(model_fn, params, x, config=config)

    def identity(shape):
        return jnp.broadcast_to(jnp.eye(40), shape)

    adapter = {
        path: lora.LoraPair(identity(site.a_shape), identity(site.b_shape))
        for path, site in plan.items()
    }
    adapted = lora.adapt(model_fn, plan)
    return adapted(params, adapter, x, dropout_key=key) - model_fn(params, x)


def test_entries_are_dropped_at_the_rate_and_the_rest_scaled_up():
    mask = masks(lambda p, x: x @ p["w"], {"w": jnp.zeros((40, 40))})
    np.testing.assert_allclose(np.unique(np.round(mask, 6)), [0, 1 / (1 - RATE)], atol=1e-6)
    assert abs(float((mask == 0).mean()) - RATE) < 0.03


def test_same_key_same_masks_other_key_others_no_key_none():
    def run(key):
        return masks(lambda p, x: x @ p["w"], {"w": jnp.zeros((40, 40))}, key=key)

    np.testing.assert_array_equal(run(KEY), run(jax.random.key(7)))
    assert (run(KEY) != run(jax.random.key(8))).any()
    np.testing.assert_allclose(run(None), ONES)


def test_each_site_and_each_use_has_its_own_mask():
    two = {"aw": jnp.zeros((40, 40)), "bw": jnp.zeros((40, 40))}
    both = masks(lambda p, x: jnp.stack([x @ p["aw"], x @ p["bw"]]), two)
    assert (both[0] != both[1]).any()
    one = {"w": jnp.zeros((40, 40))}
    twice = masks(lambda p, x: jnp.stack([x @ p["w"], x @ p["w"]]), one)
    assert (twice[0] != twice[1]).any()
    layer = jax.jit(lambda w, x: x @ w)
    called = masks(lambda p, x: jnp.stack([layer(p["w"], x), layer(p["w"], x)]), one)
    assert (called[0] != called[1]).any()


@pytest.mark.parametrize("remat", [False, True])
def test_each_layer_of_a_scan_and_step_of_a_loop_has_its_own_mask(remat):
    def scanned(params, x):
        def layer(_, w):
            return None, x @ w

        return lax.scan(jax.checkpoint(layer) if remat else layer, None, params["w"])[1]

    layers = masks(scanned, {"w": jnp.zeros((3, 40, 40))})
    assert (layers[0] != layers[1]).any()
    assert (layers[1] != layers[2]).any()

    def looped(params, x):
        def step(state):
            i, seen = state
            return i + 1, seen.at[i].set(x @ params["w"])

        seen = jnp.zeros((3, 50, 40))
        return lax.while_loop(lambda state: state[0] < 3, step, (0, seen))[1]

    steps = masks(looped, {"w": jnp.zeros((40, 40))})
    assert (steps[0] != steps[1]).any()


def test_experts_have_their_own_masks():
    def experts(params, x):
        return jnp.einsum("ecd,edf->ecf", jnp.stack([x, x]), params["w"])

    both = masks(experts, {"w": jnp.zeros((2, 40, 40))})
    assert (both[0] != both[1]).any()


def test_gradient_flows_through_the_kept_entries_alone():
    params = {"w": jnp.zeros((40, 40))}
    config = lora.LoraConfig(rank=2, targets="w", dropout=RATE)
    plan = lora.plan(lambda p, x: x @ p["w"], params, ONES, config=config)
    adapted = lora.adapt(lambda p, x: x @ p["w"], plan)
    adapter = {"w": lora.LoraPair(jnp.ones((40, 2)), jnp.ones((2, 40)))}

    def total(adapter, x):
        return adapted(params, adapter, x, dropout_key=KEY).sum()

    by_x = jax.grad(total, argnums=1)(adapter, ONES)
    assert abs(float((by_x == 0).mean()) - RATE) < 0.03
    jitted = jax.jit(jax.grad(total))(adapter, ONES)
    np.testing.assert_allclose(jitted["w"].a, jax.grad(total)(adapter, ONES)["w"].a, rtol=1e-10)


def test_dropout_where_the_weight_is_merged_is_refused():
    def normed(params, x):
        return x @ (params["w"] / jnp.linalg.norm(params["w"]))

    config = lora.LoraConfig(rank=2, targets="w", dropout=RATE)
    with pytest.raises(lora.InputError, match="'w' has dropout, which can't act"):
        lora.plan(normed, {"w": jnp.ones((40, 40))}, ONES, config=config)
