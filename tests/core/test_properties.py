"""Every case has every property: the matrix that says what `adapt` is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.adapter import shapes_of

import cases

pytestmark = pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)


both_variants = pytest.mark.parametrize("variant", ["lora", "dora"])


def setup(case, rank=2, alpha=3.0, dtype=jnp.float64, variant="lora"):
    params, x = cases.make_params(case, dtype), cases.make_input(case, dtype)
    targets = tuple(case.roles)
    config = lora.LoraConfig(rank, alpha, targets, axes=case.axes, variant=variant)
    return params, x, lora.plan(case.model_fn, params, x, config=config)


def random_adapter(plan, dtype=jnp.float64, seed=2):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), dtype), shapes_of(plan))


def scalar(adapted):
    def loss(adapter, params, x):
        leaves = jax.tree.leaves(adapted(params, adapter, x))
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in leaves)

    return loss


def test_roles_are_found_and_merges_are_told(case):
    _, _, plan = setup(case)
    assert {path: " ".join(site.roles) for path, site in plan.items()} == case.roles
    merged = {path for path, site in plan.items() if any(u.merged_because for u in site.uses)}
    assert merged == set(case.merged)
    assert all(site.uses for site in plan.values())


@both_variants
def test_fresh_adapter_changes_nothing(case, variant):
    params, x, plan = setup(case, variant=variant)
    adapter = lora.init(jax.random.key(0), params, plan)
    expected = jax.tree.leaves(jax.jit(case.model_fn)(params, x))
    adapted = jax.jit(lora.adapt(case.model_fn, plan))(params, adapter, x)
    for got, want in zip(jax.tree.leaves(adapted), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


@both_variants
def test_low_rank_equals_merge_in_value_and_gradient(case, variant):
    params, x, plan = setup(case, variant=variant)
    adapter = random_adapter(plan)
    low_rank = scalar(lora.adapt(case.model_fn, plan))
    merge = scalar(lora.adapt(case.model_fn, plan, mode="merge"))
    if "grad" in case.lacks:
        got, want = low_rank(adapter, params, x), merge(adapter, params, x)
    else:
        got = jax.jit(jax.value_and_grad(low_rank))(adapter, params, x)
        want = jax.jit(jax.value_and_grad(merge))(adapter, params, x)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)
    base = scalar(lambda params, adapter, x: case.model_fn(params, x))
    changed = jax.jit(low_rank)(adapter, params, x) - jax.jit(base)(adapter, params, x)
    assert abs(changed) > 1e-3, "the adapter must change the output"


def test_gradient_of_a_fresh_adapter_is_in_b_alone(case):
    if "grad" in case.lacks:
        pytest.skip("JAX has no reverse mode for it")
    params, x, plan = setup(case)
    adapter = lora.init(jax.random.key(0), params, plan)
    grads = jax.jit(jax.grad(scalar(lora.adapt(case.model_fn, plan))))(adapter, params, x)
    for pair in grads.values():
        assert float(jnp.abs(pair.a).max()) == 0
        assert float(jnp.abs(pair.b).max()) > 0


def test_doubling_alpha_doubles_the_update(case):
    params, _, plan = setup(case, alpha=3.0)
    _, _, doubled = setup(case, alpha=6.0)
    adapter = random_adapter(plan)
    once = jax.jit(lora.merge, static_argnums=2)(params, adapter, plan)
    twice = jax.jit(lora.merge, static_argnums=2)(params, adapter, doubled)
    for name in case.roles:
        np.testing.assert_allclose(
            twice[name] - params[name], 2 * (once[name] - params[name]), atol=1e-12
        )


def test_composes_with_jit_vmap_and_remat(case):
    params, x, plan = setup(case)
    adapted = lora.adapt(case.model_fn, plan)
    adapters = [random_adapter(plan, seed=seed) for seed in (2, 3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)
    jitted = jax.jit(adapted)
    separate = [jitted(params, adapter, x) for adapter in adapters]
    assert_trees_close(adapted(params, adapters[0], x), separate[0])
    assert_trees_close(jax.jit(jax.checkpoint(adapted))(params, adapters[0], x), separate[0])
    if "vmap" in case.lacks:
        return
    together = jax.jit(jax.vmap(adapted, in_axes=(None, 0, None)))(params, stacked, x)
    for i in range(2):
        assert_trees_close(jax.tree.map(lambda leaf, i=i: leaf[i], together), separate[i])


def test_dtype_is_the_base_functions_and_inputs_stay(case):
    params, x, plan = setup(case, dtype=jnp.bfloat16)
    adapter = random_adapter(plan, jnp.float32)
    before = jax.tree.map(lambda leaf: np.array(leaf, copy=True), (params, adapter, x))
    got = jax.jit(lora.adapt(case.model_fn, plan))(params, adapter, x)
    want = jax.eval_shape(case.model_fn, params, x)
    assert jax.tree.map(lambda leaf: leaf.dtype, got) == jax.tree.map(lambda leaf: leaf.dtype, want)
    for old, new in zip(
        jax.tree.leaves(before), jax.tree.leaves((params, adapter, x)), strict=True
    ):
        np.testing.assert_array_equal(old, np.asarray(new))


def assert_trees_close(got, want):
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)
