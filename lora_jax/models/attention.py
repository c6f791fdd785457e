"""Attention without parameters: rotary embeddings, masks, the key-value cache, the products."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from lora_jax.errors import InputError
from lora_jax.models.config import DecoderConfig


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far, left-aligned in every row.

    Attributes:
        keys: (layers, batch, slots, kv_heads, head_dim), already rotated.
        values: (layers, batch, slots, kv_heads, head_dim).
        length: int32 () or (batch,), slots filled; the next token goes there. Lowering it
            rewinds: what lies beyond is never attended to and will be overwritten.
    """

    keys: Array
    values: Array
    length: Array


class AttentionContext(NamedTuple):
    """What all layers share: made once, outside the scan over layers."""

    cos: Array  # float32 (batch or 1, time, 1, head_dim / 2)
    sin: Array
    bias: Array  # float32 (batch or 1, 1, 1, time, slots), zero where attention may look
    starts: Array  # int32 (batch,), the slot of the first token; zeros without a cache


def init_cache(
    config: DecoderConfig, batch: int, max_length: int, dtype: jax.typing.DTypeLike | None = None
) -> KVCache:
    """An empty cache of `max_length` slots for each of `batch` rows.

    `dtype` is the compute dtype of `config` unless given.

    >>> from lora_jax.models.presets import TINY
    >>> init_cache(TINY, batch=3, max_length=40).keys.shape
    (2, 3, 40, 2, 16)
    """
    shape = (config.num_layers, batch, max_length, config.num_kv_heads, config.head_dim)
    dtype = dtype or config.dtype
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch, jnp.int32))


def attention_context(
    config: DecoderConfig,
    tokens: Array,
    positions: Array | None,
    segment_ids: Array | None,
    cache: KVCache | None,
) -> AttentionContext:
    """Rotary tables and mask for (batch, time) tokens; see `Decoder` for the arguments."""
    batch, time = tokens.shape
    order = jnp.arange(time, dtype=jnp.int32)
    if cache is None:
        starts = jnp.zeros(batch, jnp.int32)
        visible = _earlier_in_segment(order, segment_ids)
    else:
        _check_cache(cache, time, segment_ids)
        starts = jnp.broadcast_to(cache.length, (batch,))
        visible = _earlier_slots(starts[:, None] + order, cache.keys.shape[2])
    cos, sin = rotary_tables(config, starts[:, None] + order if positions is None else positions)
    return AttentionContext(cos, sin, _bias(visible), starts)


def _check_cache(cache: KVCache, time: int, segment_ids: Array | None) -> None:
    slots = cache.keys.shape[2]
    if time > slots:
        raise InputError(f"{time} tokens don't fit a cache of {slots} slots: make a longer cache")
    if segment_ids is not None:
        raise InputError("segment_ids with a cache: packed rows are for training, pass one of both")


def _earlier_in_segment(order: Array, segment_ids: Array | None) -> Array:
    earlier = (order[:, None] >= order)[None]
    if segment_ids is None:
        return earlier
    return earlier & (segment_ids[:, :, None] == segment_ids[:, None, :])


def _earlier_slots(own: Array, slots: int) -> Array:
    return own[:, :, None] >= jnp.arange(slots)


def _bias(visible: Array) -> Array:
    # Finite, so that a row is never all -inf, and added, so that the backward pass has no select.
    return jnp.where(visible, 0.0, jnp.finfo(jnp.float32).min)[:, None, None]


def rotary_tables(config: DecoderConfig, positions: Array) -> tuple[Array, Array]:
    """Cosine and sine of position / theta^(2i/h), float32 (batch, time, 1, head_dim / 2).

    Source: Su et al., RoFormer, https://arxiv.org/abs/2104.09864.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = (1.0 / np.power(np.float32(config.rope_theta), exponents)).astype(np.float32)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, context: AttentionContext, *, interleaved: bool) -> Array:
    """Rotate the pairs of the last axis of x, (batch, time, heads, head_dim), in float32."""
    half = x.shape[-1] // 2
    pairs, axis = {False: ((2, half), -2), True: ((half, 2), -1)}[interleaved]
    first, second = jnp.unstack(x.astype(jnp.float32).reshape(*x.shape[:-1], *pairs), axis=axis)
    rotated = (
        first * context.cos - second * context.sin,
        second * context.cos + first * context.sin,
    )
    return jnp.stack(rotated, axis=axis).reshape(x.shape).astype(x.dtype)


def write(slots: Array, new: Array, starts: Array) -> Array:
    """One layer's cache (batch, slots, ...) with `new` (batch, time, ...) put at `starts`."""
    put = jax.vmap(lax.dynamic_update_slice_in_dim, in_axes=(0, 0, 0, None))
    return put(slots, new.astype(slots.dtype), starts, 0)


def attend(
    query: Array,
    keys: Array,
    values: Array,
    bias: Array,
    *,
    dropout: Callable[[Array], Array] | None = None,
) -> Array:
    """softmax(q kᵀ / √head_dim + bias) v, softmax in float32.

    Query heads that share a key head are folded into the query's time axis, so that both
    products are plain matrix products over (batch, kv_head) and keys are never repeated.

    Args:
        query: (batch, time, heads, head_dim).
        keys, values: (batch, slots, kv_heads, head_dim).
        bias: float32, broadcastable to (batch, kv_heads, group, time, slots).
        dropout: applied to the weights that softmax gives.

    Returns:
        (batch, time, heads * head_dim) in the query's dtype.

    Source: Ainslie et al., GQA, https://arxiv.org/abs/2305.13245.
    """
    batch, time, heads, head_dim = query.shape
    slots, kv_heads = keys.shape[1:3]
    group = heads // kv_heads
    query, keys, values = (x.swapaxes(1, 2) for x in (query * head_dim**-0.5, keys, values))
    folded = query.reshape(batch, kv_heads, group * time, head_dim)
    scores = _batched(folded, keys.astype(query.dtype), contract=3, result=jnp.float32)
    weights = jax.nn.softmax(scores.reshape(batch, kv_heads, group, time, slots) + bias)
    weights = weights if dropout is None else dropout(weights)
    weights = weights.astype(query.dtype).reshape(scores.shape)
    mixed = _batched(weights, values.astype(query.dtype), contract=2, result=query.dtype)
    return mixed.reshape(batch, heads, time, head_dim).swapaxes(1, 2).reshape(batch, time, -1)


def _batched(left: Array, right: Array, *, contract: int, result: jax.typing.DTypeLike) -> Array:
    dimensions = (((3,), (contract,)), ((0, 1), (0, 1)))
    return lax.dot_general(left, right, dimensions, preferred_element_type=jnp.dtype(result))
