"""Many adapters trained at once over one base: the update of one, under vmap.

The base is not mapped, so it is held once, and each of its products is one product over the
activations of all members.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from lora_jax.train.gradients import LossFn
from lora_jax.train.losses import LossSum
from lora_jax.train.members import SCALED, Joint, Member, Traits, corner, join
from lora_jax.train.micro_batches import one_after_another
from lora_jax.train.precision import FLOAT32, Precision
from lora_jax.train.step import StepMetrics, TrainState, init_state, make_step

LossOf = Callable[[Any], LossFn]
"""``loss_of(plan) -> loss_fn(adapter, params, batch)``, the loss of the function adapted so."""

OptimizerOf = Callable[[Any], optax.GradientTransformation]
"""``optimizer(learning_rate)``; the learning rate is traced, a float32 scalar."""


class Trained(NamedTuple):
    """What became of a member; the arrays have an element an update."""

    adapter: Any
    """Of the member's own rank, NumPy arrays."""
    losses: np.ndarray
    """Mean over the update's tokens before it, nats, float32; as it came if not finite."""
    tokens: np.ndarray
    """Trained tokens, float32."""
    skipped: np.ndarray
    """Whether the member was left as it was: no token, or something not finite."""


def train_many(
    loss_of: LossOf,
    optimizer: OptimizerOf,
    params: Any,
    members: Sequence[Member],
    batches: Iterable[Any],
    *,
    policy: Precision = FLOAT32,
    accumulate: bool = False,
    batch_axes: Any = None,
    observe: Callable[[int, StepMetrics], None] = lambda update, metrics: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Trained]:
    """Train all members on the same batches in the same order, in one compiled step.

    Each member ends as it would alone; one whose loss is not finite is left as it was, and the
    others don't notice. Activations grow with the members, the base doesn't.

    Args:
      loss_of: ``plan -> loss_fn(adapter, params, batch) -> LossSum``; called once, with a plan
        of the largest ranks.
      optimizer: ``learning_rate -> optax transformation``, such as `adamw`, or with a schedule:
        ``lambda peak: adamw(lambda count: peak * share(count))``.
      params: the base, held once.
      members: what is trained, at least one.
      batches: one an update, for all members: runs can be compared update by update then. It
        costs little against one each, as from the first adapted weight on the activations
        differ anyhow.
      policy, accumulate: as of `make_step`.
      batch_axes: as of ``vmap``'s ``in_axes``: 0 for the leaves of a batch that have a leading
        axis of members, such as dropout keys.
      observe: called once an update, in order and one late, with the number of updates done and
        its metrics, arrays of shape (N,).
      should_stop: asked after each update.

    Returns:
      A `Trained` for each member, in order.

    Raises:
      InputError: no members; plans that differ in more than ranks, scales and first values; or
        an adapter that is not of its plan. Every offender is named.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> from lora_jax.train.optim import adamw
    >>> params = {"w": jax.random.normal(jax.random.key(0), (8, 4))}
    >>> x = jax.random.normal(jax.random.key(1), (16, 8))
    >>> def model_fn(params, x):
    ...     return x @ params["w"]
    >>> def loss_of(plan):
    ...     adapted = lora.adapt(model_fn, plan)
    ...     def loss_fn(adapter, params, x):
    ...         return LossSum((adapted(params, adapter, x) ** 2).sum(), jnp.float32(x.size))
    ...     return loss_fn
    >>> def member(rank, learning_rate):
    ...     config = lora.LoraConfig(rank=rank, targets="w")
    ...     plan = lora.plan(model_fn, params, x, config=config)
    ...     return Member(plan, lora.init(jax.random.key(2), params, plan), learning_rate)
    >>> members = [member(2, 0.01), member(4, 0.01), member(4, 0.1)]
    >>> trained = train_many(loss_of, adamw, params, members, [x] * 20)
    >>> [each.adapter["w"].a.shape for each in trained]
    [(8, 2), (8, 4), (8, 4)]
    >>> [bool(each.losses[-1] < each.losses[0]) for each in trained]
    [True, True, True]
    """
    joint = join(members)
    state = init_many(joint, optimizer, policy)
    make = partial(make_step, policy=policy, accumulate=accumulate)
    step = many_step(loss_of(joint.plan), optimizer, make, batch_axes)
    params, record, late = jax.device_put(params), [], deque()

    def fetch(metrics: StepMetrics) -> None:
        record.append(jax.device_get(metrics))
        observe(len(record), record[-1])

    for batch in batches:
        state, metrics = step(state, joint.traits, params, batch)
        late.append(metrics)
        if len(late) > 1:
            fetch(late.popleft())
        if should_stop():
            break
    for metrics in late:
        fetch(metrics)
    return list(_parted(jax.device_get(state.adapter), members, record))


def evaluate_many(
    loss_of: LossOf,
    params: Any,
    members: Sequence[Member],
    batches: Iterable[Any],
    *,
    accumulate: bool = False,
) -> np.ndarray:
    """Each member's mean loss a token over all batches, (N,) float64, nats.

    Arguments and errors as of `train_many`; sums and counts are added up first.
    """
    joint = join(members)
    loss_fn = loss_of(joint.plan)

    def loss(adapter: Any, traits: Traits, params: Any, batch: Any) -> LossSum:
        scaled = _scaled(loss_fn, traits.scales)
        return (one_after_another(scaled) if accumulate else scaled)(adapter, params, batch)

    evaluate = jax.jit(jax.vmap(loss, in_axes=(0, 0, None, None)))
    adapter, params = jax.device_put((joint.adapter, params))
    sums = [jax.device_get(evaluate(adapter, joint.traits, params, batch)) for batch in batches]
    total, tokens = (np.sum(parts, axis=0, dtype=np.float64) for parts in zip(*sums, strict=True))
    return total / np.maximum(tokens, 1)


def init_many(joint: Joint, optimizer: OptimizerOf, policy: Precision = FLOAT32) -> TrainState:
    """The state before the first update, with a leading axis of members on every leaf."""

    def init(adapter: Any, traits: Traits) -> TrainState:
        return init_state(adapter, optimizer(traits.learning_rate), policy)

    return jax.jit(jax.vmap(init))(joint.adapter, joint.traits)


def many_step(
    loss_fn: LossFn,
    optimizer: OptimizerOf,
    make: Callable[..., Any] = make_step,
    batch_axes: Any = None,
) -> Callable[[TrainState, Traits, Any, Any], tuple[TrainState, StepMetrics]]:
    """The compiled update of all members: ``step(state, traits, params, batch)``.

    Args:
      loss_fn: on the joint plan.
      optimizer, batch_axes: as of `train_many`.
      make: `make_step`, with options.

    Returns:
      A function that donates the state, whose leaves have a leading axis of members, as its
      metrics have.
    """

    def one(state: TrainState, traits: Traits, params: Any, batch: Any) -> tuple[Any, Any]:
        step = make(_scaled(loss_fn, traits.scales), optimizer(traits.learning_rate))
        return step(state, params, batch)

    return jax.jit(jax.vmap(one, in_axes=(0, 0, None, batch_axes)), donate_argnums=0)


def _scaled(loss_fn: LossFn, scales: Mapping[str, jax.Array]) -> LossFn:
    """The loss of an adapter whose scales are factors of B, as the joint plan has none."""

    def scaled(adapter: Any, params: Any, batch: Any) -> LossSum:
        folded = {
            path: _scaled_entry(entry, scales[path])
            for path, entry in adapter.items()
            if path in scales
        }
        return loss_fn({**adapter, **folded}, params, batch)

    return scaled


def _scaled_entry(entry: Any, scale: jax.Array) -> Any:
    [name] = SCALED & {*entry._fields}
    array = getattr(entry, name)
    return entry._replace(**{name: array * _along_stack(scale, array)})


def _along_stack(scale: jax.Array, b: jax.Array) -> jax.Array:
    return scale.reshape(*scale.shape, *(1,) * (b.ndim - scale.ndim))


def _parted(
    adapter: Any, members: Sequence[Member], record: Sequence[StepMetrics]
) -> Iterator[Trained]:
    """Each member's own part of the joint adapter and of the metrics."""
    for number, member in enumerate(members):
        own = jax.tree.map(
            lambda leaf, first, number=number: leaf[number][corner(first)].copy(),
            adapter,
            member.adapter,
        )
        rows = [(each.loss[number], each.tokens[number], each.skipped[number]) for each in record]
        losses, tokens, skipped = np.array(rows, np.float32).reshape(-1, 3).T
        yield Trained(own, losses, tokens, skipped.astype(bool))
