"""What a plan says, and what it refuses."""

import inspect
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

import lora_jax as lora
from lora_jax import InputError, LoraConfig, Rule

PARAMS = {
    "q_proj": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)},
    "k_proj": {"kernel": jnp.ones((4, 6))},
    "unread": {"kernel": jnp.ones((4, 6))},
    "ids": jnp.arange(4),
}
X = jnp.ones((2, 4))


def model_fn(params, x):
    q = x @ params["q_proj"]["kernel"] + params["q_proj"]["bias"]
    return q * (x @ params["k_proj"]["kernel"]) + params["ids"].sum()


def make_plan(**config):
    return lora.plan(model_fn, PARAMS, X, config=LoraConfig(**{"rank": 2, **config}))


def test_first_matching_rule_wins_and_exclude_wins_over_all():
    targets = (Rule("k_proj/.*", rank=1, alpha=3), ".*proj/kernel")
    plan = make_plan(targets=targets, alpha=8)
    assert {path: (s.rank, s.scale) for path, s in plan.items()} == {
        "k_proj/kernel": (1, 3.0),
        "q_proj/kernel": (2, 4.0),
    }
    assert list(make_plan(targets=".*proj/kernel", exclude="k_proj/.*")) == ["q_proj/kernel"]


def test_rslora_divides_by_the_root_of_the_rank():
    plan = make_plan(rank=4, alpha=8, use_rslora=True, targets="q_proj/kernel")
    assert plan["q_proj/kernel"].scale == 4.0


def test_plan_is_hashable_and_equal_by_value():
    one, two = (make_plan(targets="q_proj/kernel") for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)
    assert hash(one) != hash(make_plan(targets="k_proj/kernel"))


def test_use_names_the_users_line():
    [use] = make_plan(targets="k_proj/kernel")["k_proj/kernel"].uses
    assert use.operation == "dot_general"
    assert "test_planning.py" in use.where
    assert not use.merged_because


def test_plan_works_on_shapes_alone():
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (PARAMS, X))
    plan = lora.plan(model_fn, *shapes, config=LoraConfig(rank=2, targets="q_proj/kernel"))
    assert plan == make_plan(targets="q_proj/kernel")


def test_adding_a_target_leaves_other_values_alone():
    key = jax.random.key(3)
    alone = lora.init(key, PARAMS, make_plan(targets="k_proj/kernel"))
    both = lora.init(key, PARAMS, make_plan(targets=".*_proj/kernel"))
    assert (alone["k_proj/kernel"].a == both["k_proj/kernel"].a).all()
    assert (both["q_proj/kernel"].a != both["k_proj/kernel"].a).any()


def test_initialisers_have_the_documented_spread():
    shapes = {"w": jax.ShapeDtypeStruct((400, 300), jnp.float32)}
    for init, std, expected in (
        ("kaiming_uniform", None, (1 / 3 / 400) ** 0.5),
        ("gaussian", None, 1 / 16),
        ("gaussian", 0.02, 0.02),
    ):
        config = LoraConfig(rank=16, targets="w", init=init, init_std=std)
        plan = lora.plan_from_axes(shapes, config, {"w": "in out"})
        a = lora.init(jax.random.key(0), shapes, plan)["w"].a
        assert abs(float(a.std()) / expected - 1) < 0.03
        assert abs(float(a.mean())) < expected / 10
    bound = 1 / 400**0.5
    config = LoraConfig(rank=16, targets="w")
    a = lora.init(jax.random.key(0), shapes, lora.plan_from_axes(shapes, config, {"w": "in out"}))
    assert 0.99 * bound < float(jnp.abs(a["w"].a).max()) <= bound


BAD_PLANS = {
    "no leaf matches": (
        {"targets": ".*q_porj/kernel"},
        ["'.*q_porj/kernel' matches no leaf", "q_proj/kernel"],
    ),
    "every offender at once": (
        {"targets": ("nowhere", "unread/kernel", "ids")},
        ["'nowhere'", "'unread/kernel' is never read", "'ids' is int"],
    ),
    "no product": (
        {"targets": "q_proj/bias"},
        ["'q_proj/bias' of shape (6,) is never contracted"],
    ),
    "exclude and axes that match nothing": (
        {"targets": "q_proj/kernel", "exclude": "typo", "axes": (("other", "in out"),)},
        ["exclude 'typo' matches no leaf", "axes 'other' matches no leaf"],
    ),
    "shadowed rule": (
        {"targets": (".*_proj/kernel", Rule("k_proj/.*", rank=1))},
        ["'k_proj/.*' decides nothing", "put it first"],
    ),
    "everything excluded": (
        {"targets": "k_proj/kernel", "exclude": "k_proj.*"},
        ["'k_proj/kernel' decides nothing"],
    ),
    "rank too large": (
        {"targets": "q_proj/kernel", "rank": 5},
        ["'q_proj/kernel' has rank 5, more than 4", "4 x 6"],
    ),
    "declared roles of the wrong length": (
        {"targets": "q_proj/kernel", "axes": (("q.*", "stack in out"),)},
        ["has 2 axes", "('stack', 'in', 'out')"],
    ),
}


@pytest.mark.parametrize(("config", "texts"), BAD_PLANS.values(), ids=BAD_PLANS)
def test_bad_plans_name_every_offender(config, texts):
    with pytest.raises(InputError) as error:
        make_plan(**config)
    for text in texts:
        assert text in str(error.value)


BAD_CONFIGS = {
    "rank": (
        {"rank": 0, "targets": "w"},
        "rank of 'w' must be an integer of at least 1, or a tuple",
    ),
    "alpha": ({"alpha": float("nan"), "targets": "w"}, "alpha of 'w' must be"),
    "pattern": ({"targets": "("}, "'(' is not a regular expression"),
    "init": ({"targets": "w", "init": "gausian"}, "there are kaiming_uniform, gaussian"),
    "dropout": ({"targets": "w", "dropout": 1.0}, "dropout of 'w' must be"),
    "empty": ({"targets": ()}, "targets is empty"),
    "std": ({"targets": "w", "init_std": -1.0}, "init_std of 'w'"),
    "roles": ({"targets": "w", "axes": (("w", "in"),)}, "at least one 'in' and one 'out'"),
}


@pytest.mark.parametrize(("values", "text"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_bad_configs(values, text):
    with pytest.raises(InputError) as error:
        LoraConfig(**values)
    assert text in str(error.value)


def test_contradicting_uses_are_refused():
    def contradicting(params, x):
        heads = jnp.einsum("bd,dhk->bhk", x, params["w"])
        return heads.sum() + jnp.einsum("bdh,dhk->bk", jnp.ones((2, 4, 2)), params["w"])

    with pytest.raises(InputError, match=r"has roles in out out, but .* contracts other axes"):
        lora.plan(contradicting, {"w": jnp.ones((4, 2, 3))}, X, config=LoraConfig(1, targets="w"))


def test_strict_refuses_local_merges():
    def normed(params, x):
        return x @ (params["w"] / jnp.linalg.norm(params["w"]))

    config = LoraConfig(rank=1, targets="w")
    assert lora.plan(normed, {"w": jnp.ones((4, 4))}, X, config=config)["w"].uses
    with pytest.raises(InputError, match=r"is merged at .*test_planning.py"):
        lora.plan(normed, {"w": jnp.ones((4, 4))}, X, config=config, strict=True)


def test_adapter_of_another_plan_is_refused_by_name():
    plan = make_plan(targets=".*_proj/kernel")
    adapter = lora.init(jax.random.key(0), PARAMS, plan)
    adapted = lora.adapt(model_fn, plan)
    missing = {"q_proj/kernel": adapter["q_proj/kernel"]}
    wrong = {
        "q_proj/kernel": lora.LoraPair(jnp.ones((4, 3)), jnp.ones((2, 6), jnp.int32)),
        "k_proj/kernel": (jnp.ones((4, 2)), jnp.ones((2, 6))),
        "v_proj/kernel": adapter["q_proj/kernel"],
    }
    with pytest.raises(InputError, match="no entry for 'k_proj/kernel'"):
        adapted(PARAMS, missing, X)
    with pytest.raises(InputError) as error:
        lora.merge(PARAMS, wrong, plan)
    for text in ("(4, 3), the plan says (4, 2)", "b is int32", "is a tuple", "'v_proj/kernel' is"):
        assert text in str(error.value)


def test_params_of_another_shape_are_refused():
    plan = make_plan(targets="q_proj/kernel")
    adapter = lora.init(jax.random.key(0), PARAMS, plan)
    other = {**PARAMS, "q_proj": {"kernel": jnp.ones((4, 8), "float32"), "bias": jnp.ones(8)}}
    with pytest.raises(InputError, match=r"float32\[4, 8\], the plan says float32\[4, 6\]"):
        lora.adapt(model_fn, plan)(other, adapter, X)


def test_explain_prints_leaves_uses_and_totals():
    text = lora.explain(make_plan(targets=".*_proj/kernel"))
    assert "q_proj/kernel" in text
    assert "in:4 out:6" in text
    assert "test_planning.py" in text
    assert "trainable params: 40 || all params: 122 || trainable%: 32.7869" in text


def test_static_arguments_reach_the_function_as_they_are():
    def flagged(params, x, *, double, name=None):
        assert name == "given"
        return (2 if double else 1) * (x @ params["q_proj"]["kernel"])

    plan = lora.plan(
        flagged, PARAMS, X, config=LoraConfig(2, targets="q_proj/kernel"), double=True, name="given"
    )
    adapter = lora.init(jax.random.key(0), PARAMS, plan)
    twice = lora.adapt(flagged, plan)(PARAMS, adapter, X, double=True, name="given")
    once = lora.adapt(flagged, plan)(PARAMS, adapter, X, double=False, name="given")
    assert (twice == 2 * once).all()


def test_named_scopes_survive_in_the_compiled_program():
    def scoped(params, x):
        with jax.named_scope("my_layer"):
            return jnp.tanh(x @ params["q_proj"]["kernel"])

    plan = lora.plan(scoped, PARAMS, X, config=LoraConfig(2, targets="q_proj/kernel"))
    adapter = lora.init(jax.random.key(0), PARAMS, plan)
    lowered = jax.jit(lora.adapt(scoped, plan)).lower(PARAMS, adapter, X)
    assert "my_layer" in lowered.compile().as_text()


def test_lookups_name_the_users_line():
    def lookup(params, ids):
        return jnp.take(params["q_proj"]["kernel"], ids, axis=0)

    config = LoraConfig(2, targets="q_proj/kernel")
    [use] = lora.plan(lookup, PARAMS, jnp.arange(3), config=config)["q_proj/kernel"].uses
    assert use.operation == "gather"
    assert "test_planning.py" in use.where


@pytest.mark.parametrize("mode", ["low_rank", "merge"])
def test_the_signature_is_the_adapted_functions_own(mode):
    plan = make_plan(targets="q_proj/kernel")
    signature = inspect.signature(lora.adapt(model_fn, plan, mode=mode))
    assert list(signature.parameters)[:2] == ["params", "adapter"]


class Unsorted(NamedTuple):
    """Leaves whose order in the tree is not that of their paths."""

    weight: jax.Array
    bias: jax.Array


@pytest.mark.parametrize("tree", ["named_tuple", "keys_before_the_slash"])
def test_leaves_keep_their_order_whatever_their_paths(tree):
    weight, bias = jnp.ones((4, 6)), jnp.ones(6)
    trees = {
        "named_tuple": (Unsorted(weight, bias), lambda p: tuple(p)),
        "keys_before_the_slash": (
            {"w": {"weight": weight}, "w-bias": bias},
            lambda p: (p["w"]["weight"], p["w-bias"]),
        ),
    }
    params, unpack = trees[tree]

    def affine(params, x):
        weight, bias = unpack(params)
        return x @ weight + bias

    plan = lora.plan(affine, params, X, config=LoraConfig(2, targets=".*weight"))
    adapter = lora.init(jax.random.key(0), params, plan)
    got = lora.adapt(affine, plan)(params, adapter, X)
    assert jnp.allclose(got, affine(params, X))


def test_a_weight_used_twice_by_one_operation_is_told_as_merged():
    def squared(params, x):
        return x @ (params["w"] @ params["w"])

    config = LoraConfig(rank=1, targets="w")
    with pytest.raises(InputError, match=r"is merged at .*another adapted weight"):
        lora.plan(squared, {"w": jnp.ones((4, 4))}, X, config=config, strict=True)


def test_outputs_that_are_no_arrays_come_back_as_they_are():
    def described(params, x):
        return {"y": x @ params["q_proj"]["kernel"], "name": "q", "count": 3, "of": model_fn}

    plan = lora.plan(described, PARAMS, X, config=LoraConfig(2, targets="q_proj/kernel"))
    adapter = lora.init(jax.random.key(0), PARAMS, plan)
    got = lora.adapt(described, plan)(PARAMS, adapter, X)
    assert (got["name"], got["count"], got["of"]) == ("q", 3, model_fn)
    assert (got["y"] == described(PARAMS, X)["y"]).all()


def test_sequences_of_any_kind_may_be_given():
    params = {"w": jnp.ones((2, 4, 4)), "e": jnp.ones((9, 4))}
    rules = (Rule("w", rank=[1, 2]), Rule("e", variant="rows", rows=range(5, 7)))
    config = LoraConfig(targets=list(rules), alpha=[2.0, 4.0])
    plan = lora.plan_from_axes(params, config, {"w": "stack in out", "e": "in out"})
    assert (plan["w"].ranks, plan["w"].scale, plan["e"].rows) == ((1, 2), 2.0, (5, 6))
    assert hash(plan)
    told = {site["path"]: site for site in json.loads(lora.explain(plan, form="json"))["sites"]}
    assert told["e"]["rows"] == [5, 6]
