"""One stage of MiniMind's training, of the whole model or of an adapter over it, in either mode."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax.errors import InputError
from lora_jax.models.config import DecoderConfig
from lora_jax.models.decoder import Decoder, leaf_shapes
from lora_jax.models.experts import sequence_loss
from lora_jax.paths import path_key
from lora_jax.train.gradients import LossFn
from lora_jax.train.losses import LossSum, cross_entropy
from lora_jax.train.optim import adamw
from lora_jax.train.step import init_state, make_eval_step, make_step

from minimind_modes import Batch, Mode, Update, over_tokens

Apply = Callable[[Any, Any, Any], tuple[jax.Array, jax.Array]]
"""``apply(trained, frozen, inputs)``: logits, and how unevenly experts were met."""


class Schooling(NamedTuple):
    """How a stage trains."""

    mode: Mode
    learning_rate: float
    accumulation_steps: int
    grad_clip: float
    aux_loss_alpha: float
    """Factor of the experts' balance in the loss."""


class Record(NamedTuple):
    """What an update came to."""

    epoch: int
    """Of its last batch, from 1."""
    batch: int
    """Within the epoch, from 1."""
    loss: float
    aux_loss: float
    """The experts' part of it."""
    learning_rate: float
    seconds: float

    @property
    def logits_loss(self) -> float:
        """The cross-entropy alone."""
        return self.loss - self.aux_loss


Observe = Callable[[Record, Any], None]
"""Called after each update with what it came to and what is trained as it is now."""


@partial(jax.jit, static_argnames="config")
def fresh_params(key: jax.Array, config: DecoderConfig) -> dict[str, Any]:
    """Weights as torch's linear layers start: uniform within ±1/√in, the table as the tied head."""
    tree: dict[str, Any] = {}
    for path, shape in leaf_shapes(config).items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = jnp.ones(shape) if name == "scale" else _uniform(key, path, shape)
    return tree


def _uniform(key: jax.Array, path: str, shape: tuple[int, ...]) -> jax.Array:
    fan_in = shape[-1] if path.endswith("/embedding") else shape[-2]
    return jax.random.uniform(path_key(key, path), shape, jnp.float32, -1, 1) * fan_in**-0.5


@lru_cache(maxsize=4)
def model_function(config: DecoderConfig) -> Callable[[Any, Any], tuple[jax.Array, jax.Array]]:
    """``model_fn(params, inputs)``: logits (rows, time, vocab), and the balance of experts ()."""
    decoder = Decoder(config)

    def dense(params: Any, inputs: Any) -> tuple[jax.Array, jax.Array]:
        return decoder.apply({"params": params}, inputs)[0], jnp.float32(0)

    def mixture(params: Any, inputs: Any) -> tuple[jax.Array, jax.Array]:
        (logits, _), sown = decoder.apply({"params": params}, inputs, mutable=["routing"])
        return logits, sequence_loss(sown["routing"]["layers"]["mlp"]["router"])

    return mixture if config.experts else dense


def loss_function(
    apply: Apply, reduce: Callable[[LossSum, Any], LossSum], aux_loss_alpha: float
) -> LossFn:
    """``loss_fn(trained, frozen, batch)``: cross-entropy and balance, as ``reduce`` sums them."""

    def loss_fn(trained: Any, frozen: Any, batch: Batch) -> LossSum:
        logits, aux = apply(trained, frozen, batch.inputs)
        flat = logits.reshape(-1, logits.shape[-1])
        loss = cross_entropy(flat, batch.targets.reshape(-1), batch.weights.reshape(-1))
        whole = LossSum(loss.total + aux_loss_alpha * aux * loss.tokens, loss.tokens)
        return reduce(whole, batch.share)

    return loss_fn


def train(
    apply: Apply,
    trained: Any,
    frozen: Any,
    epoch: Sequence[Batch],
    epochs: int,
    schooling: Schooling,
    observe: Observe = lambda record, trained: None,
) -> tuple[Any, list[Record]]:
    """Train on the batches of an epoch, in their order, as many times over.

    Args:
      apply: the model.
      trained: the tree that trains, float32.
      frozen: what it needs besides.
      epoch: the batches.
      epochs: how often.
      schooling: how.
      observe: sees every update.

    Returns:
      The trained tree, and a record for every update.

    Raises:
      InputError: the mode makes no update of so few batches.
    """
    mode, accumulate = schooling.mode, schooling.accumulation_steps
    updates = mode.updates(len(epoch) * epochs, accumulate, len(epoch))
    if not updates:
        raise InputError(f"{accumulate=} and {len(epoch) * epochs} batches make no update")
    rates = mode.rates(schooling.learning_rate, len(epoch) * epochs, updates)
    tx, step, logits_loss = _compiled(apply, schooling, tuple(rates.tolist()))
    state, records = init_state(trained, tx), []
    for update, rate in zip(updates, rates, strict=True):
        started = time.perf_counter()
        group = [*_batches(epoch, update)]
        alone = [logits_loss(state.adapter, frozen, batch) for batch in _judged(group, schooling)]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *group)
        state, metrics = step(state, frozen, stacked)
        loss = float(metrics.loss)
        aux = loss - _mean(alone) if alone else 0.0
        number, batch = divmod(update.batches[-1], len(epoch))
        seconds = time.perf_counter() - started
        records.append(Record(number + 1, batch + 1, loss, aux, float(rate), seconds))
        observe(records[-1], state.adapter)
    return state.adapter, records


@lru_cache(maxsize=4)  # stages that train alike are compiled once
def _compiled(
    apply: Apply, schooling: Schooling, rates: tuple[float, ...]
) -> tuple[optax.GradientTransformation, Callable[..., Any], Callable[..., LossSum]]:
    """The optimizer, the update, and the cross-entropy alone."""
    by_count = jnp.asarray(rates, jnp.float32)
    tx = adamw(lambda count: by_count[count], clip_norm=schooling.grad_clip)
    whole, cross = (
        loss_function(apply, schooling.mode.reduce, alpha)
        for alpha in (schooling.aux_loss_alpha, 0.0)
    )
    return tx, jax.jit(make_step(whole, tx, accumulate=True)), make_eval_step(cross)


def judge_of(apply: Apply, batches: Sequence[Batch]) -> Callable[[Any, Any], float]:
    """``judge(trained, frozen)``: the right loss, nats a token; batches of `next_token`."""
    loss = _right_loss(apply)
    return lambda trained, frozen: _mean([loss(trained, frozen, batch) for batch in batches])


@lru_cache(maxsize=4)
def _right_loss(apply: Apply) -> Callable[..., LossSum]:
    return make_eval_step(loss_function(apply, over_tokens, 0.0))


def _batches(epoch: Sequence[Batch], update: Update) -> Iterator[Batch]:
    for index in update.batches:
        yield epoch[index % len(epoch)]._replace(share=np.float32(update.share))


def _judged(group: Sequence[Batch], schooling: Schooling) -> Sequence[Batch]:
    """Batches whose cross-entropy is taken by itself: none where it is all there is."""
    return group if schooling.aux_loss_alpha else ()


def _mean(sums: Sequence[LossSum]) -> float:
    total, tokens = (sum(float(part) for part in parts) for parts in zip(*sums, strict=True))
    return total / tokens
