"""Every case has every property: the matrix that says what `adapt` is."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.adapter import shapes_of

import cases

CASES = {case.name: case for case in cases.CASES}

pytestmark = [
    # Of this scope, so that the tests of one case follow each other and share its programs.
    pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name, scope="module"),
    pytest.mark.usefixtures("quick_compilation"),
]


both_variants = pytest.mark.parametrize("variant", ["lora", "dora"])


def setup(case, alpha=3.0, dtype=jnp.float64, variant="lora"):
    params, x = cases.make_params(case, dtype), cases.make_input(case, dtype)
    targets = tuple(case.roles)
    config = lora.LoraConfig(2, alpha, targets, axes=case.axes, variant=variant)
    return params, x, lora.plan(case.model_fn, params, x, config=config)


def random_adapter(plan, dtype=jnp.float64, seed=2):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), dtype), shapes_of(plan))


def fresh_adapter(params, plan):
    """In the dtype of the random ones, for which the programs are compiled."""
    fresh = lora.init(jax.random.key(0), params, plan)
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), fresh)


def evaluated(case, adapted):
    """A scalar of the outputs and the outputs; and gradients, where there are any."""

    def loss(adapter, params, x):
        outputs = adapted(params, adapter, x)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(outputs)), outputs

    if "grad" in case.lacks:
        return lambda *args: (loss(*args), {})
    return jax.value_and_grad(loss, has_aux=True)


@lru_cache(maxsize=2)
def low_rank(name, variant):
    """One compiled program for all properties of a case."""
    case = CASES[name]
    _, _, plan = setup(case, variant=variant)
    return jax.jit(evaluated(case, lora.adapt(case.model_fn, plan)))


@lru_cache(maxsize=2)
def oracle(name, variant):
    """Merge mode, and the scalar and outputs of the function without an adapter."""
    case = CASES[name]
    _, _, plan = setup(case, variant=variant)
    merged = evaluated(case, lora.adapt(case.model_fn, plan, mode="merge"))
    base = evaluated(case._replace(lacks=("grad",)), lambda params, _, x: case.model_fn(params, x))
    return jax.jit(lambda *args: (merged(*args), base(*args)[0]))


def test_roles_are_found_and_merges_are_told(case):
    _, _, plan = setup(case)
    assert {path: " ".join(site.roles) for path, site in plan.items()} == case.roles
    merged = {path for path, site in plan.items() if any(u.merged_because for u in site.uses)}
    assert merged == set(case.merged)
    assert all(site.uses for site in plan.values())


@both_variants
def test_fresh_adapter_changes_nothing(case, variant):
    params, x, plan = setup(case, variant=variant)
    adapter = fresh_adapter(params, plan)
    (_, outputs), _ = low_rank(case.name, variant)(adapter, params, x)
    _, (_, expected) = oracle(case.name, variant)(adapter, params, x)
    assert_trees_close(outputs, expected, 1e-12)


@both_variants
def test_low_rank_equals_merge_in_value_and_gradient(case, variant):
    params, x, plan = setup(case, variant=variant)
    adapter = random_adapter(plan)
    got = low_rank(case.name, variant)(adapter, params, x)
    want, (base, _) = oracle(case.name, variant)(adapter, params, x)
    assert_trees_close(got, want)
    (loss, _), _ = got
    assert abs(loss - base) > 1e-3, "the adapter must change the output"


def test_gradient_of_a_fresh_adapter_is_in_b_alone(case):
    if "grad" in case.lacks:
        pytest.skip("JAX has no reverse mode for it")
    params, x, plan = setup(case)
    _, grads = low_rank(case.name, "lora")(fresh_adapter(params, plan), params, x)
    for pair in grads.values():
        assert float(jnp.abs(pair.a).max()) == 0
        assert float(jnp.abs(pair.b).max()) > 0


def test_doubling_alpha_doubles_the_update(case):
    params, _, plan = setup(case, alpha=3.0)
    _, _, doubled = setup(case, alpha=6.0)
    both = jax.jit(lambda *args: [lora.merge(*args, each) for each in (plan, doubled)])
    once, twice = both(params, random_adapter(plan))
    for name in case.roles:
        np.testing.assert_allclose(
            twice[name] - params[name], 2 * (once[name] - params[name]), atol=1e-12
        )


def test_composes_with_jit_vmap_and_remat(case):
    params, x, plan = setup(case)
    adapted = lora.adapt(case.model_fn, plan)
    adapters = [random_adapter(plan, seed=seed) for seed in (2, 3)]
    separate = [low_rank(case.name, "lora")(adapter, params, x)[0][1] for adapter in adapters]
    assert_trees_close(adapted(params, adapters[0], x), separate[0])
    assert_trees_close(jax.jit(jax.checkpoint(adapted))(params, adapters[0], x), separate[0])
    if "vmap" in case.lacks:
        return
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)
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


def assert_trees_close(got, want, tolerance=1e-10):
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)
