"""A transformer encoder with a classification head, configured: BERT and RoBERTa.

The parameters are a plain dict; the leaves under ``layers`` are stacked, one row per block::

    embeddings/{word,position,token_type}_embeddings/embedding   (rows, hidden)
    embeddings/LayerNorm/{scale,bias}                            (hidden,)
    layers/attention/self/{query,key,value}/{kernel,bias}        (layers, hidden, hidden)
    layers/attention/output/dense/{kernel,bias}                  (layers, hidden, hidden)
    layers/mlp/intermediate/dense/{kernel,bias}                  (layers, hidden, wide)
    layers/mlp/output/dense/{kernel,bias}                        (layers, wide, hidden)
    layers/{attention,mlp}/output/LayerNorm/{scale,bias}         (layers, hidden)
    pooler/dense/{kernel,bias}                                   (hidden, hidden)
    classifier/{kernel,bias}                                     head "pooled"
    classifier/{dense,out_proj}/{kernel,bias}                    head "dense"
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from lora_jax.errors import InputError
from lora_jax.models.attention import attend
from lora_jax.models.blocks import ACTIVATIONS
from lora_jax.models.encoder_config import EncoderConfig

__all__ = [
    "Encoder",
    "EncoderConfig",
    "EncoderOutput",
    "init_encoder",
]

_normal = nn.initializers.normal(0.02)
_float32_dot = partial(lax.dot_general, preferred_element_type=jnp.float32)


class EncoderOutput(NamedTuple):
    """What an encoder says of (batch, time) tokens.

    Attributes:
        hidden: (batch, time, hidden), the last block's output, in the compute dtype.
        pooled: (batch, hidden), the pooler's output; None where there is no pooler.
        logits: float32 (batch, labels), the head's output; None where there is no head.
    """

    hidden: Array
    pooled: Array | None
    logits: Array | None


class Embeddings(nn.Module):
    """Words, positions and token types, added and normed."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, tokens: Array, token_types: Array, positions: Array) -> Array:
        config = self.config
        words = _table(config, "word_embeddings", config.vocab_size)(tokens)
        types = _table(config, "token_type_embeddings", config.type_vocab_size)(token_types)
        places = _table(config, "position_embeddings", config.max_positions)(positions)
        return _dropout(self, config.hidden_dropout)(_layer_norm(config)(words + types + places))


class SelfAttention(nn.Module):
    """Every token attends to every token that the bias lets it see."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, hidden: Array, bias: Array) -> Array:
        config = self.config
        split = (*hidden.shape[:2], config.num_heads, config.hidden_size // config.num_heads)
        query, keys, values = (
            _dense(config, name, config.hidden_size)(hidden).reshape(split)
            for name in ("query", "key", "value")
        )
        dropout = _dropout(self, config.attention_dropout)
        return attend(query, keys, values, bias, dropout=dropout)


class Output(nn.Module):
    """LayerNorm(residual + dense(x)): how attention and MLP both end."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Array, residual: Array) -> Array:
        config = self.config
        mixed = _dense(config, "dense", config.hidden_size)(x)
        return _layer_norm(config)(residual + _dropout(self, config.hidden_dropout)(mixed))


class Attention(nn.Module):
    """Attention, added to the residual stream and normed."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, hidden: Array, bias: Array) -> Array:
        attended = SelfAttention(self.config, name="self")(hidden, bias)
        return Output(self.config, name="output")(attended, hidden)


class Intermediate(nn.Module):
    """The first half of the MLP."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, hidden: Array) -> Array:
        wide = _dense(self.config, "dense", self.config.intermediate_size)(hidden)
        return ACTIVATIONS[self.config.activation](wide)


class MLP(nn.Module):
    """dense(activation(dense(x))), added to the residual stream and normed."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, hidden: Array) -> Array:
        wide = Intermediate(self.config, name="intermediate")(hidden)
        return Output(self.config, name="output")(wide, hidden)


class Block(nn.Module):
    """Attention and MLP, each normed after it is added to the residual stream."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, hidden: Array, bias: Array) -> tuple[Array, None]:
        hidden = Attention(self.config, name="attention")(hidden, bias)
        hidden = MLP(self.config, name="mlp")(hidden)
        self.sow("intermediates", "hidden", hidden, init_fn=lambda: None, reduce_fn=_latest)
        return hidden, None


class Pooler(nn.Module):
    """tanh(dense(first token))."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, first: Array) -> Array:
        return jnp.tanh(_dense(self.config, "dense", self.config.hidden_size)(first))


class DenseHead(nn.Module):
    """out_proj(tanh(dense(first token)))."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, first: Array) -> Array:
        config = self.config
        dropout = _dropout(self, config.classifier_dropout)
        wide = jnp.tanh(_dense(config, "dense", config.hidden_size)(dropout(first)))
        return _logits(config, "out_proj")(dropout(wide))


class Encoder(nn.Module):
    """Tokens to hidden states, and to the logits of a class for each row.

    >>> config = EncoderConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_layers=2,
    ...                        num_heads=2, max_positions=32, head="pooled", labels=("no", "yes"))
    >>> params = jax.eval_shape(partial(init_encoder, config=config), jax.random.key(0))
    >>> tokens = jnp.array([[2, 7, 9, 3]])
    >>> output = jax.eval_shape(Encoder(config).apply, {"params": params}, tokens)
    >>> output.hidden.shape, output.logits.shape
    ((1, 4, 16), (1, 2))

    Dropout is on where ``rngs={"dropout": key}`` is given, and off otherwise. Per-layer outputs,
    (layers, batch, time, hidden), come with ``mutable=["intermediates"]`` at
    ``intermediates/layers/hidden``.

    Source: Devlin et al., BERT, https://arxiv.org/abs/1810.04805; Liu et al., RoBERTa,
    https://arxiv.org/abs/1907.11692.
    """

    config: EncoderConfig

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        mask: Array | None = None,
        token_types: Array | None = None,
        positions: Array | None = None,
    ) -> EncoderOutput:
        """What the encoder says of the tokens.

        Args:
            tokens: int32 (batch, time). An id outside the vocabulary makes its row NaN.
            mask: (batch, time), zero or False for padding, which no token then looks at. By
                default every token is looked at, padding included.
            token_types: int32 (batch, time), which sentence a token belongs to; 0 by default.
            positions: int32 (batch, time), rows of the table of positions; by default as
                ``positions_skip_padding`` says.

        Raises:
            InputError: rows longer than the table of positions allows.
        """
        config = self.config
        if positions is None:
            positions = token_positions(config, tokens)
        if token_types is None:
            token_types = jnp.zeros_like(tokens)
        embedded = Embeddings(config, name="embeddings")(tokens, token_types, positions)
        hidden, _ = _layers(config)(embedded, _bias(tokens, mask))
        first = hidden[:, 0]
        pooled = Pooler(config, name="pooler")(first) if config.pooler else None
        return EncoderOutput(hidden, pooled, self._head(first, pooled))

    def _head(self, first: Array, pooled: Array | None) -> Array | None:
        config = self.config
        if config.head == "dense":
            return DenseHead(config, name="classifier")(first)
        if config.head == "pooled":
            dropout = _dropout(self, config.classifier_dropout)
            return _logits(config, "classifier")(dropout(pooled))
        return None


def token_positions(config: EncoderConfig, tokens: Array) -> Array:
    """The row of the table of positions for each token, int32 (batch or 1, time).

    Raises:
        InputError: more tokens than there are positions.
    """
    time = tokens.shape[1]
    if time > config.longest_row:
        raise InputError(
            f"rows of {time} tokens: this encoder has positions for {config.longest_row}; "
            "shorten the rows"
        )
    if not config.positions_skip_padding:
        return jnp.arange(time, dtype=jnp.int32)[None]
    kept = (tokens != config.padding_id).astype(jnp.int32)
    return jnp.cumsum(kept, axis=1) * kept + config.padding_id


@partial(jax.jit, static_argnames="config")
def init_encoder(key: Array, config: EncoderConfig) -> dict:
    """Random float32 parameters: normal with deviation 0.02, zero biases, unit scales."""
    return dict(Encoder(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"])


def _bias(tokens: Array, mask: Array | None) -> Array:
    """float32 (batch or 1, 1, 1, 1, time), zero where attention may look."""
    if mask is None:
        return jnp.zeros((1, 1, 1, 1, tokens.shape[1]), jnp.float32)
    hidden = jnp.where(mask.astype(bool), 0.0, jnp.finfo(jnp.float32).min)
    return hidden[:, None, None, None]


def _layers(config: EncoderConfig) -> Callable[..., tuple[Array, Any]]:
    block = nn.remat(Block, prevent_cse=False) if config.remat else Block
    scanned = nn.scan(
        block,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=cast(Any, nn.broadcast),
        length=config.num_layers,
        unroll=config.scan_unroll,
    )
    return scanned(config, name="layers")


def _dense(config: EncoderConfig, name: str, features: int) -> nn.Dense:
    return nn.Dense(features, dtype=config.dtype, kernel_init=_normal, name=name)


def _logits(config: EncoderConfig, name: str) -> nn.Dense:
    return nn.Dense(
        len(config.labels),
        dtype=config.dtype,
        kernel_init=_normal,
        dot_general=_float32_dot,
        name=name,
    )


def _table(config: EncoderConfig, name: str, rows: int) -> nn.Embed:
    return nn.Embed(rows, config.hidden_size, dtype=config.dtype, embedding_init=_normal, name=name)


def _layer_norm(config: EncoderConfig) -> nn.LayerNorm:
    # The fast variance is a difference of two large numbers.
    return nn.LayerNorm(
        config.layer_norm_eps, dtype=config.dtype, use_fast_variance=False, name="LayerNorm"
    )


def _dropout(module: nn.Module, share: float) -> nn.Dropout:
    return nn.Dropout(share, deterministic=not module.has_rng("dropout"))


def _latest(_, new: Array) -> Array:
    return new
