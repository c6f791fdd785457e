"""A fresh classification head for an encoder that has none: where fine-tuning starts."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
from flax import linen as nn
from jax import Array

from lora_jax.models.encoder import init_encoder
from lora_jax.models.encoder_config import EncoderConfig


def with_classifier(
    key: Array, config: EncoderConfig, params: Mapping[str, Any], labels: Sequence[str]
) -> tuple[EncoderConfig, dict]:
    """An encoder without a head, given a fresh one for these labels: where fine-tuning starts.

    Args:
        key: decides the head's first values, normal with deviation 0.02.
        config: an encoder; its own head, if it has one, is left out.
        params: its parameters.
        labels: names of the classes.

    Returns:
        The new config and a new tree; what ``params`` has of it is taken from there, and a pooler
        that it lacks is fresh too.
    """
    head = "dense" if config.positions_skip_padding else "pooled"
    pooler = head == "pooled"
    config = replace(config, head=head, labels=tuple(labels), pooler=pooler)
    shapes = jax.eval_shape(partial(init_encoder, config=config), key)
    kept = {name: params[name] for name in shapes if name in params and name != "classifier"}
    missing = {name: part for name, part in shapes.items() if name not in kept}
    return config, kept | _fresh(key, missing)


def _fresh(key: Array, shapes: Any) -> dict:
    """Random kernels and zero biases of these shapes."""
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(key, len(leaves))
    draw = {1: nn.initializers.zeros, 2: nn.initializers.normal(0.02)}
    made = [draw[len(x.shape)](k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, made)
