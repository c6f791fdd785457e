"""Each rule for a weight on its way: what it finds, what it keeps low rank, what it merges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax.adapter import shapes_of

from cases import make_input, make_params
from rule_cases import CASES, product, sharded

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(3)


def planned(case, **config):
    params, x = make_params(case), make_input(case)
    config = {"rank": 2, "alpha": 3.0, "targets": tuple(case.roles), **config}
    return params, x, lora.plan(case.model_fn, params, x, config=lora.LoraConfig(**config))


def random_adapter(plan):
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), shapes_of(plan))


def scalar(model_fn):
    def loss(*args):
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(model_fn(*args)))

    return loss


def evaluated(case, plan, mode="low_rank"):
    """The function's value, and its gradient with respect to everything that has one."""
    loss = scalar(lora.adapt(case.model_fn, plan, mode=mode))
    if "grad" in case.lacks:
        return jax.jit(lambda *args: (loss(*args), {}))
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))


def assert_low_rank_equals_merge(case, params, x, plan):
    adapter = random_adapter(plan)
    low_rank = evaluated(case, plan)
    got, want = (f(params, adapter, x) for f in (low_rank, evaluated(case, plan, "merge")))
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)
    base, _ = low_rank(params, jax.tree.map(jnp.zeros_like, adapter), x)
    assert abs(got[0] - base) > 1e-3, "the adapter must change the output"
    if "grad" not in case.lacks:
        assert all(jnp.abs(factor).max() > 1e-6 for factor in jax.tree.leaves(got[1][1]))


def merged_leaves(plan):
    return {path for path, site in plan.items() if any(use.merged_because for use in site.uses)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_roles_merges_value_and_gradient(case):
    params, x, plan = planned(case)
    assert {path: " ".join(site.roles) for path, site in plan.items()} == case.roles
    assert merged_leaves(plan) == set(case.merged)
    assert ("merged there" in lora.explain(plan, width=300)) == bool(case.merged)
    assert all(site.uses for site in plan.values())
    assert_low_rank_equals_merge(case, params, x, plan)


def named(name):
    return next(case for case in CASES if case.name == name)


def rules_of(case, **values):
    """One target rule a leaf, the values by position."""
    return tuple(
        lora.Rule(path, **{name: each[place] for name, each in values.items()})
        for place, path in enumerate(case.roles)
    )


@pytest.mark.parametrize(
    "name",
    [
        "stack_scan",
        "stack_partly_adapted",
        "joined_stacks_and_one",
        "mapped_loop",
        "layer_of_each_stack",
        "expert_of_each_row",
        "picked_by_two_apart",
        "tables",
        "rows_clipped",
        "rows_filled",
        "split_layers",
        "split_outputs",
        "reversed_layers",
        "scaled_by_three",
        "scaled_outputs",
        "scaled_inputs",
        "row_checked",
        "row_and_column_unchecked",
        "scan_inside",
        "gathered",
        "barrier_of_several",
    ],
)
def test_a_magnitude_follows_its_weight(name):
    case = named(name)
    params, x, plan = planned(case, variant="dora")
    assert not merged_leaves(plan)
    assert_low_rank_equals_merge(case, params, x, plan)


def test_a_magnitude_does_not_rescale_what_is_filled_in():
    case = named("rows_filled_with_a_number")
    params, x, plan = planned(case, variant="dora")
    assert merged_leaves(plan) == {"w"}
    assert_low_rank_equals_merge(case, params, x, plan)


def test_variants_that_differ_within_a_stack_are_merged():
    case = named("stack_scan")
    params, x, plan = planned(case, targets=rules_of(case, variant=["lora", "dora", "lora"]))
    assert merged_leaves(plan) == set(case.roles)
    assert_low_rank_equals_merge(case, params, x, plan)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("stack_scan", {"rank": [1, 3, 2]}),
        ("stack_partly_adapted", {"alpha": [1.0, 5.0]}),
        ("stack_of_transposed", {"rank": [3, 1], "alpha": [2.0, 2.0]}),
    ],
)
def test_members_of_a_stack_may_differ_in_rank_and_scale(name, values):
    case = named(name)
    params, x, plan = planned(case, targets=rules_of(case, **values))
    assert not merged_leaves(plan)
    assert_low_rank_equals_merge(case, params, x, plan)


def test_members_of_other_dropout_rates_are_merged_which_dropout_refuses():
    case = named("stack_scan")
    with pytest.raises(lora.InputError, match="'l0' has dropout, which can't act"):
        planned(case, targets=rules_of(case, dropout=[0.1, 0.2, 0.1]))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("fused_columns", "is joined with others along an input or output axis"),
        ("sum_over_stack", "is contracted along an axis on which weights are stacked"),
        ("stack_of_other_roles", "is stacked with weights of other axis roles"),
        ("scaled_everywhere", "is multiplied by an array along input and output axes"),
        ("returned_beside", r"output\['kernel'\]: it is returned by the function"),
        ("returned_by_scan", "leaves a loop, branch or shard_map"),
        ("windows_of_inputs", "is taken in many windows along an input or output axis"),
        ("along_an_axis", "is indexed in batch along an input or output axis"),
        ("gathered_along_other_axis", "is gathered where its shards may differ"),
        ("weights_summed", "psum.* has no low-rank rule"),
        ("primitive", "tripled has no low-rank rule"),
        ("pallas_kernel", "pallas_call has no low-rank rule"),
    ],
)
def test_every_member_is_told_why_it_is_merged(name, reason):
    case = named(name)
    params, x = make_params(case), make_input(case)
    config = lora.LoraConfig(rank=2, targets=tuple(case.roles))
    with pytest.raises(lora.InputError, match=reason) as refused:
        lora.plan(case.model_fn, params, x, config=config, strict=True)
    assert all(f"'{path}' is merged at" in str(refused.value) for path in case.roles)


def test_the_users_backward_pass_sees_the_effective_weight():
    case = named("custom_vjp_layer")
    params, x, plan = planned(case)
    adapter = random_adapter(plan)

    def plain(params, adapter, x):
        w = params["w"] + 1.5 * adapter["w"].a @ adapter["w"].b
        return scalar(lambda: jnp.tanh(x @ w))()

    own = jax.grad(plain, argnums=1)(params, adapter, x)["w"]
    got = evaluated(case, plan)(params, adapter, x)[1][1]["w"]
    assert jnp.abs(got.a - own.a).max() > 1e-3, "the layer's gradient is the user's, not autodiff's"


RATE = 0.25


def masks(model_fn, params, x):
    """A function of the dropout key: what is added to a base of zero, A and B being identities."""
    config = lora.LoraConfig(rank=x.shape[-1], alpha=x.shape[-1], targets=".*", dropout=RATE)
    plan = lora.plan(model_fn, params, x, config=config)
    eye = jnp.eye(x.shape[-1])
    adapter = {path: lora.LoraPair(eye, eye) for path in plan}
    adapted = jax.jit(lora.adapt(model_fn, plan))
    return lambda key: adapted(params, adapter, x, dropout_key=key)


@pytest.mark.parametrize("checked", [True, False])
def test_shards_of_the_activation_have_their_own_masks(checked):
    model_fn = sharded(product, P(), P("data"), P("data"), check_vma=checked)
    params, x = {"w": jnp.zeros((16, 16))}, jnp.ones((8, 16))
    mask = masks(model_fn, params, x)
    first, second = jnp.split(mask(KEY), 2)
    assert (first != second).any()
    np.testing.assert_array_equal(mask(KEY)[:4], first)
    assert (mask(jax.random.key(4))[:4] != first).any()
    np.testing.assert_allclose(mask(None), x)


@pytest.mark.parametrize("checked", [True, False])
def test_an_activation_that_every_device_holds_has_one_mask(checked):
    model_fn = sharded(product, P(), P(), P(), check_vma=checked)
    mask = masks(model_fn, {"w": jnp.zeros((16, 16))}, jnp.ones((8, 16)))(KEY)
    np.testing.assert_allclose(np.unique(mask), [0, 1 / (1 - RATE)])
    assert len({shard.data.tobytes() for shard in mask.addressable_shards}) == 1


def test_layers_of_a_stack_have_their_own_masks():
    def model_fn(params, x):
        stacked = jnp.stack([params["a"], params["b"]])
        return lax.scan(lambda carry, w: (carry, x @ w), 0, stacked)[1]

    params = {"a": jnp.zeros((16, 16)), "b": jnp.zeros((16, 16))}
    mask = masks(model_fn, params, jnp.ones((8, 16)))
    first, second = mask(KEY)
    assert (first != second).any()
    np.testing.assert_array_equal(mask(KEY)[0], first)
