"""What an entry may be: unequal ranks in a stack, DoRA, leaves trained whole, trained rows."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import lora_jax as lora
from lora_jax import InputError, LoraConfig, Rule
from lora_jax.adapter import shapes_of

RNG = np.random.default_rng(0)


def normal(*shape):
    with jax.enable_x64(True):
        return jnp.asarray(RNG.normal(size=shape))


X = normal(5, 4)


def random_adapter(plan, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape)), shapes_of(plan))


def value_and_grad(model_fn, plan, params, adapter, *args, mode):
    adapted = lora.adapt(model_fn, plan, mode=mode)

    def loss(adapter):
        return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(adapted(params, adapter, *args)))

    return jax.jit(jax.value_and_grad(loss))(adapter)


def assert_low_rank_equals_merge(model_fn, plan, params, adapter, *args):
    low_rank, merge = (
        value_and_grad(model_fn, plan, params, adapter, *args, mode=mode)
        for mode in ("low_rank", "merge")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10),
                 low_rank, merge)  # fmt: skip
    base = sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(model_fn(params, *args)))
    assert abs(low_rank[0] - base) > 1e-3


def scanned(params, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0]


def experts(params, x):
    return lax.ragged_dot(x, params["w"], jnp.array([2, 0, 3], jnp.int32))


def picked(params, x):
    return jnp.einsum("nd,ndf->nf", x, params["w"][jnp.array([2, 0, 1, 1, 0])])


STACKED = {"w": normal(3, 4, 4)}


@pytest.mark.parametrize("model_fn", [scanned, experts, picked])
def test_rank_and_scale_may_differ_along_a_stack(model_fn):
    config = LoraConfig(targets=Rule("w", rank=(3, 0, 1), alpha=(6.0, 1.0, 5.0)))
    plan = lora.plan(model_fn, STACKED, X, config=config)
    site = plan["w"]
    assert (site.rank, site.ranks, site.scale) == (3, (3, 0, 1), (2.0, 0.0, 5.0))
    assert site.trainable == 4 * (4 + 4)
    fresh = lora.init(jax.random.key(0), STACKED, plan)["w"]
    assert [int((jnp.abs(a).sum(0) > 0).sum()) for a in fresh.a] == [3, 0, 1]
    b = jnp.asarray(RNG.normal(size=site.b_shape)) * (jnp.abs(fresh.a).sum(1) > 0)[..., None]
    adapter = {"w": lora.LoraPair(fresh.a.astype(jnp.float64), b)}
    assert_low_rank_equals_merge(model_fn, plan, STACKED, adapter, X)
    merged = lora.merge(STACKED, adapter, plan)["w"]
    for layer, scale in enumerate((2.0, 0.0, 5.0)):
        delta = scale * adapter["w"].a[layer] @ b[layer]
        np.testing.assert_allclose(merged[layer] - STACKED["w"][layer], delta, atol=1e-12)


def test_what_fills_up_a_smaller_rank_stays_zero_under_an_optimizer():
    plan = lora.plan(scanned, STACKED, X, config=LoraConfig(rank=(3, 0, 1), targets="w"))
    adapter = lora.init(jax.random.key(0), STACKED, plan)
    adapted, tx = lora.adapt(scanned, plan), optax.adamw(0.1)
    state = tx.init(adapter)

    @jax.jit
    def step(adapter, state):
        grads = jax.grad(lambda a: (adapted(STACKED, a, X) ** 2).sum())(adapter)
        updates, state = tx.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state

    for _ in range(5):
        adapter, state = step(adapter, state)
    beyond = np.arange(3) >= np.array([3, 0, 1])[:, None]
    assert not np.asarray(adapter["w"].a).transpose(0, 2, 1)[beyond].any()
    assert not np.asarray(adapter["w"].b)[beyond].any()
    assert np.asarray(adapter["w"].b)[~beyond].all()


def test_one_scale_for_all_layers_is_one_number():
    config = LoraConfig(rank=(2, 0, 4), alpha=(1.0, 7.0, 2.0), targets="w")
    assert lora.plan(scanned, STACKED, X, config=config)["w"].scale == 0.5


BAD_STACKS = {
    "not as many ranks as layers": (LoraConfig(rank=(1, 2), targets="w"), "3 along its stack"),
    "no stack": (LoraConfig(rank=(1, 2), targets="v"), "'v' has no stack axis"),
    "dora on a layer of rank 0": (
        LoraConfig(rank=(1, 0, 1), targets="w", variant="dora"),
        "layers of rank 0, whose magnitude",
    ),
}


@pytest.mark.parametrize(("config", "text"), BAD_STACKS.values(), ids=BAD_STACKS)
def test_ranks_that_do_not_fit_the_stack_are_refused(config, text):
    def model_fn(params, x):
        return scanned(params, x) @ params["v"]

    with pytest.raises(InputError, match=text):
        lora.plan(model_fn, {**STACKED, "v": normal(4, 4)}, X, config=config)


def test_dora_rescales_each_output_to_its_magnitude():
    params = {"w": normal(4, 6)}
    plan = lora.plan(lambda p, x: x @ p["w"], params, X,
                     config=LoraConfig(2, targets="w", variant="dora"))  # fmt: skip
    adapter = random_adapter(plan)
    merged = lora.merge(params, adapter, plan)["w"]
    np.testing.assert_allclose(jnp.linalg.norm(merged, axis=0), jnp.abs(adapter["w"].m))
    fresh = lora.init(jax.random.key(0), params, plan)["w"]
    np.testing.assert_allclose(fresh.m, jnp.linalg.norm(params["w"], axis=0), rtol=1e-12)


def test_doras_norm_is_detached():
    """Along W's own direction a free norm would cancel the gradient; a detached one doesn't."""
    params = {"w": normal(4, 6)}
    plan = lora.plan(lambda p, x: x @ p["w"], params, X,
                     config=LoraConfig(4, 4.0, "w", variant="dora"))  # fmt: skip
    adapter = {"w": lora.DoraTriple(params["w"][:, :4], jnp.eye(4, 6), jnp.ones(6))}
    adapted = lora.adapt(lambda p, x: x @ p["w"], plan)

    def loss(adapter):
        return adapted(params, adapter, X).sum()

    free_norm = jax.grad(lambda a: (X @ _renormalised(params, plan, a)).sum())(adapter)
    detached = jax.grad(loss)(adapter)
    assert float(jnp.abs(detached["w"].b - free_norm["w"].b).max()) > 0.1
    np.testing.assert_allclose(detached["w"].m, free_norm["w"].m, atol=1e-10)


def _renormalised(params, plan, adapter):
    total = params["w"] + adapter["w"].a @ adapter["w"].b * plan["w"].scale
    return adapter["w"].m * total / jnp.linalg.norm(total, axis=0)


def test_doras_step_has_no_array_of_the_weights_shape_that_plain_loras_lacks():
    # In float32: XLA:CPU itself copies an operand of a thin bfloat16 product to float32.
    params = {"w": jax.ShapeDtypeStruct((96, 160), jnp.float32)}
    x = jax.ShapeDtypeStruct((24, 96), jnp.float32)

    def model_fn(params, x):
        return jnp.tanh(x @ params["w"])

    def weight_shaped(variant, mode="low_rank"):
        """Buffers of W's size that the compiled gradient allocates, its own input among them."""
        plan = lora.plan(model_fn, params, x, config=LoraConfig(4, targets="w", variant=variant))
        adapted = lora.adapt(model_fn, plan, mode=mode)
        grad = jax.grad(lambda adapter, p, x: adapted(p, adapter, x).astype(jnp.float32).sum())
        text = jax.jit(grad).lower(shapes_of(plan), params, x).compile().as_text()
        results = re.findall(r"= \w+\[([\d,]+)\]", text[text.index("\nENTRY") :])
        return sum(shape in ("96,160", "160,96") for shape in results)

    assert weight_shaped("lora") >= 1
    assert weight_shaped("dora") <= weight_shaped("lora")
    assert weight_shaped("dora", "merge") > weight_shaped("lora")


def test_a_magnitude_survives_a_weight_of_zeros():
    params = {"w": jnp.zeros((4, 6)).at[:, 0].set(1.0)}
    plan = lora.plan(lambda p, x: x @ p["w"], params, X,
                     config=LoraConfig(2, targets="w", variant="dora"))  # fmt: skip
    adapter = lora.init(jax.random.key(0), params, plan)
    for mode in ("low_rank", "merge"):
        value, grads = value_and_grad(lambda p, x: x @ p["w"], plan, params, adapter, X, mode=mode)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((value, grads)))


def network(params, x):
    hidden = jnp.tanh(x @ params["w"] + params["bias"])
    return hidden * params["norm"]


NETWORK = {"w": normal(4, 6), "bias": normal(6), "norm": normal(6)}


def test_leaves_of_any_shape_may_be_trained_whole():
    targets = ("w", Rule("bias|norm", variant="full"))
    plan = lora.plan(network, NETWORK, X, config=LoraConfig(2, targets=targets))
    assert plan.trainable == 2 * (4 + 6) + 6 + 6
    fresh = lora.init(jax.random.key(0), NETWORK, plan)
    np.testing.assert_array_equal(lora.adapt(network, plan)(NETWORK, fresh, X), network(NETWORK, X))
    assert fresh["bias"].value is not NETWORK["bias"]
    adapter = random_adapter(plan)
    assert_low_rank_equals_merge(network, plan, NETWORK, adapter, X)
    assert (lora.merge(NETWORK, adapter, plan)["norm"] == adapter["norm"].value).all()


def test_a_bias_gets_what_a_bias_on_b_would_add():
    targets = ("w", Rule("bias", variant="bias", alpha=6))
    plan = lora.plan(network, NETWORK, X, config=LoraConfig(2, targets=targets))
    assert plan["bias"].scale == 3.0
    assert plan.trainable == 2 * (4 + 6) + 6
    fresh = lora.init(jax.random.key(0), NETWORK, plan)
    np.testing.assert_array_equal(lora.adapt(network, plan)(NETWORK, fresh, X), network(NETWORK, X))
    adapter = random_adapter(plan)
    assert_low_rank_equals_merge(network, plan, NETWORK, adapter, X)
    added = lora.merge(NETWORK, adapter, plan)["bias"] - NETWORK["bias"]
    np.testing.assert_allclose(added, 3.0 * adapter["bias"].bias, rtol=1e-12)


def test_biases_of_a_stack_have_the_scales_of_its_layers():
    params = {"w": normal(3, 4, 4), "bias": normal(3, 4)}
    targets = ("w", Rule("bias", variant="bias"))
    config = LoraConfig((2, 0, 1), (3.0, 9.0, 4.0), targets=targets)

    def layers(params, x):
        return lax.scan(lambda h, p: (jnp.tanh(h @ p["w"] + p["bias"]), None), x, params)[0]

    plan = lora.plan(layers, params, X, config=config)
    assert plan["bias"].scale == (1.5, 0.0, 4.0)
    adapter = random_adapter(plan)
    assert_low_rank_equals_merge(layers, plan, params, adapter, X)
    added = lora.merge(params, adapter, plan)["bias"] - params["bias"]
    scales = np.array([[1.5], [0.0], [4.0]])
    np.testing.assert_allclose(added, scales * adapter["bias"].bias, atol=1e-12)
    equal = replace(config, rank=(2, 0, 2), alpha=3.0)
    assert lora.plan(layers, params, X, config=equal)["bias"].scale == (1.5, 0.0, 1.5)
    with pytest.raises(InputError, match="'bias' has 3 along its first axis, but rank has 2"):
        lora.plan(
            layers,
            params,
            X,
            config=replace(config, targets=Rule("bias", variant="bias", rank=(1, 2), alpha=1.0)),
        )


def test_whole_leaves_are_float32_and_cast_at_use():
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), NETWORK)
    x = X.astype(jnp.bfloat16)
    plan = lora.plan(network, half, x, config=LoraConfig(2, targets=Rule("norm", variant="full")))
    adapter = lora.init(jax.random.key(0), half, plan)
    assert adapter["norm"].value.dtype == jnp.float32
    assert lora.adapt(network, plan)(half, adapter, x).dtype == jnp.bfloat16


def tied(params, ids):
    hidden = jnp.tanh(params["embed"][ids])
    return hidden @ params["embed"].T


IDS = jnp.array([[0, 3, 3], [6, 5, 1]])
TABLE = {"embed": normal(7, 4)}


def test_rows_of_a_tied_embedding_are_trained_in_both_uses():
    config = LoraConfig(targets=Rule("embed", variant="rows", rows=(3, 6)))
    plan = lora.plan(tied, TABLE, IDS, config=config)
    assert plan.trainable == 2 * 4
    assert not any(use.merged_because for use in plan["embed"].uses)
    fresh = lora.init(jax.random.key(0), TABLE, plan)
    adapted = lora.adapt(tied, plan)
    np.testing.assert_allclose(adapted(TABLE, fresh, IDS), tied(TABLE, IDS), atol=1e-12)
    adapter = random_adapter(plan)
    assert_low_rank_equals_merge(tied, plan, TABLE, adapter, IDS)
    merged = lora.merge(TABLE, adapter, plan)["embed"]
    np.testing.assert_array_equal(merged[jnp.array([3, 6])], adapter["embed"].rows)
    untouched = jnp.array([0, 1, 2, 4, 5])
    np.testing.assert_array_equal(merged[untouched], TABLE["embed"][untouched])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_replaced_rows_count_for_nothing_whatever_they_held(dtype):
    table = jnp.asarray(TABLE["embed"], dtype).at[3].set(jnp.nan).at[6].set(300)
    config = LoraConfig(targets=Rule("embed", variant="rows", rows=(3, 6)))
    plan = lora.plan(tied, {"embed": table}, IDS, config=config)
    adapter = {"embed": lora.Rows((3, 6), jnp.full((2, 4), 0.123))}
    low_rank, merge = (
        lora.adapt(tied, plan, mode=mode)({"embed": table}, adapter, IDS)
        for mode in ("low_rank", "merge")
    )
    assert np.isfinite(np.asarray(low_rank, np.float32)).all()
    np.testing.assert_allclose(
        np.asarray(low_rank, np.float32), np.asarray(merge, np.float32), atol=1e-6
    )


def test_rows_of_a_head_that_is_stored_outputs_first():
    params = {"head": normal(7, 4)}
    config = LoraConfig(targets=Rule("head", variant="rows", rows=(0, 5)))
    plan = lora.plan(lambda p, x: x @ p["head"].T, params, X, config=config)
    assert plan["head"].roles == ("out", "in")
    adapter = random_adapter(plan)
    assert_low_rank_equals_merge(lambda p, x: x @ p["head"].T, plan, params, adapter, X)


BAD_ROWS = {
    "outside": ((3, 7), r"rows \[7\] outside"),
    "twice": ((3, 3), "some twice"),
}


@pytest.mark.parametrize(("rows", "text"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_rows_that_the_matrix_lacks_are_refused(rows, text):
    config = LoraConfig(targets=Rule("embed", variant="rows", rows=rows))
    with pytest.raises(InputError, match=text):
        lora.plan(tied, TABLE, IDS, config=config)


def test_entries_of_another_variant_or_other_rows_are_refused():
    config = LoraConfig(targets=Rule("embed", variant="rows", rows=(3, 6)))
    plan = lora.plan(tied, TABLE, IDS, config=config)
    entries = {
        r"a LoraPair, expected a Rows\(rows\)": lora.LoraPair(normal(7, 2), normal(2, 4)),
        r"trains rows \(3, 5\), the plan says \(3, 6\)": lora.Rows((3, 5), normal(2, 4)),
    }
    for text, entry in entries.items():
        with pytest.raises(InputError, match=text):
            lora.adapt(tied, plan)(TABLE, {"embed": entry}, IDS)


def test_values_are_needed_where_an_entry_starts_from_them():
    shapes = jax.eval_shape(lambda: TABLE)
    config = LoraConfig(targets=Rule("embed", variant="rows", rows=(3, 6)))
    plan = lora.plan(tied, shapes, IDS, config=config)
    with pytest.raises(InputError, match="'embed' is a shape without values"):
        lora.init(jax.random.key(0), shapes, plan)


@pytest.mark.parametrize("variant", ["dora", "full"])
def test_many_adapters_of_a_variant_in_one_vmap(variant):
    plan = lora.plan(network, NETWORK, X, config=LoraConfig(2, targets="w", variant=variant))
    adapters = [random_adapter(plan, seed) for seed in range(3)]
    together = jax.vmap(lora.adapt(network, plan), in_axes=(None, 0, None))(
        NETWORK, jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters), X
    )
    for i, adapter in enumerate(adapters):
        alone = lora.adapt(network, plan)(NETWORK, adapter, X)
        np.testing.assert_allclose(together[i], alone, rtol=1e-10)


def test_the_scale_can_not_overflow_float16():
    params, x = {"w": jnp.zeros((4, 6), jnp.float16)}, jnp.full((1, 4), 2000.0, jnp.float16)
    plan = lora.plan(lambda p, x: x @ p["w"], params, x, config=LoraConfig(2, 64.0, "w"))
    adapter = {"w": lora.LoraPair(jnp.ones((4, 2)), jnp.full((2, 6), 1e-4))}
    low_rank, merge = (
        lora.adapt(lambda p, x: x @ p["w"], plan, mode=mode)(params, adapter, x)
        for mode in ("low_rank", "merge")
    )
    np.testing.assert_allclose(low_rank, merge, rtol=1e-3)


@pytest.mark.parametrize(("weight", "activation"), [
    (jnp.float32, jnp.complex64), (jnp.float32, jnp.float64), (jnp.bfloat16, jnp.float32),
])  # fmt: skip
def test_an_activation_may_be_wider_than_the_weight(weight, activation):
    params, x = {"w": normal(4, 6).astype(weight)}, normal(5, 4).astype(activation)

    def model_fn(params, x):
        dims = (((1,), (0,)), ((), ()))
        return lax.dot_general(x, params["w"], dims, preferred_element_type=activation)

    plan = lora.plan(model_fn, params, x, config=LoraConfig(2, targets="w"))
    adapter = random_adapter(plan)
    got = lora.adapt(model_fn, plan)(params, adapter, x)
    delta = adapter["w"].a @ adapter["w"].b * plan["w"].scale
    assert got.dtype == activation
    np.testing.assert_allclose(got, model_fn(params, x) + x @ delta, rtol=1e-5, atol=1e-5)


def test_a_merge_outlives_the_adapter():
    plan = lora.plan(network, NETWORK, X, config=LoraConfig(targets=Rule("norm", variant="full")))
    adapter = jax.tree.map(lambda s: jnp.ones(s.shape, jnp.float64), shapes_of(plan))
    merged = lora.merge(NETWORK, adapter, plan)
    jax.jit(lambda a: jax.tree.map(lambda x: x + 1, a), donate_argnums=0)(adapter)
    assert (merged["norm"] == 1).all()


def test_a_leaf_trained_whole_is_plain_where_weights_are_stacked():
    params = {"a": normal(4, 4), "b": normal(4, 4)}

    def model_fn(params, x):
        return scanned({"w": jnp.stack([params["a"], params["b"]])}, x)

    config = LoraConfig(2, targets=("a", Rule("b", variant="full")))
    plan = lora.plan(model_fn, params, X, config=config, strict=True)
    assert [use.operation for use in plan["b"].uses]
    assert_low_rank_equals_merge(model_fn, plan, params, random_adapter(plan), X)
