"""How the next token is drawn from logits: largest, temperature, top-k, top-p."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax


class Sampling(NamedTuple):
    """How the next token is drawn; traced, so that no change of it compiles anew.

    Attributes:
        temperature: float32 (), divides the logits; 0 takes the largest instead of drawing.
        top_k: int32 (), draw from the k largest logits; 0 for all.
        top_p: float32 (), draw from the fewest tokens whose probabilities, after temperature
            and top_k, reach this sum; 1 for all.
    """

    temperature: Array
    top_k: Array
    top_p: Array


def choose(logits: Array, sampling: Sampling, key: Array) -> Array:
    """The next token of each row, int32 (batch,), from logits (batch, vocab).

    >>> greedy = Sampling(jnp.float32(0), jnp.int32(0), jnp.float32(1))
    >>> choose(jnp.array([[0.5, 2.0, 1.0]]), greedy, jax.random.key(0)).tolist()
    [1]
    """

    def draw() -> Array:
        return jax.random.categorical(key, truncated(logits, sampling))

    def largest() -> Array:
        return jnp.argmax(logits, axis=-1)

    return lax.cond(sampling.temperature > 0, draw, largest).astype(jnp.int32)


def truncated(logits: Array, sampling: Sampling) -> Array:
    """Logits over temperature, -inf where top_k or top_p exclude the token; ties are kept.

    Source: top_p is nucleus sampling, Holtzman et al., https://arxiv.org/abs/1904.09751.

    >>> k_is_two = Sampling(jnp.float32(0.5), jnp.int32(2), jnp.float32(1))
    >>> truncated(jnp.array([[0.5, 2.0, 1.0]]), k_is_two).tolist()
    [[-inf, 4.0, 2.0]]
    """
    scaled = logits / sampling.temperature
    descending = jnp.sort(scaled, axis=-1, descending=True)
    vocab = logits.shape[-1]
    within_k = jnp.arange(vocab) < jnp.where(sampling.top_k > 0, sampling.top_k, vocab)
    probabilities = jax.nn.softmax(jnp.where(within_k, descending, -jnp.inf))
    mass_before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # Rounding may carry the sum to 1 before the last token: with top_p = 1 it excludes none.
    kept = within_k & ((mass_before < sampling.top_p) | (sampling.top_p >= 1))
    smallest_kept = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scaled >= smallest_kept, scaled, -jnp.inf)


def sampling_problems(
    key: Array | None, temperature: float, top_k: int, top_p: float
) -> dict[str, Any]:
    """What can be wrong with the arguments: message to whether it is."""
    finite = 0 <= temperature < float("inf")
    return {
        f"temperature={temperature} is not a finite number from 0 up": not finite,
        f"top_k={top_k} is negative: pass 0 to keep all tokens": top_k < 0,
        f"top_p={top_p} is not in (0, 1]: pass 1.0 to keep all tokens": not 0 < top_p <= 1,
        f"top_k={top_k} and top_p={top_p} choose among draws: pass a temperature above 0": (
            temperature == 0 and (top_k > 0 or top_p < 1)
        ),
        f"temperature={temperature} draws at random: pass key=jax.random.key(seed)": (
            temperature > 0 and key is None
        ),
    }
