"""The encoder's invariances: padding, positions, dropout, dtypes, adapters."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import lora_jax as lora
from lora_jax.errors import InputError
from lora_jax.models.encoder import Encoder, EncoderConfig, init_encoder, token_positions

BERT = EncoderConfig(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    max_positions=24,
    head="pooled",
    labels=("no", "yes", "perhaps"),
)
ROBERTA = replace(BERT, padding_id=1, positions_skip_padding=True, pooler=False, head="dense")
TOKENS = np.random.default_rng(0).integers(3, 40, (3, 8)).astype(np.int32)


@partial(jax.jit, static_argnums=0)
def run(config, params, tokens, mask=None, key=None):
    rngs = None if key is None else {"dropout": key}
    return Encoder(config).apply({"params": params}, tokens, mask, rngs=rngs)


def logits(config, params, tokens, mask, key):
    rngs = {"dropout": key}
    return Encoder(config).apply({"params": params}, tokens, mask, rngs=rngs).logits


def key_of(seed):
    """A key whose bits take little to compile."""
    return jax.random.key(seed, impl="unsafe_rbg")


def params_of(config):
    """Weights large enough that every leaf shows in the output."""
    generator = np.random.default_rng(0)
    shapes = jax.eval_shape(partial(init_encoder, config=config), jax.random.key(0))
    return jax.tree.map(lambda leaf: generator.normal(0.1, 0.3, leaf.shape).astype("f4"), shapes)


@pytest.mark.parametrize("config", [BERT, ROBERTA], ids=["bert", "roberta"])
def test_padding_changes_no_row(config):
    params = params_of(config)
    padded = np.pad(TOKENS, ((0, 0), (0, 4)), constant_values=config.padding_id)
    mask = np.arange(12) < 8
    expected = run(config, params, TOKENS)
    ours = run(config, params, padded, np.broadcast_to(mask, padded.shape))
    np.testing.assert_allclose(ours.logits, expected.logits, atol=1e-6)
    np.testing.assert_allclose(ours.hidden[:, :8], expected.hidden, atol=1e-5)
    unmasked = run(config, params, padded, np.ones_like(padded, bool))
    assert np.abs(unmasked.logits - expected.logits).max() > 1e-3


def test_positions_of_padding():
    tokens = jnp.array([[1, 5, 6, 1, 7, 1]])
    assert token_positions(ROBERTA, tokens).tolist() == [[1, 2, 3, 1, 4, 1]]
    assert token_positions(BERT, tokens).tolist() == [[0, 1, 2, 3, 4, 5]]


def test_rows_beyond_the_table_of_positions_are_refused():
    for config, longest in ((BERT, 24), (ROBERTA, 22)):
        assert token_positions(config, jnp.ones((1, longest), jnp.int32)).max() < 24
        with pytest.raises(InputError, match=f"positions for {longest}"):
            token_positions(config, jnp.ones((1, longest + 1), jnp.int32))


def test_dropout_follows_its_key():
    config = replace(BERT, hidden_dropout=0.2, attention_dropout=0.2, classifier_dropout=0.2)
    params = params_of(config)
    still = run(BERT, params, TOKENS).logits
    np.testing.assert_array_equal(run(config, params, TOKENS).logits, still)
    first, again, other = (run(config, params, TOKENS, None, key_of(n)).logits for n in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    assert np.abs(first - still).max() > 1e-3


DROPS = {
    "hidden_dropout": {"embeddings", "layers/attention/output", "layers/mlp/output"},
    "attention_dropout": {"layers/attention/self"},
    "classifier_dropout": {""},
}


@pytest.mark.parametrize(("share", "places"), DROPS.items(), ids=DROPS.keys())
def test_each_share_drops_where_it_should(share, places):
    found = set()

    def record(call, args, kwargs, context):
        module = context.module
        if isinstance(module, nn.Dropout) and module.rate and not module.deterministic:
            found.add("/".join(module.path[:-1]))
        return call(*args, **kwargs)

    config = replace(BERT, **{share: 0.5})
    shapes = jax.eval_shape(partial(init_encoder, config=config), jax.random.key(0))
    with nn.intercept_methods(record):
        jax.eval_shape(partial(logits, config), shapes, TOKENS, np.ones_like(TOKENS), key_of(0))
    assert found == places


def test_compute_in_bfloat16_keeps_float32_logits_and_parameters():
    config = replace(BERT, dtype="bfloat16", remat=True)
    params = params_of(config)
    output = run(config, params, TOKENS)
    assert output.hidden.dtype == jnp.bfloat16
    assert output.logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    close_to = run(BERT, params, TOKENS).logits
    np.testing.assert_allclose(output.logits, close_to, atol=0.15)


def planned(config):
    config = replace(config, attention_dropout=0.1, hidden_dropout=0.1)
    function, params = partial(logits, config), params_of(config)
    batch = (TOKENS, np.ones_like(TOKENS), key_of(3))
    settings = lora.LoraConfig(rank=2, alpha=4, targets=(".*kernel", ".*/embedding"))
    plan = lora.plan(function, params, *batch, config=settings, strict=True)
    return function, params, batch, plan


@pytest.mark.parametrize("config", [BERT, ROBERTA], ids=["bert", "roberta"])
def test_every_linear_and_table_has_a_low_rank_form(config):
    _, _, _, plan = planned(config)
    roles = {path: site.roles for path, site in plan.items()}
    assert roles["layers/attention/self/query/kernel"] == ("stack", "in", "out")
    assert {r for path, r in roles.items() if path.startswith("layers")} == {("stack", "in", "out")}
    assert len(plan) == 6 + 3 + 2  # linears of a block, tables, pooler and head


def test_an_adapter_computes_what_it_merges_to():
    function, params, batch, plan = planned(BERT)
    adapter = jax.tree.map(lambda leaf: leaf + 0.05, lora.init(jax.random.key(1), params, plan))
    adapted = jax.jit(lora.adapt(function, plan))(params, adapter, *batch)
    plain = jax.jit(function)
    merged = plain(lora.merge(params, adapter, plan), *batch)
    np.testing.assert_allclose(adapted, merged, atol=2e-5)
    assert np.abs(adapted - plain(params, *batch)).max() > 1e-3


def test_presets_pick_their_parts_and_no_head():
    function = partial(logits, ROBERTA)
    params = jax.eval_shape(lambda: init_encoder(jax.random.key(0), ROBERTA))
    batch = (TOKENS, np.ones_like(TOKENS), key_of(3))

    def picked(preset):
        config = lora.LoraConfig(rank=2, alpha=4, targets=preset)
        return set(lora.plan(function, params, *batch, config=config))

    attention = {f"layers/attention/self/{name}/kernel" for name in ("query", "key", "value")}
    attention |= {"layers/attention/output/dense/kernel"}
    mlp = {f"layers/mlp/{name}/dense/kernel" for name in ("intermediate", "output")}
    assert picked("attention") == attention
    assert picked("mlp") == mlp
    assert picked("all-linear") == attention | mlp


IMPOSSIBLE = {
    "hidden_size": (30, "hidden_size=30 is not a multiple of num_heads=4"),
    "activation": ("tanh", "activation='tanh' is none of"),
    "head": ("other", "head='other' is none of"),
    "labels": ((), "head='pooled' has no labels"),
    "pooler": (False, "head='pooled' needs pooler=True"),
    "padding_id": (40, "padding_id=40 is not in the vocabulary of 40"),
    "hidden_dropout": (1.0, r"hidden_dropout=1.0 is not in \[0, 1\)"),
    "num_layers": (0, "num_layers=0 is below 1"),
}


@pytest.mark.parametrize(("field", "fault"), IMPOSSIBLE.items(), ids=IMPOSSIBLE.keys())
def test_impossible_values_are_named(field, fault):
    with pytest.raises(InputError, match=fault[1]):
        replace(BERT, **{field: fault[0]})
