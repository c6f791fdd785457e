"""One decoder-only transformer, configured: Llama, Qwen, Gemma, GPT-2, OPT, Phi and relatives.

The parameters are a plain dict; the leaves under ``layers`` are stacked, one row per block::

    embed_tokens/embedding                                    (vocab, hidden)
    layers/{input_layernorm,post_attention_layernorm}/scale   (layers, hidden)
    layers/self_attn/{q_proj,k_proj,v_proj,o_proj}/kernel     (layers, in, out)
    layers/mlp/{gate_proj,up_proj,down_proj}/kernel           (layers, in, out)
    norm/scale                                                (hidden,)
    lm_head/kernel                                            (hidden, vocab), untied only

and, where the config says so::

    embed_positions/embedding                                 (offset + positions, hidden)
    layers/{pre,post}_feedforward_layernorm/scale             (layers, hidden)
    layers/self_attn/{q_norm,k_norm}/scale                    (layers, head_dim)
    layers/self_attn/qkv_proj/kernel                          (layers, in, q + k + v)
    layers/mlp/gate_up_proj/kernel                            (layers, in, gate + up)
    layers/mlp/gate/kernel                                    (layers, hidden, experts)
    layers/mlp/experts/gate_up_proj                           (layers, experts, in, gate + up)
    layers/mlp/experts/down_proj                              (layers, experts, in, out)
    layers/mlp/shared_expert/{gate,up,down}_proj/kernel       (layers, in, out)

A projection with a bias has a ``bias`` (layers, out) beside its kernel, a norm with one beside
its scale.
"""

import functools
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array, lax

from lora_jax.models.attention import (
    Angles,
    AttentionContext,
    KVCache,
    LayerChoice,
    attend,
    attention_context,
    capped,
    init_cache,
    of_layer,
    rotate,
    write,
)
from lora_jax.models.config import DecoderConfig
from lora_jax.models.experts import RoutedMLP
from lora_jax.paths import named_leaves

__all__ = [
    "Decoder",
    "DecoderConfig",
    "KVCache",
    "init_cache",
    "init_params",
    "leaf_shapes",
    "param_shapes",
]

_normal = nn.initializers.normal(0.02)
_float32_dot = partial(lax.dot_general, preferred_element_type=jnp.float32)

LayerCache = tuple[Array, Array] | None

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": nn.silu,
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_tanh": partial(nn.gelu, approximate=True),
    "relu": nn.relu,
}


class _NormNames(NamedTuple):
    before_attention: str
    after_attention: str | None
    before_mlp: str
    after_mlp: str | None


NORMS = {
    False: _NormNames("input_layernorm", None, "post_attention_layernorm", None),
    True: _NormNames(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}
"""Names of a block's norms, without and with those after attention and MLP: Hugging Face's."""


class Norm(nn.Module):
    """Features normed in float32, over the last axis, as `NormForm` says.

    ``rms``: x / √(mean(x²) + ε), cast to the compute dtype, then times the scale.
    ``rms_plus_one``: the same times 1 + scale, cast at the end. ``layer``: mean taken off
    first, then times the scale, plus a bias, cast at the end.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, hidden: Array) -> Array:
        form, dtype = self.config.norm, self.config.dtype
        start = nn.initializers.zeros if form.kind == "rms_plus_one" else nn.initializers.ones
        scale = self.param("scale", start, hidden.shape[-1:])
        wide = hidden.astype(jnp.float32)
        if form.kind == "layer":
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        normed = wide * lax.rsqrt(mean_square + form.eps)
        if form.kind == "rms":
            return normed.astype(dtype) * scale.astype(dtype)
        if form.kind == "rms_plus_one":
            return (normed * (1.0 + scale.astype(jnp.float32))).astype(dtype)
        bias = self.param("bias", nn.initializers.zeros, hidden.shape[-1:])
        return (normed * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(dtype)


class Attention(nn.Module):
    """Causal grouped-query attention."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, hidden: Array, cache: LayerCache, context: AttentionContext
    ) -> tuple[Array, LayerCache]:
        config, form = self.config, self.config.attention
        query, keys, values = _query_keys_values(config, hidden)
        if config.norm.heads:
            query, keys = Norm(config, name="q_norm")(query), Norm(config, name="k_norm")(keys)
        turn = partial(_turned, interleaved=config.rope_interleaved)
        late = context.slot_angles is not None
        query, keys = turn(query, context.angles), turn(keys, None if late else context.angles)
        if cache is not None:
            keys, values = cache = (
                write(cache[0], keys, context.starts),
                write(cache[1], values, context.starts),
            )
        mixed = attend(
            query,
            turn(keys, context.slot_angles),
            values,
            context.bias,
            query_scalar=form.query_scalar,
            softcap=form.softcap,
        )
        out_bias = form.bias if form.out_bias is None else form.out_bias
        return _linear(config, "o_proj", config.hidden_size, out_bias)(mixed), cache


class MLP(nn.Module):
    """down(activation(gate(x)) · up(x)), or down(activation(up(x))), as `MLPForm` says.

    Source of the gate: Shazeer, GLU variants, https://arxiv.org/abs/2002.05202.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, hidden: Array) -> Array:
        config, form = self.config, self.config.mlp
        activation = ACTIVATIONS[form.activation]

        def wide(name: str, times: int = 1) -> Array:
            return _linear(config, name, times * config.intermediate_size, form.bias)(hidden)

        match form.kind:
            case "gated":
                inner = activation(wide("gate_proj")) * wide("up_proj")
            case "fused":
                gate, up = jnp.split(wide("gate_up_proj", 2), 2, axis=-1)
                inner = activation(gate) * up
            case _:
                inner = activation(wide("up_proj"))
        return _linear(config, "down_proj", config.hidden_size, form.bias)(inner)


class Block(nn.Module):
    """Attention and MLP, each normed before and added to the residual stream after."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, hidden: Array, cache: LayerCache, choice: LayerChoice, context: AttentionContext
    ) -> tuple[Array, LayerCache]:
        config, names = self.config, NORMS[self.config.norm.after]
        normed = Norm(config, name=names.before_attention)(hidden)
        context = of_layer(context, choice)
        attended, cache = Attention(config, name="self_attn")(normed, cache, context)
        hidden = hidden + _normed_after(config, names.after_attention, attended)
        normed = Norm(config, name=names.before_mlp)(hidden)
        fed = _feed_forward(config)(normed)
        hidden = hidden + _normed_after(config, names.after_mlp, fed)
        self.sow("intermediates", "hidden", hidden, init_fn=lambda: None, reduce_fn=_latest)
        return hidden, cache


class Decoder(nn.Module):
    """Tokens to next-token logits.

    >>> from lora_jax.models.presets import TINY
    >>> params = init_params(jax.random.key(0), TINY)
    >>> logits, _ = jax.jit(Decoder(TINY).apply)({"params": params}, jnp.array([[72, 105]]))
    >>> logits.shape, logits.dtype
    ((1, 2, 320), dtype('float32'))

    Per-layer outputs, (layers, batch, time, hidden), come with ``mutable=["intermediates"]``
    at ``intermediates/layers/hidden``; where tokens went in a mixture of experts, an
    `lora_jax.models.experts.Routing` of (layers, batch, time, ...), with ``mutable=["routing"]``
    at ``routing/layers/mlp/router``.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        cache: KVCache | None = None,
        logits_at: Array | None = None,
    ) -> tuple[Array, KVCache | None]:
        """Logits, and the cache with these tokens added to it.

        Args:
            tokens: int32 (batch, time). An id outside the vocabulary makes its row NaN.
            positions: int32 (batch, time), for the rotary embedding or the table of learned
                positions, beyond whose end a row becomes NaN. By default they count from 0,
                or from the cache's length. Attention looks back in the order of the row (or
                of the cache's slots), whatever the positions.
            segment_ids: int32 (batch, time) for packed rows: a token sees only its own segment.
                Padding is a segment too, 0 by convention.
            cache: what came before, from `init_cache` or an earlier call; None for training.
            logits_at: int32 (n,), indices into the flattened (batch * time) tokens: the head is
                computed there only.

        Returns:
            Logits, float32 (batch, time, vocab), or (n, vocab) with `logits_at`; and the new
            cache, None where none was given.

        Raises:
            InputError: more tokens than the cache has slots, or segments with a cache.
        """
        config = self.config
        embed = _embedding(config, config.vocab_size, "embed_tokens")
        starts = jnp.zeros(tokens.shape[:1], jnp.int32)
        if cache is not None:
            starts = jnp.broadcast_to(cache.length, tokens.shape[:1])
        if positions is None:
            positions = starts[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        context, choice = attention_context(config, positions, starts, segment_ids, cache)
        layer_caches = None if cache is None else (cache.keys, cache.values)
        hidden = _positioned(config, embed(tokens), positions)
        hidden, layer_caches = _layers(config)(hidden, layer_caches, choice, context)
        if logits_at is not None:
            hidden = jnp.take(hidden.reshape(-1, config.hidden_size), logits_at, axis=0)
        logits = _head(config, embed)(Norm(config, name="norm")(hidden))
        if config.logit_softcap is not None:
            logits = capped(logits, config.logit_softcap)
        if cache is None:
            return logits, None
        keys, values = layer_caches
        return logits, KVCache(keys, values, cache.length + tokens.shape[1])


def _feed_forward(config: DecoderConfig) -> nn.Module:
    if config.experts is None:
        return MLP(config, name="mlp")
    activation = ACTIVATIONS[config.mlp.activation]
    return RoutedMLP(config.experts, activation, config.dtype, config.expert_products, name="mlp")


def _linear(config: DecoderConfig, name: str, features: int, use_bias: bool) -> nn.Dense:
    return nn.Dense(features, use_bias=use_bias, dtype=config.dtype, kernel_init=_normal, name=name)


def _query_keys_values(config: DecoderConfig, hidden: Array) -> list[Array]:
    """Each (batch, time, heads, head_dim)."""
    form = config.attention
    counts = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    widths = [count * config.head_dim for count in counts]
    if form.fused:
        fused = _linear(config, "qkv_proj", sum(widths), form.bias)(hidden)
        flat = jnp.split(fused, np.cumsum(widths)[:-1], axis=-1)
    else:
        names = ("q_proj", "k_proj", "v_proj")
        flat = [
            _linear(config, name, width, form.bias)(hidden)
            for name, width in zip(names, widths, strict=True)
        ]
    shape = (*hidden.shape[:2], -1, config.head_dim)
    return [each.reshape(shape) for each in flat]


def _turned(x: Array, angles: Angles | None, *, interleaved: bool) -> Array:
    return x if angles is None else rotate(x, angles, interleaved=interleaved)


def _normed_after(config: DecoderConfig, name: str | None, hidden: Array) -> Array:
    return hidden if name is None else Norm(config, name=name)(hidden)


def _positioned(config: DecoderConfig, embedded: Array, positions: Array) -> Array:
    """Embeddings scaled, and with learned positions, where the config asks for them."""
    if config.scale_embeddings:
        embedded = embedded * jnp.asarray(config.hidden_size**0.5, embedded.dtype)
    if config.position_offset is None:
        return embedded
    rows = config.max_positions + config.position_offset
    table = _embedding(config, rows, "embed_positions")
    return embedded + table(positions + config.position_offset)


def _embedding(config: DecoderConfig, rows: int, name: str) -> nn.Embed:
    return nn.Embed(rows, config.hidden_size, dtype=config.dtype, embedding_init=_normal, name=name)


def _latest(_, new: Array) -> Array:
    return new


def _layers(config: DecoderConfig) -> Callable[..., tuple[Array, Any]]:
    block = nn.remat(Block, prevent_cse=False) if config.remat else Block
    scanned = nn.scan(
        block,
        variable_axes={"params": 0, "intermediates": 0, "routing": 0},
        split_rngs={"params": True},
        in_axes=cast(Any, (0, 0, nn.broadcast)),
        length=config.num_layers,
        unroll=config.scan_unroll,
    )
    return scanned(config, name="layers")


def _head(config: DecoderConfig, embed: nn.Embed) -> Callable[[Array], Array]:
    if config.tie_embeddings:
        return partial(_tied_logits, embedding=embed.embedding)
    return nn.Dense(
        config.vocab_size,
        use_bias=False,
        dtype=config.dtype,
        kernel_init=_normal,
        dot_general=_float32_dot,
        name="lm_head",
    )


def _tied_logits(hidden: Array, embedding: Array) -> Array:
    over_features = (((hidden.ndim - 1,), (1,)), ((), ()))
    return _float32_dot(hidden, embedding.astype(hidden.dtype), over_features)


@partial(jax.jit, static_argnames="config")
def init_params(key: Array, config: DecoderConfig) -> dict:
    """Random float32 parameters: normal with deviation 0.02, zero biases, unit scales."""
    return dict(Decoder(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"])


def param_shapes(config: DecoderConfig) -> dict:
    """The parameter tree as `jax.ShapeDtypeStruct` leaves: what a checkpoint has to hold.

    >>> from lora_jax.models.presets import TINY
    >>> param_shapes(TINY)["layers"]["self_attn"]["k_proj"]["kernel"].shape
    (2, 64, 32)
    """
    return jax.eval_shape(partial(init_params, config=config), jax.random.key(0))


@functools.cache
def leaf_shapes(config: DecoderConfig) -> Mapping[str, tuple[int, ...]]:
    """The shape of every leaf by its path.

    >>> from lora_jax.models.presets import TINY
    >>> leaf_shapes(TINY)["layers/self_attn/k_proj/kernel"]
    (2, 64, 32)
    """
    leaves = named_leaves(param_shapes(config))
    return MappingProxyType({path: leaf.shape for path, leaf in leaves.items()})
