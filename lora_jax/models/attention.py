"""Attention without parameters: rotary embeddings, masks, the key-value cache, the products."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from lora_jax.errors import InputError
from lora_jax.models.config import DecoderConfig, rotated_features
from lora_jax.models.forms import DynamicScaling, LongScaling, Rope
from lora_jax.models.rope import frequencies


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far, left-aligned in every row.

    Attributes:
        keys: (layers, batch, slots, kv_heads, head_dim), already rotated, unless rotations
            depend on the row's length (`LongScaling`).
        values: (layers, batch, slots, kv_heads, head_dim).
        length: int32 () or (batch,), slots filled; the next token goes there. Lowering it
            rewinds: what lies beyond is never attended to and will be overwritten.
    """

    keys: Array
    values: Array
    length: Array


class Angles(NamedTuple):
    """By how much each position is rotated: float32 (batch or 1, time, 1, pairs)."""

    cos: Array
    sin: Array


class AttentionContext(NamedTuple):
    """What all layers share: made once, outside the scan over layers.

    Where layers differ, angles and bias have an axis in front, along which `LayerChoice` picks.
    """

    angles: Angles | None  # None: no layer rotates
    slot_angles: Angles | None  # of every slot, where the cache holds keys not yet rotated
    bias: Array  # float32 (batch or 1, 1, 1, time, slots), zero where attention may look
    starts: Array  # int32 (batch,), the slot of the first token; zeros without a cache


class LayerChoice(NamedTuple):
    """Which angles and which bias are a layer's: int32 (layers,); None where all have the same."""

    rope: Array | None
    window: Array | None


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
    positions: Array,
    starts: Array,
    segment_ids: Array | None,
    cache: KVCache | None,
) -> tuple[AttentionContext, LayerChoice]:
    """Angles and masks of all layers, and which are whose.

    Args:
        config: of the decoder.
        positions: int32 (batch, time), as the rotations count them.
        starts: int32 (batch,), the slot of each row's first token.
        segment_ids: see `Decoder`.
        cache: see `Decoder`.
    """
    time = positions.shape[1]
    own, slots = jnp.arange(time, dtype=jnp.int32)[None], time
    if cache is not None:
        _check_cache(cache, time, segment_ids)
        own, slots = starts[:, None] + own, cache.keys.shape[2]
    _check_length(config, max(time, slots))
    ropes, which_rope = _distinct([kind.rope for kind in config.kind_of_layer])
    windows, which_window = _distinct([kind.window for kind in config.kind_of_layer])
    late = rotates_late(config)
    furthest = _furthest(positions, segment_ids) if late else positions
    angles = slot_angles = None
    if any(ropes):
        angles = _stacked([_angles(config, rope, positions, furthest) for rope in ropes])
        if cache is not None and late:
            every = jnp.arange(slots, dtype=jnp.int32)[None]
            slot_angles = _stacked([_angles(config, rope, every, furthest) for rope in ropes])
    bias = _stacked([_bias(_visible(own, slots, window, segment_ids)) for window in windows])
    context = AttentionContext(angles, slot_angles, bias, starts)
    return context, LayerChoice(which_rope, which_window)


def of_layer(context: AttentionContext, choice: LayerChoice) -> AttentionContext:
    """What one layer sees, of its own choice within a scan."""
    return context._replace(
        angles=_picked(context.angles, choice.rope),
        slot_angles=_picked(context.slot_angles, choice.rope),
        bias=_picked(context.bias, choice.window),
    )


def rotates_late(config: DecoderConfig) -> bool:
    """Whether rotations depend on a row's length: then a cache holds keys before they rotate."""
    ropes = (kind.rope for kind in config.layer_kinds if kind.rope)
    return any(isinstance(rope.scaling, LongScaling) for rope in ropes)


def _distinct(values: Sequence[Any]) -> tuple[list[Any], Array | None]:
    """Each value once, and every place's index among them, None where there is one only."""
    distinct = list(dict.fromkeys(values))
    which = np.array([distinct.index(value) for value in values], np.int32)
    return distinct, jnp.asarray(which) if len(distinct) > 1 else None


def _stacked(trees: Sequence[Any]) -> Any:
    if len(trees) == 1:
        return trees[0]
    return jax.tree.map(lambda *leaves: jnp.stack(jnp.broadcast_arrays(*leaves)), *trees)


def _picked(tree: Any, index: Array | None) -> Any:
    return tree if index is None else jax.tree.map(lambda leaf: leaf[index], tree)


def _check_cache(cache: KVCache, time: int, segment_ids: Array | None) -> None:
    slots = cache.keys.shape[2]
    if time > slots:
        raise InputError(f"{time} tokens don't fit a cache of {slots} slots: make a longer cache")
    if segment_ids is not None:
        raise InputError("segment_ids with a cache: packed rows are for training, pass one of both")


def _check_length(config: DecoderConfig, length: int) -> None:
    ropes = (kind.rope for kind in config.layer_kinds if kind.rope)
    dynamic = any(isinstance(rope.scaling, DynamicScaling) for rope in ropes)
    if dynamic and length > config.max_positions:
        raise InputError(
            f"a row of {length} tokens exceeds max_positions={config.max_positions}: there the "
            "rotations of dynamic scaling change with every token, which is not implemented; "
            "shorten the rows"
        )


def _visible(own: Array, slots: int, window: int | None, segment_ids: Array | None) -> Array:
    """Which slots each token looks at, bool (batch or 1, time, slots)."""
    slot = jnp.arange(slots, dtype=jnp.int32)
    visible = own[:, :, None] >= slot
    if window is not None:
        visible &= own[:, :, None] < slot + window
    if segment_ids is not None:
        visible &= segment_ids[:, :, None] == segment_ids[:, None, :]
    return visible


def _bias(visible: Array) -> Array:
    # Finite, so that a row is never all -inf, and added, so that the backward pass has no select.
    return jnp.where(visible, 0.0, jnp.finfo(jnp.float32).min)[:, None, None]


def _furthest(positions: Array, segment_ids: Array | None) -> Array:
    """The last position of each token's row, (batch, 1), or segment, (batch, time)."""
    if segment_ids is None:
        return jnp.max(positions, axis=1, keepdims=True)
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return jnp.max(jnp.where(same, positions[:, None, :], 0), axis=2)


def _angles(config: DecoderConfig, rope: Rope | None, positions: Array, furthest: Array) -> Angles:
    """Cosine and sine of the angles at (batch or 1, time) positions.

    ``furthest`` is the last position of each token's row or segment, which says how long it is.
    """
    if rope is None:  # beside layers that rotate
        rotated = next(kind.rope for kind in config.layer_kinds if kind.rope)
        still = jnp.zeros((*positions.shape, 1, rotated_features(config, rotated) // 2))
        return Angles(still + 1, still)
    found = frequencies(config, rope)
    per_feature: Any = found.per_feature
    if found.longer is not None:
        long = (furthest >= found.longest)[:, :, None, None]
        per_feature = jnp.where(long, found.longer, found.per_feature)
    angles = positions[:, :, None, None].astype(jnp.float32) * per_feature
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if found.amplitude == 1:
        return Angles(cos, sin)
    return Angles(cos * found.amplitude, sin * found.amplitude)


def rotate(x: Array, angles: Angles, *, interleaved: bool) -> Array:
    """Rotate the pairs of the last axis of x, (batch, time, heads, head_dim), in float32.

    Features beyond the pairs that ``angles`` are for stay as they are.
    """
    half = angles.cos.shape[-1]
    if 2 * half < x.shape[-1]:
        turned = rotate(x[..., : 2 * half], angles, interleaved=interleaved)
        return jnp.concatenate([turned, x[..., 2 * half :]], axis=-1)
    pairs, axis = {False: ((2, half), -2), True: ((half, 2), -1)}[interleaved]
    first, second = jnp.unstack(x.astype(jnp.float32).reshape(*x.shape[:-1], *pairs), axis=axis)
    rotated = (
        first * angles.cos - second * angles.sin,
        second * angles.cos + first * angles.sin,
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
    query_scalar: float | None = None,
    softcap: float | None = None,
    dropout: Callable[[Array], Array] | None = None,
) -> Array:
    """softmax(q kᵀ / √query_scalar + bias) v, softmax in float32.

    Query heads that share a key head are folded into the query's time axis, so that both
    products are plain matrix products over (batch, kv_head) and keys are never repeated.

    Args:
        query: (batch, time, heads, head_dim).
        keys, values: (batch, slots, kv_heads, head_dim).
        bias: float32, broadcastable to (batch, kv_heads, group, time, slots).
        query_scalar: ``head_dim`` by default.
        softcap: scores become softcap · tanh(scores / softcap) before the bias is added.
        dropout: applied to the weights that softmax gives.

    Returns:
        (batch, time, heads * head_dim) in the query's dtype.

    Source: Ainslie et al., GQA, https://arxiv.org/abs/2305.13245.
    """
    batch, time, heads, head_dim = query.shape
    slots, kv_heads = keys.shape[1:3]
    group, scale = heads // kv_heads, (query_scalar or head_dim) ** -0.5
    query, keys, values = (x.swapaxes(1, 2) for x in (query * scale, keys, values))
    folded = query.reshape(batch, kv_heads, group * time, head_dim)
    scores = _batched(folded, keys.astype(query.dtype), contract=3, result=jnp.float32)
    if softcap is not None:
        scores = capped(scores, softcap)
    weights = jax.nn.softmax(scores.reshape(batch, kv_heads, group, time, slots) + bias)
    weights = weights if dropout is None else dropout(weights)
    weights = weights.astype(query.dtype).reshape(scores.shape)
    mixed = _batched(weights, values.astype(query.dtype), contract=2, result=query.dtype)
    return mixed.reshape(batch, heads, time, head_dim).swapaxes(1, 2).reshape(batch, time, -1)


def capped(values: Array, cap: float) -> Array:
    """cap · tanh(values / cap), within ± cap."""
    return cap * jnp.tanh(values / cap)


def _batched(left: Array, right: Array, *, contract: int, result: jax.typing.DTypeLike) -> Array:
    dimensions = (((3,), (contract,)), ((0, 1), (0, 1)))
    return lax.dot_general(left, right, dimensions, preferred_element_type=jnp.dtype(result))
