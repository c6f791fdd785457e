"""remat policies that save dots don't save the product with B."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

import lora_jax as lora

POLICIES = jax.checkpoint_policies
TOKENS, IN, OUT, RANK = 7, 12, 20, 3
PARAMS = {"w": jnp.ones((IN, OUT)), "v": jnp.ones((OUT, IN))}
X = jnp.ones((TOKENS, IN))


def model_fn(policy):
    def block(params, x):
        return jnp.tanh(jnp.tanh(x @ params["w"]) @ params["v"])

    block = jax.checkpoint(block, policy=policy)
    return lambda params, x: block(params, x).sum()


def residuals(function, *args, capsys):
    print_saved_residuals(function, *args)
    return capsys.readouterr().out


@pytest.mark.parametrize("policy", [None, POLICIES.dots_saveable, POLICIES.nothing_saveable])
def test_no_residual_of_the_outputs_size_beyond_the_base(policy, capsys):
    base = model_fn(policy)
    plan = lora.plan(base, PARAMS, X, config=lora.LoraConfig(RANK, targets="[wv]"))
    adapter = lora.init(jax.random.key(0), PARAMS, plan)
    adapted = lora.adapt(base, plan)

    def loss(adapter, x):
        return adapted(PARAMS, adapter, x)

    saved = residuals(loss, adapter, X, capsys=capsys)
    of_base = residuals(lambda params, x: base(params, x), PARAMS, X, capsys=capsys)
    of_output_size = f"[{TOKENS},{OUT}]"
    assert saved.count(of_output_size) <= of_base.count(of_output_size)
    if policy is POLICIES.dots_saveable:
        assert of_base.count(of_output_size) > 0, "the policy saves nothing to compare with"
        assert f"[{TOKENS},{RANK}]" in saved, "the rank-sized product should be saved"


def test_values_and_gradients_are_those_of_the_same_function_without_remat():
    plan = lora.plan(
        model_fn(POLICIES.dots_saveable), PARAMS, X, config=lora.LoraConfig(RANK, targets="[wv]")
    )
    rng = np.random.default_rng(0)
    adapter = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)),
        lora.init(jax.random.key(0), PARAMS, plan),
    )

    def grads(policy):
        adapted = lora.adapt(model_fn(policy), plan)
        return jax.grad(lambda adapter: adapted(PARAMS, adapter, X / 50))(adapter)

    with_policy, without = grads(POLICIES.dots_saveable), grads(POLICIES.everything_saveable)
    jax.tree.map(np.testing.assert_allclose, with_policy, without)
