"""The decoder against transformers' Llama, and its own invariances."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lora_jax.errors import InputError
from lora_jax.models.attention import Angles, rotate
from lora_jax.models.decoder import Decoder, DecoderConfig, init_cache, init_params, param_shapes
from lora_jax.models.forms import AttentionForm, LayerKind, MLPForm, NormForm, Rope
from lora_jax.models.presets import TINY
from lora_jax.models.rope import frequencies

SMALL = DecoderConfig(
    vocab_size=96,
    hidden_size=48,
    intermediate_size=80,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    max_positions=128,
)
VARIANTS = {
    "tied": {},
    "untied": {"tie_embeddings": False},
    "attention_bias": {"attention": AttentionForm(bias=True)},
    "mlp_bias": {"mlp": MLPForm(bias=True)},
    "one_kv_head": {"num_kv_heads": 1},
    "one_kv_head_per_head": {"num_kv_heads": 6},
    "wide_heads": {"head_dim": 20},
    "one_head": {"num_heads": 1, "num_kv_heads": 1, "head_dim": 16},
    "long_waves": {"layer_kinds": (LayerKind(Rope(1e6)),), "norm": NormForm(eps=1e-2)},
    "everything": {
        "tie_embeddings": False,
        "attention": AttentionForm(bias=True),
        "mlp": MLPForm(bias=True),
        "head_dim": 12,
        "layer_kinds": (LayerKind(Rope(500.0)),),
        "num_layers": 2,
    },
}
variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())


BATCH, TIME = 3, 20  # one shape throughout, so that few programs are compiled


def tokens_of(config, time=TIME, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, config.vocab_size, (BATCH, time), dtype=np.int32)


def padded(rows):
    """Rows of unequal length with zeros to the right, where causal attention never looks."""
    return np.stack([np.pad(row, (0, TIME - len(row))) for row in rows])


@functools.partial(jax.jit, static_argnums=0)
def run(config, params, tokens, positions=None, segments=None, cache=None, at=None):
    """Logits, new cache, and the output of every layer."""
    (logits, cache), sown = Decoder(config).apply(
        {"params": params}, tokens, positions, segments, cache, at, mutable=["intermediates"]
    )
    return logits, cache, sown["intermediates"]["layers"]["hidden"]


def logits_of(*args, **kwargs):
    return run(*args, **kwargs)[0]


def close(actual, expected, atol):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def close_in_scale(actual, expected, rtol):
    """Equal to `rtol` of the largest entry."""
    scale = np.abs(expected).max()
    close(np.asarray(actual) / scale, np.asarray(expected) / scale, rtol)


def differs(actual, expected, by):
    assert np.abs(np.asarray(actual) - np.asarray(expected)).max() > by


def torch_layers_and_logits(model, tokens):
    outputs = []
    hooks = [
        layer.register_forward_hook(lambda *call: outputs.append(call[-1]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens).long()).logits.numpy()
    for hook in hooks:
        hook.remove()
    return np.stack([output.numpy() for output in outputs]), logits


@variants
def test_layers_and_logits_equal_transformers(llama, changes):
    config = dataclasses.replace(SMALL, **changes)
    reference = llama(config)
    tokens = tokens_of(config)
    hidden, expected = torch_layers_and_logits(reference.torch_model, tokens)
    logits, _, ours = run(config, reference.params, tokens)
    close(ours, hidden, 1.5e-5)
    close(logits, expected, 1.5e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"layer_kinds": (LayerKind(Rope(9_000.0)),)},
        {"rope_interleaved": True},
        {"norm": NormForm(eps=1e-3)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_wrong_config_is_seen(llama, change):
    reference = llama(SMALL)
    tokens = tokens_of(SMALL)
    _, expected = torch_layers_and_logits(reference.torch_model, tokens)
    wrong = dataclasses.replace(SMALL, **change)
    differs(logits_of(wrong, reference.params, tokens), expected, by=1e-3)


@variants
def test_expected_shapes_are_those_of_transformers(llama, changes):
    config = dataclasses.replace(SMALL, **changes)
    shapes = jax.tree.map(lambda leaf: leaf.shape, param_shapes(config))
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, llama(config).params)


def test_gradients_equal_transformers(llama):
    config = dataclasses.replace(SMALL, attention=AttentionForm(bias=True), mlp=MLPForm(bias=True))
    reference = llama(config)
    tokens, weights = tokens_of(config), np.random.default_rng(1).normal(size=(BATCH, TIME, 96))
    weights = weights.astype(np.float32)

    def loss(params):
        return jnp.sum(jax.nn.log_softmax(logits_of(config, params, tokens)) * weights)

    torch_logits = reference.torch_model(torch.from_numpy(tokens).long()).logits
    (torch_logits.log_softmax(-1) * torch.from_numpy(weights)).sum().backward()
    # Sums that nearly cancel are more exact in the vectors of optimised code.
    optimised = {"xla_backend_optimization_level": 3}
    gradients = jax.jit(jax.grad(loss), compiler_options=optimised)(reference.params)
    blocks = reference.torch_model.model.layers
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        ours = gradients["layers"]["self_attn"][name]
        for layer, theirs in enumerate(block.self_attn.get_submodule(name) for block in blocks):
            close_in_scale(ours["kernel"][layer], theirs.weight.grad.numpy().T, 5e-6)
            close_in_scale(ours["bias"][layer], theirs.bias.grad.numpy(), 5e-6)
    embedding = reference.torch_model.model.embed_tokens.weight.grad.numpy()
    close_in_scale(gradients["embed_tokens"]["embedding"], embedding, 5e-6)


def test_interleaved_rotation_is_a_complex_product():
    x = np.random.default_rng(0).normal(size=(2, 9, 3, 8)).astype(np.float32)
    positions = np.arange(18).reshape(2, 9)
    turns = positions[..., None, None] * frequencies(SMALL, Rope(100.0)).per_feature
    turned = rotate(x, Angles(jnp.cos(turns), jnp.sin(turns)), interleaved=True)
    angles = positions[..., None, None] * 100.0 ** (-np.arange(4) / 4)
    expected = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)
    close(turned[..., 0::2], expected.real, 1e-6)
    close(turned[..., 1::2], expected.imag, 1e-6)


def test_interleaved_equals_half_rotated_after_permuting_query_and_key(llama):
    halves = dataclasses.replace(SMALL, attention=AttentionForm(bias=True))
    interleaved = dataclasses.replace(halves, rope_interleaved=True)
    params = llama(halves).params
    order = np.arange(halves.head_dim).reshape(2, -1).T.ravel()  # 0, h/2, 1, h/2 + 1, ...

    def permuted(leaf):
        per_head = leaf.reshape(*leaf.shape[:-1], -1, halves.head_dim)
        return per_head[..., order].reshape(leaf.shape)

    attention = params["layers"]["self_attn"]
    moved = {name: jax.tree.map(permuted, attention[name]) for name in ("q_proj", "k_proj")}
    renamed = params | {"layers": params["layers"] | {"self_attn": attention | moved}}
    tokens = tokens_of(halves)
    expected = logits_of(halves, params, tokens)
    close(logits_of(interleaved, renamed, tokens), expected, 5e-6)
    differs(logits_of(interleaved, params, tokens), expected, by=0.1)


@pytest.mark.parametrize("chunks", [(20,), (1,) * 20, (8, 4, 8)], ids=str)
def test_cached_decoding_equals_the_full_pass(llama, chunks):
    params = llama(SMALL).params
    tokens = tokens_of(SMALL)
    cache = init_cache(SMALL, BATCH, max_length=27)
    pieces = []
    for part in np.split(tokens, np.cumsum(chunks)[:-1], axis=1):
        logits, cache, _ = run(SMALL, params, part, cache=cache)
        pieces.append(logits)
    close(np.concatenate(pieces, 1), logits_of(SMALL, params, tokens), 5e-6)
    assert cache.length.tolist() == [20, 20, 20]


def test_a_cache_with_unequal_rows_is_rewound_and_overwritten(llama):
    params = llama(SMALL).params
    tokens, following = tokens_of(SMALL), tokens_of(SMALL, time=4, seed=1)
    lengths = np.array([4, 9, 16], np.int32)
    _, cache, _ = run(SMALL, params, tokens, cache=init_cache(SMALL, BATCH, 27))
    rewound = cache._replace(length=lengths)
    logits, cache, _ = run(SMALL, params, following, cache=rewound)
    assert cache.length.tolist() == [8, 13, 20]
    rows = [np.concatenate([tokens[i, :n], following[i]]) for i, n in enumerate(lengths)]
    whole = logits_of(SMALL, params, padded(rows))
    for row, length in enumerate(lengths):
        close(logits[row], whole[row, length : length + 4], 5e-6)


def test_a_scalar_cache_length_serves_all_rows(llama):
    params, tokens = llama(SMALL).params, tokens_of(SMALL)
    cache = init_cache(SMALL, BATCH, 27)._replace(length=jnp.int32(0))
    logits, cache, _ = run(SMALL, params, tokens, cache=cache)
    close(logits, logits_of(SMALL, params, tokens), 5e-6)
    assert cache.length.shape == ()


class Packed(NamedTuple):
    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray


LENGTHS = (5, 9, 3)


@pytest.fixture(scope="module")
def packed():
    """A row of three segments and three tokens of padding; a row of padding; a full row."""
    runs = (*LENGTHS, TIME - sum(LENGTHS))
    segments = np.zeros((BATCH, TIME), np.int32)
    segments[0] = np.repeat([1, 2, 3, 0], runs)
    segments[2] = 7
    positions = np.tile(np.arange(TIME), (BATCH, 1))
    positions[0] = np.concatenate([np.arange(length) for length in runs])
    return Packed(tokens_of(SMALL), positions, segments)


@pytest.mark.parametrize("restart", [True, False], ids=["own_positions", "row_positions"])
def test_packed_segments_equal_separate_rows(llama, packed, restart):
    params = llama(SMALL).params
    positions = packed.positions if restart else None
    together = logits_of(SMALL, params, packed.tokens, positions, packed.segments)
    ends = np.cumsum(LENGTHS)
    spans = [slice(end - length, end) for end, length in zip(ends, LENGTHS, strict=True)]
    separate = logits_of(SMALL, params, padded([packed.tokens[0, span] for span in spans]))
    for row, span in enumerate(spans):
        close(together[0, span], separate[row, : LENGTHS[row]], 5e-6)
    unsegmented = logits_of(SMALL, params, packed.tokens)
    close(together[2], unsegmented[2], 5e-6)
    differs(together[0, spans[1]], unsegmented[0, spans[1]], by=0.1)


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.value_and_grad, argnums=1)
def masked_loss(config, params, packed):
    logits = logits_of(config, params, *packed)
    return jnp.mean(jax.nn.log_softmax(logits)[..., 0] * (packed.segments > 0))


def test_padding_makes_no_nan_in_values_or_gradients(llama, packed):
    value, gradients = masked_loss(SMALL, llama(SMALL).params, packed)
    assert np.isfinite(value)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path


@pytest.mark.parametrize("changes", [{"remat": True}, {"scan_unroll": 2}], ids=str)
def test_remat_and_unroll_change_no_value(llama, packed, changes):
    params = llama(SMALL).params
    plain = masked_loss(SMALL, params, packed)
    changed = masked_loss(dataclasses.replace(SMALL, **changes), params, packed)
    jax.tree.map(functools.partial(close_in_scale, rtol=5e-6), changed, plain)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits_at_equals_indexing(llama, tied):
    config = dataclasses.replace(SMALL, tie_embeddings=tied)
    params, tokens = llama(config).params, tokens_of(config)
    at = np.array([59, 0, 13, 13], np.int32)
    whole = logits_of(config, params, tokens)
    close(logits_of(config, params, tokens, at=at), whole.reshape(BATCH * TIME, -1)[at], 1e-6)


def scans_of(config):
    """The scans in the traced decoder, and the text of the whole trace."""
    shapes, tokens = param_shapes(config), jax.ShapeDtypeStruct((1, 4), jnp.int32)

    def plain(params, tokens):
        return Decoder(config).apply({"params": params}, tokens)[0]

    jaxpr = jax.make_jaxpr(plain)(shapes, tokens)
    return [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"], str(jaxpr)


def test_remat_and_unroll_reach_the_scan():
    assert "prevent_cse" not in scans_of(SMALL)[1]
    (scan,), text = scans_of(dataclasses.replace(SMALL, remat=True, scan_unroll=3))
    assert "prevent_cse=False" in text
    assert scan.params["unroll"] == 3


def test_hidden_states_are_kept_only_when_asked_for():
    (scan,), _ = scans_of(SMALL)
    assert [out.aval.shape for out in scan.outvars] == [(1, 4, 48)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_compute_stays_near_float32(llama, dtype):
    params = llama(SMALL).params
    tokens = tokens_of(SMALL)
    expected = logits_of(SMALL, params, tokens)
    half = dataclasses.replace(SMALL, dtype=dtype)
    logits, _, hidden = run(half, params, tokens)
    assert logits.dtype == jnp.float32
    assert hidden.dtype == dtype
    error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 3e-2


def test_stored_dtype_is_free_of_compute_dtype(llama):
    params = llama(SMALL).params
    stored = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    widened = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), stored)
    tokens = tokens_of(SMALL)
    np.testing.assert_array_equal(
        logits_of(SMALL, stored, tokens), logits_of(SMALL, widened, tokens)
    )


def test_random_weights_have_llamas_deviation():
    config = dataclasses.replace(TINY, attention=AttentionForm(bias=True))
    params = init_params(jax.random.key(3), config)
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    assert float(jnp.std(kernel)) == pytest.approx(0.02, rel=0.05)
    assert not np.allclose(kernel[0], kernel[1])
    assert not np.any(params["layers"]["self_attn"]["o_proj"]["bias"])
    assert np.all(params["norm"]["scale"] == 1)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_heads": 5}, ["num_heads=5", "num_kv_heads=2"]),
        ({"head_dim": 7, "dtype": "int8"}, ["head_dim=7", "dtype='int8'", "bfloat16"]),
        ({"num_kv_heads": 0, "vocab_size": -1}, ["num_kv_heads=0", "vocab_size=-1"]),
        (
            {"layer_kinds": (LayerKind(Rope(0.0)),), "norm": NormForm(eps=-1.0)},
            ["theta=0.0", "norm.eps=-1.0"],
        ),
    ],
    ids=str,
)
def test_an_impossible_config_names_every_offender(changes, named):
    with pytest.raises(InputError) as raised:
        dataclasses.replace(SMALL, **changes)
    assert all(part in str(raised.value) for part in named)


def test_a_cache_takes_neither_too_many_tokens_nor_segments():
    params, tokens = param_shapes(TINY), np.zeros((1, 5), np.int32)
    with pytest.raises(InputError, match="5 tokens don't fit a cache of 4 slots"):
        run(TINY, params, tokens, cache=init_cache(TINY, 1, 4))
    with pytest.raises(InputError, match="segment_ids with a cache"):
        run(TINY, params, tokens, segments=tokens, cache=init_cache(TINY, 1, 8))
