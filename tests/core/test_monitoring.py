"""The norm of ΔW without ΔW, against the norm of what a merge adds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.adapter import shapes_of
from lora_jax.monitoring import movements

RULES = {
    "lora": lora.Rule("w"),
    "unequal layers": lora.Rule("w", rank=(2, 0, 1), alpha=(1.0, 2.0, 3.0)),
    "full": lora.Rule("w", variant="full"),
    "bias": lora.Rule("w", rank=(2, 0, 1), alpha=(1.0, 2.0, 3.0), variant="bias"),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_norms_are_those_of_what_a_merge_adds(rule):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(3, 4, 2, 5)))}
    config = lora.LoraConfig(2, targets=rule)
    plan = lora.plan_from_axes(params, config, {"w": "stack in out out"})
    adapter = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape)), shapes_of(plan))
    moved = jax.jit(movements, static_argnums=2)(params, adapter, plan)["w"]
    added = np.linalg.norm(lora.merge(params, adapter, plan)["w"] - params["w"])
    np.testing.assert_allclose(moved.delta_norm, added, rtol=1e-9)
    np.testing.assert_allclose(moved.ratio, added / np.linalg.norm(params["w"]), rtol=1e-9)


def test_of_trained_rows_only_they_count():
    params = {"w": jnp.ones((4, 3))}
    config = lora.LoraConfig(targets=lora.Rule("w", variant="rows", rows=(1,)))
    plan = lora.plan_from_axes(params, config, {"w": "in out"})
    moved = movements(params, {"w": lora.Rows((1,), 3 * jnp.ones((1, 3)))}, plan)["w"]
    np.testing.assert_allclose(moved.delta_norm, 2 * np.sqrt(3))
