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
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from lora_jax.models.attention import KVCache, attention_context, capped, init_cache
from lora_jax.models.blocks import Block, Norm, normal
from lora_jax.models.config import DecoderConfig
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

_float32_dot = partial(lax.dot_general, preferred_element_type=jnp.float32)


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
    return nn.Embed(rows, config.hidden_size, dtype=config.dtype, embedding_init=normal, name=name)


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
        kernel_init=normal,
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
