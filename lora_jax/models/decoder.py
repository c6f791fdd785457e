"""One decoder-only transformer, configured: the Llama family and its relatives.

The parameters are a plain dict; the leaves under ``layers`` are stacked, one row per block::

    embed_tokens/embedding                                    (vocab, hidden)
    layers/{input_layernorm,post_attention_layernorm}/scale   (layers, hidden)
    layers/self_attn/{q_proj,k_proj,v_proj,o_proj}/kernel     (layers, in, out)
    layers/mlp/{gate_proj,up_proj,down_proj}/kernel           (layers, in, out)
    norm/scale                                                (hidden,)
    lm_head/kernel                                            (hidden, vocab), untied only

A projection with a bias has a ``bias`` (layers, out) beside its kernel.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from lora_jax.models.attention import (
    AttentionContext,
    KVCache,
    attend,
    attention_context,
    init_cache,
    rotate,
    write,
)
from lora_jax.models.config import DecoderConfig

__all__ = ["Decoder", "DecoderConfig", "KVCache", "init_cache", "init_params", "param_shapes"]

_normal = nn.initializers.normal(0.02)
_float32_dot = partial(lax.dot_general, preferred_element_type=jnp.float32)

LayerCache = tuple[Array, Array] | None


class RMSNorm(nn.Module):
    """x / √(mean(x²) + ε) in float32, cast to the compute dtype, then times a scale."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, hidden: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, hidden.shape[-1:])
        wide = hidden.astype(jnp.float32)
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        normed = wide * lax.rsqrt(mean_square + self.config.rms_norm_eps)
        return normed.astype(self.config.dtype) * scale.astype(self.config.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, hidden: Array, cache: LayerCache, context: AttentionContext
    ) -> tuple[Array, LayerCache]:
        config = self.config

        def heads(name: str, count: int) -> Array:
            flat = _linear(config, name, count * config.head_dim, config.attention_bias)(hidden)
            return flat.reshape(*hidden.shape[:2], count, config.head_dim)

        turn = partial(rotate, context=context, interleaved=config.rope_interleaved)
        query = turn(heads("q_proj", config.num_heads))
        keys = turn(heads("k_proj", config.num_kv_heads))
        values = heads("v_proj", config.num_kv_heads)
        if cache is not None:
            keys, values = cache = (
                write(cache[0], keys, context.starts),
                write(cache[1], values, context.starts),
            )
        mixed = attend(query, keys, values, context.bias)
        return _linear(config, "o_proj", config.hidden_size, config.attention_bias)(mixed), cache


class GatedMLP(nn.Module):
    """down(silu(gate(x)) · up(x)): SwiGLU, https://arxiv.org/abs/2002.05202."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, hidden: Array) -> Array:
        config = self.config
        gate = _linear(config, "gate_proj", config.intermediate_size, config.mlp_bias)(hidden)
        up = _linear(config, "up_proj", config.intermediate_size, config.mlp_bias)(hidden)
        down = _linear(config, "down_proj", config.hidden_size, config.mlp_bias)
        return down(nn.silu(gate) * up)


class Block(nn.Module):
    """Attention and MLP, each normed before and added to the residual stream after."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, hidden: Array, cache: LayerCache, context: AttentionContext
    ) -> tuple[Array, LayerCache]:
        normed = RMSNorm(self.config, name="input_layernorm")(hidden)
        attended, cache = Attention(self.config, name="self_attn")(normed, cache, context)
        hidden = hidden + attended
        normed = RMSNorm(self.config, name="post_attention_layernorm")(hidden)
        hidden = hidden + GatedMLP(self.config, name="mlp")(normed)
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
    at ``intermediates/layers/hidden``.
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
            positions: int32 (batch, time), for the rotary embedding. By default they count
                from 0, or from the cache's length. Attention looks back in the order of the
                row (or of the cache's slots), whatever the positions.
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
        embed = nn.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=config.dtype,
            embedding_init=_normal,
            name="embed_tokens",
        )
        context = attention_context(config, tokens, positions, segment_ids, cache)
        layer_caches = None if cache is None else (cache.keys, cache.values)
        hidden, layer_caches = _layers(config)(embed(tokens), layer_caches, context)
        if logits_at is not None:
            hidden = jnp.take(hidden.reshape(-1, config.hidden_size), logits_at, axis=0)
        logits = _head(config, embed)(RMSNorm(config, name="norm")(hidden))
        if cache is None:
            return logits, None
        keys, values = layer_caches
        return logits, KVCache(keys, values, cache.length + tokens.shape[1])


def _linear(config: DecoderConfig, name: str, features: int, use_bias: bool) -> nn.Dense:
    return nn.Dense(features, use_bias=use_bias, dtype=config.dtype, kernel_init=_normal, name=name)


def _latest(_, new: Array) -> Array:
    return new


def _layers(config: DecoderConfig) -> Callable[..., tuple[Array, Any]]:
    block = nn.remat(Block, prevent_cse=False) if config.remat else Block
    scanned = nn.scan(
        block,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=cast(Any, (0, nn.broadcast)),
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
