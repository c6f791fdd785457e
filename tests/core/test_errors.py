"""What is refused, and in which words: the leaf, both values and the remedy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import InputError, LoraConfig, Rule

KERNEL = jnp.ones((4, 6), jnp.float32)
PARAMS = {"up": {"kernel": KERNEL, "bias": jnp.ones(6, jnp.float32)}, "unread": KERNEL}
X = jnp.ones((2, 4), jnp.float32)


def model_fn(params, x):
    return x @ params["up"]["kernel"] + params["up"]["bias"]


def closed_over(params, x):
    return x @ KERNEL


def plan(function=model_fn, params=PARAMS, x=X, **config):
    return lora.plan(function, params, x, config=LoraConfig(**{"rank": 2, **config}))


PLANNING = {
    "typo in a path": (
        lambda: plan(targets="up/kernal"),
        ["target 'up/kernal' matches no leaf", "nearest: up/kernel"],
    ),
    "closed over instead of passed": (
        lambda: plan(closed_over, targets="up/kernel"),
        ["'up/kernel' is closed over", "instead of reading it from its first argument"],
    ),
    "never read": (
        lambda: plan(targets="unread"),
        ["'unread' is never read by the function", "drop the target"],
    ),
    "never read though its axes are declared": (
        lambda: plan(targets="unread", axes=(("unread", "in out"),)),
        ["'unread' is never read by the function"],
    ),
    "roles of the wrong length": (
        lambda: plan(targets="up/kernel", axes=(("up/kernel", "stack in out"),)),
        ["'up/kernel' has 2 axes", "('stack', 'in', 'out')"],
    ),
    "roles that the function contradicts": (
        lambda: plan(
            lambda p, x: jnp.einsum("nd,dhk->nhk", x, p["w"]), {"w": jnp.ones((4, 2, 3))},
            targets="w", axes=(("w", "out in in"),), rank=1,
        ) and plan(
            lambda p, x: jnp.einsum("nd,dhk->nhk", x, p["w"]), {"w": jnp.ones((4, 2, 3))},
            targets="w", axes=(("w", "in in out"),), rank=1,
        ),
        ["'w' has roles in in out", "dot_general at", "exclude it, or declare roles"],
    ),
    "roles that are no words": (
        lambda: plan(targets="up/kernel", axes=(("up/kernel", "input output"),)),
        ["axis roles 'input output'", "stack, in, out"],
    ),
    "a leaf without a matrix": (
        lambda: plan(targets="up/bias"),
        ["'up/bias' of shape (6,) is never contracted", "variant='full'"],
    ),
    "integers": (
        lambda: plan(lambda p, x: x @ p["w"] + p["n"],
                     {"w": KERNEL, "n": jnp.arange(6, dtype="int32")}, targets="n"),
        ["'n' is int32, only float16, bfloat16, float32, float64", "exclude it"],
    ),
    "a random key among the leaves": (
        lambda: plan(lambda p, x: x @ p["w"], {"w": KERNEL, "k": jax.random.key(0)}, targets=".*"),
        ["'k' is key<fry>, only float16"],
    ),
    "a dtype without arithmetic": (
        lambda: plan(lambda p, x: x @ p["w"].astype(x.dtype),
                     {"w": KERNEL.astype(jnp.float8_e4m3fn)}, targets="w"),
        ["'w' is float8_e4m3fn, only float16"],
    ),
    "rank too large": (
        lambda: plan(targets="up/kernel", rank=9),
        ["'up/kernel' has rank 9, more than 4", "4 x 6", "lower the rank"],
    ),
    "everything at once": (
        lambda: plan(targets=("typo", "unread", "up/bias", "up/kernel"), rank=9, exclude="none"),
        ["'typo'", "exclude 'none'", "'up/bias'", "'up/kernel' has rank 9", "'unread'"],
    ),
    "config that is no LoraConfig": (
        lambda: lora.plan(model_fn, PARAMS, X, config={"rank": 2}),
        ["config is a dict: give lora_jax.LoraConfig"],
    ),
    "targets that are nothing": (
        lambda: plan(targets=None),
        ["targets has None: expected a regular expression, a preset (all-linear, attention"],
    ),
    "axes that are no pairs": (
        lambda: plan(targets="up/kernel", axes={"up/kernel": "in out"}),
        ["axes has {'up/kernel': 'in out'}: expected pairs"],
    ),
    "rank that is text": (lambda: plan(targets="up/kernel", rank="8"), ["rank of 'up/kernel'"]),
    "alpha that is text": (lambda: plan(targets="up/kernel", alpha="8"), ["alpha of 'up/kernel'"]),
    "variant that isn't": (
        lambda: plan(targets="up/kernel", variant="dorra"),
        ["variant of 'up/kernel' is 'dorra'; there are lora, dora, full, rows"],
    ),
    "rows without rows": (
        lambda: plan(targets=Rule("up/kernel", variant="rows")),
        ["variant 'rows' needs the rows to train"],
    ),
    "rows that are no numbers": (
        lambda: plan(targets=Rule("up/kernel", variant="rows", rows=("a", 1.5))),
        ["needs the rows to train", "got ('a', 1.5)"],
    ),
    "settings of factors that there are not": (
        lambda: plan(targets=Rule("up/bias", variant="full", rank=3, dropout=0.5)),
        ["'up/bias' has no factors to set rank, dropout of: drop them"],
    ),
    "a preset in other letters": (
        lambda: plan(targets="all_linear"),
        ["target 'all_linear' matches no leaf (nearest: all-linear"],
    ),
    "all of a config at once": (
        lambda: plan(targets="up/kernel", rank=0, axes=(("up/kernel", "input"),), use_rslora="no"),
        ["rank of 'up/kernel'", "axis roles 'input'", "use_rslora must be True or False"],
    ),
    "arguments in another order": (
        lambda: lora.plan(PARAMS, model_fn, X, config=LoraConfig(2, targets="up/kernel")),
        ["model_fn is a dict: the function comes first"],
    ),
    "declared axes as a list": (
        lambda: lora.plan_from_axes(PARAMS, LoraConfig(2, targets="up/kernel"), ["in out"]),
        ["axes is ['in out']: give a mapping"],
    ),
    "undeclared axes": (
        lambda: lora.plan_from_axes(PARAMS, LoraConfig(2, targets="up/kernel"), {}),
        ["'up/kernel' has no declared axis roles: add them to axes"],
    ),
    "strict": (
        lambda: lora.plan(
            lambda p, x: x @ jnp.sin(p["w"]), {"w": KERNEL}, X,
            config=LoraConfig(2, targets="w"), strict=True,
        ),
        ["'w' is merged at", "sin has no low-rank rule"],
    ),
}  # fmt: skip


def assert_refused(call, texts):
    with pytest.raises(InputError) as error:
        call()
    for text in texts:
        assert text in str(error.value)


@pytest.mark.parametrize(("call", "texts"), PLANNING.values(), ids=PLANNING)
def test_mistakes_in_planning(call, texts):
    assert_refused(call, texts)


def adapter_with(**entries):
    fresh = lora.init(jax.random.key(0), PARAMS, plan(targets="up/kernel"))
    return {**fresh, **entries}


def pair(a=(4, 2), b=(2, 6), dtype=jnp.float32):
    return {"up/kernel": lora.LoraPair(jnp.ones(a, dtype), jnp.ones(b, dtype))}


ADAPTERS = {
    "of another plan": (
        {"down/kernel": pair()["up/kernel"]},
        ["no entry for 'up/kernel'", "entry 'down/kernel' is not in the plan (nearest: up/kernel"],
    ),
    "missing entry": ({}, ["no entry for 'up/kernel': make the adapter with init("]),
    "extra entry": (
        {**pair(), "unread": pair()["up/kernel"]},
        ["entry 'unread' is not in the plan"],
    ),
    "wrong shape": (pair(a=(4, 3)), ["'up/kernel': a has shape (4, 3), the plan says (4, 2)"]),
    "wrong dtype": (pair(dtype=jnp.int32), ["'up/kernel': a is int32, expected a floating dtype"]),
    "wrong type": (
        {"up/kernel": (jnp.ones((4, 2)), jnp.ones((2, 6)))},
        ["entry 'up/kernel' is a tuple, expected a LoraPair(a, b)"],
    ),
    "not arrays": (
        {"up/kernel": lora.LoraPair(None, [1.0])},
        ["'up/kernel': a is a NoneType, expected an array", "b is a list"],
    ),
    "nothing": (None, ["the adapter is a NoneType, expected {path: entry}"]),
}


@pytest.mark.parametrize(("adapter", "texts"), ADAPTERS.values(), ids=ADAPTERS)
def test_adapters_that_do_not_fit(adapter, texts):
    planned = plan(targets="up/kernel")
    for mode in ("low_rank", "merge"):
        assert_refused(
            lambda m=mode: lora.adapt(model_fn, planned, mode=m)(PARAMS, adapter, X), texts
        )
    assert_refused(lambda: lora.merge(PARAMS, adapter, planned), texts)


def params_with(kernel):
    return {**PARAMS, "up": {"kernel": kernel, "bias": PARAMS["up"]["bias"]}}


BASES = {
    "wrong shape": (
        params_with(jnp.ones((4, 8), jnp.float32)),
        ["'up/kernel' is float32[4, 8], the plan says float32[4, 6]", "plan with the params"],
    ),
    "wrong dtype": (
        params_with(KERNEL.astype(jnp.bfloat16)),
        ["'up/kernel' is bfloat16[4, 6], the plan says float32[4, 6]"],
    ),
    "missing leaf": ({"up": {}}, ["no such leaf: 'up/kernel'"]),
    "no arrays": (params_with(3.0), ["'up/kernel' is float[], the plan says float32[4, 6]"]),
}


@pytest.mark.parametrize(("params", "texts"), BASES.values(), ids=BASES)
def test_bases_that_do_not_fit(params, texts):
    planned = plan(targets="up/kernel")
    adapter = lora.init(jax.random.key(0), PARAMS, planned)
    assert_refused(lambda: lora.adapt(model_fn, planned)(params, adapter, X), texts)
    assert_refused(lambda: lora.merge(params, adapter, planned), texts)
    assert_refused(lambda: lora.init(jax.random.key(0), params, planned), texts)


def test_declared_roles_are_checked_at_every_use():
    params = {"w": jnp.ones((4, 2, 3), jnp.float32)}
    planned = lora.plan_from_axes(params, LoraConfig(1, targets="w"), {"w": "in in out"})
    adapter = lora.init(jax.random.key(0), params, planned)
    adapted = lora.adapt(lambda p, x: jnp.einsum("nd,dhk->nhk", x, p["w"]), planned)
    texts = ["the plan does not fit the function", "'w' has axis roles in in out", "test_errors.py"]
    assert_refused(lambda: adapted(params, adapter, X), texts)
    assert_refused(lambda: jax.jit(adapted)(params, adapter, X), texts)


def test_an_unknown_mode_or_form_is_refused():
    planned = plan(targets="up/kernel")
    assert_refused(lambda: lora.adapt(model_fn, planned, mode="merged"), ["mode 'merged'"])
    assert_refused(lambda: lora.explain(planned, form="html"), ["form 'html'", "'json'"])


def test_what_is_no_plan_is_refused():
    planned, adapter = plan(targets="up/kernel"), adapter_with()
    for call in (
        lambda: lora.merge(PARAMS, planned, adapter),
        lambda: lora.explain({}),
        lambda: lora.init(jax.random.key(0), PARAMS, LoraConfig(2, targets="up/kernel")),
        lambda: lora.adapt(model_fn, LoraConfig(2, targets="up/kernel")),
        lambda: lora.rounding_loss(PARAMS, PARAMS, planned, adapter),
    ):
        assert_refused(call, ["the plan is a ", "make it with plan("])
    assert_refused(lambda: lora.cast(adapter, "int8"), ["can't be int8"])


def test_a_model_with_a_dropout_key_of_its_own_is_refused():
    planned = plan(targets="up/kernel")

    def own(params, x, dropout_key=None):
        return model_fn(params, x)

    assert_refused(lambda: lora.adapt(own, planned), ["has a parameter dropout_key"])


def test_dropout_in_merge_mode_is_refused():
    planned = plan(targets="up/kernel", dropout=0.5)
    adapted = lora.adapt(model_fn, planned, mode="merge")
    call = lambda: adapted(PARAMS, adapter_with(), X, dropout_key=jax.random.key(0))  # noqa: E731
    assert_refused(call, ["mode='merge' has no input of A to drop"])


def test_nothing_is_changed_by_what_is_refused():
    before = jax.tree.map(np.array, PARAMS)
    for call, texts in PLANNING.values():
        assert_refused(call, texts)
    jax.tree.map(np.testing.assert_array_equal, before, PARAMS)
