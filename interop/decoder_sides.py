"""Our decoder and the same in ``transformers``, as the two sides of a comparison.

A batch is a `lora_jax.data.batches.Batch`: several rows may share a sequence, and each sees itself
alone. Transformers is told so by positions that start anew and a mask of four dimensions.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

import lora_jax as lora
from lora_jax.models.config import DecoderConfig
from lora_jax.models.decoder import Decoder
from lora_jax.site import Plan
from lora_jax.train.gradients import LossFn
from lora_jax.train.losses import LossSum, cross_entropy

if TYPE_CHECKING:
    from torch import Tensor


def decoder_function(
    config: DecoderConfig, layers: str = "model.layers.{i}"
) -> Callable[[Any, Any], tuple[jax.Array, dict[str, jax.Array]]]:
    """``jax_fn(params, tokens)``: logits, and each layer's output under its torch module's name.

    >>> from interop import pretrained
    >>> tiny = pretrained.load("tiny")
    >>> logits, layers = decoder_function(tiny.config)(tiny.params, jax.numpy.array([[72, 105]]))
    >>> logits.shape, {name: layer.shape for name, layer in layers.items()}
    ((1, 2, 320), {'model.layers.{i}': (2, 1, 2, 64)})
    """
    decoder = Decoder(config)

    def jax_fn(params: Any, tokens: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        applied: Any = decoder.apply({"params": params}, tokens, mutable=["intermediates"])
        (logits, _), seen = applied
        return logits, {layers: seen["intermediates"]["layers"]["hidden"]}

    return jax_fn


def logits_of_batch(config: DecoderConfig) -> Callable[[Any, Any], jax.Array]:
    """``model_fn(params, batch)``: logits at the positions whose next token is trained."""
    decoder = Decoder(config)

    def model_fn(params: Any, batch: Any) -> jax.Array:
        read = batch.tokens, batch.positions, batch.segment_ids
        return decoder.apply({"params": params}, *read, logits_at=batch.predict_at)[0]

    return model_fn


def token_loss(config: DecoderConfig, plan: Plan) -> LossFn:
    """``loss_fn(adapter, params, batch)``: cross-entropy over the trained tokens, summed."""
    adapted = lora.adapt(logits_of_batch(config), plan)

    def loss_fn(adapter: Any, params: Any, batch: Any) -> LossSum:
        return cross_entropy(adapted(params, adapter, batch), batch.targets, batch.weights)

    return loss_fn


def torch_logits(model: Any, tokens: "Tensor") -> "Tensor":
    """Logits (batch, time, vocab) of a transformers model, or of a PEFT model around one."""
    return model(input_ids=tokens, use_cache=False).logits


def torch_token_loss(model: Any, batch: Any) -> "Tensor":
    """The mean cross-entropy over the trained tokens of a batch of tensors."""
    from torch.nn import functional

    read = {"input_ids": batch.tokens, "position_ids": batch.positions}
    mask = segment_mask(batch.segment_ids)
    logits = model(**read, attention_mask=mask, use_cache=False).logits
    chosen = logits.flatten(0, 1)[batch.predict_at].float()
    each = functional.cross_entropy(chosen, batch.targets, reduction="none")
    return (each * batch.weights).sum() / batch.weights.sum()


def segment_mask(segment_ids: "Tensor") -> "Tensor":
    """(batch, 1, time, time) float32: 0 where a token sees another, the least number elsewhere.

    It sees those of its own segment that are not after it.

    >>> import torch
    >>> (segment_mask(torch.tensor([[1, 1, 2]]))[0, 0] == 0).int().tolist()
    [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    """
    import torch

    own = segment_ids[:, :, None] == segment_ids[:, None, :]
    seen = (own & torch.ones_like(own).tril())[:, None]
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)
