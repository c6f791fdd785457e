"""Text from any cached language model: prefill, then one token at a time, under one jit."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from lora_jax.errors import InputError
from lora_jax.models.attention import init_cache
from lora_jax.models.config import DecoderConfig
from lora_jax.models.decoder import Decoder
from lora_jax.models.sampling import Sampling, choose, sampling_problems

SMALLEST_BUCKET = 16

Apply = Callable[[Any, Array, Array, Any, Array], tuple[Array, Any]]


class LanguageModel(NamedTuple):
    """A model as generation sees it.

    Attributes:
        apply: ``(params, tokens, positions, cache, logits_at) -> (logits, cache)`` with tokens
            and positions int32 (batch, time), logits_at int32 (n,) indices into the flattened
            (batch * time), logits (n, vocab). `params` is any pytree, an adapter beside the
            base for one. A position sees the slots up to its own.
        init_cache: ``(batch, slots) -> cache``, a NamedTuple with an int32 field ``length``:
            the slots filled, where the next token goes.
        max_positions: longest row, prompt and answer together.
    """

    apply: Apply
    init_cache: Callable[[int, int], Any]
    max_positions: int


@functools.cache
def language_model(config: DecoderConfig) -> LanguageModel:
    """The decoder of `config`, its params a plain tree; the same value for equal configs."""
    decoder = Decoder(config)

    def apply(params, tokens, positions, cache, logits_at):
        return decoder.apply(
            {"params": params}, tokens, positions, cache=cache, logits_at=logits_at
        )

    return LanguageModel(apply, functools.partial(init_cache, config), config.max_positions)


class _State(NamedTuple):
    step: Array  # int32 (), tokens written to every row
    output: Array  # int32 (batch, max_new_tokens)
    counts: Array  # int32 (batch,), tokens that belong to the answer
    finished: Array  # bool (batch,)
    failed: Array  # bool (batch,), logits were NaN
    cache: Any


def generate(
    model: LanguageModel,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int] = (),
    key: Array | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> list[list[int]]:
    """Continue each prompt until an end token or `max_new_tokens`.

    Prompts of unequal length stand left-aligned in one batch, each row with its own count of
    filled cache slots; a row's answer does not depend on its neighbours.

    One program is compiled for each (batch size, prompt length rounded up to a power of two,
    `max_new_tokens`, number of end tokens) and each ``model.apply``, which is compared by
    identity: define that function once and keep it, not once a call. Everything else is traced.

    Args:
        model: what to run, see `LanguageModel`; `language_model(config)` for our decoder.
        params: handed to ``model.apply`` as it is.
        prompts: token ids, at least one per row.
        max_new_tokens: most tokens to add to a row.
        eos_ids: tokens that end a row; decoding stops when every row has ended.
        key: random key, needed when temperature is above 0.
        temperature: divides the logits; 0 takes the largest logit instead of drawing.
        top_k: draw from the k largest logits only; 0 for all.
        top_p: draw from the fewest tokens whose probabilities, after temperature and top_k,
            reach this sum.

    Returns:
        The new tokens of each row, its end token included where it reached one.

    Raises:
        InputError: all bad arguments at once, before any computation; or rows whose logits
            came out as NaN.

    Source: top_p is nucleus sampling, Holtzman et al., https://arxiv.org/abs/1904.09751.

    >>> from lora_jax.models.decoder import init_params
    >>> from lora_jax.models.presets import TINY
    >>> params = init_params(jax.random.key(0), TINY)
    >>> answers = generate(language_model(TINY), params, [[72, 105], [33]], max_new_tokens=3)
    >>> [len(answer) for answer in answers]
    [3, 3]
    """
    problems = _prompt_problems(prompts, max_new_tokens, model.max_positions)
    problems |= sampling_problems(key, temperature, top_k, top_p)
    if found := [problem for problem, holds in problems.items() if holds]:
        raise InputError("can't generate: " + "; ".join(found))
    tokens, lengths = _left_aligned(prompts, _bucket(prompts, model.max_positions))
    state = _continue(
        model.apply,
        max_new_tokens,
        params,
        tokens,
        lengths,
        model.init_cache(len(tokens), min(tokens.shape[1] + max_new_tokens, model.max_positions)),
        np.asarray(eos_ids, np.int32),
        Sampling(jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p)),
        jax.random.key(0) if key is None else key,
    )
    _check_finite(state.failed)
    rows = zip(np.asarray(state.output), np.asarray(state.counts), strict=True)
    return [row[:count].tolist() for row, count in rows]


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames="cache")
def _continue(
    apply: Apply,
    max_new_tokens: int,
    params: Any,
    tokens: Array,
    lengths: Array,
    cache: Any,
    eos_ids: Array,
    sampling: Sampling,
    key: Array,
) -> _State:
    batch, width = tokens.shape
    rows = jnp.arange(batch, dtype=jnp.int32)

    def record(state: _State, logits: Array) -> _State:
        token = choose(logits, sampling, jax.random.fold_in(key, state.step))
        failed = state.failed | jnp.isnan(logits).any(-1)
        return state._replace(
            step=state.step + 1,
            output=state.output.at[:, state.step].set(token),
            counts=state.counts + ~state.finished,
            finished=state.finished | jnp.isin(token, eos_ids) | failed,
            failed=failed,
        )

    def advance(state: _State) -> _State:
        token = lax.dynamic_slice_in_dim(state.output, state.step - 1, 1, axis=1)
        positions = (lengths + state.step - 1)[:, None]
        logits, cache = apply(params, token, positions, state.cache, rows)
        return record(state._replace(cache=cache), logits)

    def unfinished(state: _State) -> Array:
        return (state.step < max_new_tokens) & ~state.finished.all()

    # Padding repeats the last position: a row is as long as its largest position says.
    positions = jnp.minimum(jnp.arange(width, dtype=jnp.int32), lengths[:, None] - 1)
    logits, cache = apply(params, tokens, positions, cache, rows * width + lengths - 1)
    # The prefill also filled slots for the padding: forget them, so that answers overwrite them.
    start = _empty_state(batch, max_new_tokens, cache._replace(length=lengths))
    return lax.while_loop(unfinished, advance, record(start, logits))


def _empty_state(batch: int, max_new_tokens: int, cache: Any) -> _State:
    return _State(
        step=jnp.int32(0),
        output=jnp.zeros((batch, max_new_tokens), jnp.int32),
        counts=jnp.zeros(batch, jnp.int32),
        finished=jnp.zeros(batch, bool),
        failed=jnp.zeros(batch, bool),
        cache=cache,
    )


def _bucket(prompts: Sequence[Sequence[int]], max_positions: int) -> int:
    longest = max(map(len, prompts))
    return min(max(SMALLEST_BUCKET, 1 << (longest - 1).bit_length()), max_positions)


def _left_aligned(prompts: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, np.array([len(prompt) for prompt in prompts], np.int32)


def _prompt_problems(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, max_positions: int
) -> dict[str, Any]:
    lengths = {row: len(prompt) for row, prompt in enumerate(prompts)}
    empty = [row for row, length in lengths.items() if length == 0]
    negative = [row for row, prompt in enumerate(prompts) if min(prompt, default=0) < 0]
    long = {row: n for row, n in lengths.items() if n + max_new_tokens > max_positions}
    return {
        "no prompts: pass at least one row of token ids": len(prompts) == 0,
        f"rows {empty} are empty: start them with a token": empty,
        f"rows {negative} hold negative token ids": negative,
        f"max_new_tokens={max_new_tokens} is below 1": max_new_tokens < 1,
        f"prompt lengths by row {long} plus max_new_tokens={max_new_tokens} exceed "
        f"max_positions={max_positions}: shorten one of both": long,
    }


def _check_finite(failed: Array) -> None:
    if rows := np.flatnonzero(failed).tolist():
        raise InputError(
            f"can't generate: the logits of rows {rows} are NaN: a token id lies outside the "
            "vocabulary, or weights are not finite"
        )
