"""Losses as sums beside token counts, so that they add up over micro-batches and devices."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike


class LossSum(NamedTuple):
    """A loss summed over tokens, in nats, and how many tokens that were (both float32 scalars)."""

    total: jax.Array
    tokens: jax.Array


def cross_entropy(logits: jax.Array, targets: ArrayLike, weights: ArrayLike) -> LossSum:
    """Next-token cross-entropy, summed.

    Args:
      logits: (n, vocab); taken in float32 if they come in fewer bits.
      targets: (n,) int32, the token that each position should predict.
      weights: (n,) float32, 1 for a token that counts, 0 for one that doesn't.

    Source: `optax.softmax_cross_entropy_with_integer_labels`.

    >>> loss = cross_entropy(jnp.zeros((3, 4)), jnp.array([0, 1, 2]), jnp.array([1.0, 1.0, 0.0]))
    >>> float(loss.total / loss.tokens), float(loss.tokens)
    (1.3862943649291992, 2.0)
    """
    targets, weights = jnp.asarray(targets), jnp.asarray(weights)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    each = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return LossSum((each * weights).sum(), weights.sum())
