"""A block of the decoder: attention and MLP between norms, as `DecoderConfig` says."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array, lax

from lora_jax.models.attention import (
    Angles,
    AttentionContext,
    LayerChoice,
    attend,
    of_layer,
    rotate,
    write,
)
from lora_jax.models.config import DecoderConfig
from lora_jax.models.experts import RoutedMLP

normal = nn.initializers.normal(0.02)

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


def _feed_forward(config: DecoderConfig) -> nn.Module:
    if config.experts is None:
        return MLP(config, name="mlp")
    activation = ACTIVATIONS[config.mlp.activation]
    return RoutedMLP(config.experts, activation, config.dtype, config.expert_products, name="mlp")


def _linear(config: DecoderConfig, name: str, features: int, use_bias: bool) -> nn.Dense:
    return nn.Dense(features, use_bias=use_bias, dtype=config.dtype, kernel_init=normal, name=name)


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


def _latest(_, new: Array) -> Array:
    return new
