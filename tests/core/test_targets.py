"""Presets, functions and rules: which leaves of a real model they pick."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import lora_jax as lora
from lora_jax import InputError, LoraConfig, Rule
from lora_jax.models.decoder import Decoder, init_params
from lora_jax.models.presets import TINY
from lora_jax.targets import kind_of

TOKENS = jax.ShapeDtypeStruct((2, 8), jnp.int32)
DECODER = jax.eval_shape(lambda: init_params(jax.random.key(0), TINY))
PROJECTIONS = {f"layers/self_attn/{x}_proj/kernel" for x in "qkvo"}
FEED_FORWARD = {f"layers/mlp/{x}_proj/kernel" for x in ("gate", "up", "down")}


def decoder(params, tokens):
    return Decoder(TINY).apply({"params": params}, tokens)[0]


def picked(targets, **config):
    return lora.plan(decoder, DECODER, TOKENS, config=LoraConfig(4, targets=targets, **config))


PICKS = {
    "all-linear": PROJECTIONS | FEED_FORWARD,
    "attention": PROJECTIONS,
    "mlp": FEED_FORWARD,
}


@pytest.mark.parametrize(("preset", "expected"), PICKS.items())
def test_presets_on_a_decoder(preset, expected):
    assert set(picked(preset)) == expected


def test_square_picks_what_has_as_many_inputs_as_outputs():
    plan = picked("square")
    assert set(plan) == {
        path for path, site in picked("all-linear").items() if site.fan_in == site.fan_out
    }
    assert plan


def test_presets_combine_with_rules_and_exclude():
    plan = picked((Rule("attention", rank=2), "all-linear"), exclude=(".*down.*", ".*/k_proj/.*"))
    assert {site.rank for path, site in plan.items() if "self_attn" in path} == {2}
    assert {site.rank for path, site in plan.items() if "mlp" in path} == {4}
    excluded = {"layers/mlp/down_proj/kernel", "layers/self_attn/k_proj/kernel"}
    assert set(plan) == (PROJECTIONS | FEED_FORWARD) - excluded
    assert set(picked("all-linear", exclude="attention")) == FEED_FORWARD


def test_a_function_picks_by_path_and_leaf():
    plan = picked(lambda path, leaf: path.endswith("kernel") and leaf.ndim == 3)
    assert set(plan) == PROJECTIONS | FEED_FORWARD
    assert hash(plan) == hash(picked("all-linear"))


def test_an_embedding_or_a_head_is_picked_by_name_alone():
    [embedding] = [path for path in lora.paths.named_leaves(DECODER) if "embed" in path]
    assert embedding not in picked("all-linear")
    assert embedding in picked(("all-linear", ".*embed.*"))


NAMED = {
    "attention": (
        "h/0/attn/output/kernel", "layers/0/wo/kernel", "encoder/0/self_attention/out/kernel",
        "blocks/1/att/output", "params/MultiHeadDotProductAttention_0/query/kernel",
        "layers/self_attn/q_proj/kernel", "layer/0/attention/output/dense/kernel",
    ),
    "mlp": (
        "h/0/mlp/wo/kernel", "block/0/DenseReluDense/wo", "ffn/key/kernel", "mlp/output/kernel",
        "mlp/shared/kernel", "layers/3/fc1/kernel", "layers/moe/experts/w1",
        "layer/0/intermediate/dense/kernel", "ff/net_0/proj/kernel",
    ),
    None: ("up/0/conv/kernel", "patch/kernel", "params/Dense_0/kernel", "pooler/dense/kernel"),
}  # fmt: skip


@pytest.mark.parametrize(("path", "kind"), [(p, k) for k, paths in NAMED.items() for p in paths])
def test_the_block_nearest_to_the_leaf_says_what_it_is(path, kind):
    assert kind_of(path) == kind


@pytest.mark.parametrize("path", [
    "lm_head/kernel", "cls/predictions/decoder/kernel", "LMHead/kernel", "heads_0/kernel",
    "logits_dense/kernel", "output_projection/kernel", "score/weight", "embed/embedding",
])  # fmt: skip
def test_heads_are_in_no_preset(path):
    params = {path: jax.ShapeDtypeStruct((4, 4), jnp.float32)}
    for preset in ("all-linear", "attention", "mlp", "square"):
        with pytest.raises(InputError, match="matches no leaf"):
            lora.plan_from_axes(params, LoraConfig(2, targets=preset), {".*": "in out"})


class Vit(nn.Module):
    """Patches, one attention block with kernels of three axes, one MLP, a head."""

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(16, (4, 4), strides=(4, 4), name="patch")(images).reshape(2, 4, 16)
        x = x + self.param("position", nn.initializers.zeros, (4, 16))
        x = x + nn.MultiHeadDotProductAttention(4, name="attention")(nn.LayerNorm()(x))
        x = x + nn.Dense(16, name="fc2")(nn.gelu(nn.Dense(32, name="fc1")(x)))
        return nn.Dense(5, name="head")(x.mean(1))


def test_presets_on_a_vision_transformer():
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    params = jax.eval_shape(Vit().init, jax.random.key(0), images)

    def pick(preset):
        return set(lora.plan(Vit().apply, params, images, config=LoraConfig(2, targets=preset)))

    attention = {f"params/attention/{x}/kernel" for x in ("query", "key", "value", "out")}
    mlp = {f"params/fc{i}/kernel" for i in (1, 2)}
    assert pick("attention") == attention
    assert pick("mlp") == mlp
    assert pick("all-linear") == attention | mlp | {"params/patch/kernel"}


class Block(nnx.Module):
    """An NNX layer whose modules have plain names."""

    def __init__(self, rngs):
        self.attn = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.ffn = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return self.ffn(self.norm(x + self.attn(x)))


def test_presets_on_nnx():
    graph, state = nnx.split(Block(nnx.Rngs(0)))
    x = jnp.ones((2, 3, 8))

    def model_fn(state, x):
        return nnx.merge(graph, state)(x)

    def pick(preset):
        return set(lora.plan(model_fn, state, x, config=LoraConfig(2, targets=preset)))

    assert pick("attention") == {f"attn/{x}/kernel" for x in ("query", "key", "value", "out")}
    assert pick("mlp") == {"ffn/kernel"}
    assert pick("all-linear") == pick("attention") | pick("mlp")


def test_presets_from_declared_axes():
    params = {"attn": {"q": jnp.ones((4, 4))}, "head": jnp.ones((4, 9)), "bias": jnp.ones(9)}
    axes = {"attn/q|head": "in out"}
    plan = lora.plan_from_axes(params, LoraConfig(2, targets="all-linear"), axes)
    assert set(plan) == {"attn/q"}


def test_a_preset_that_picks_nothing_says_what_there_is():
    with pytest.raises(InputError) as error:
        lora.plan(lambda p, x: x @ p["a"], {"a": jnp.ones((4, 4))}, jnp.ones(4),
                  config=LoraConfig(2, targets="mlp"))  # fmt: skip
    assert "target 'mlp' matches no leaf (contracted with an activation: a; give a pattern)" in str(
        error.value
    )


def test_a_function_that_picks_nothing_is_named():
    def nothing(path, leaf):
        return False

    with pytest.raises(InputError, match=r"target nothing\(\) matches no leaf"):
        picked(nothing)
