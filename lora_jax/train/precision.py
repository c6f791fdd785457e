"""Precision policies, and the dynamic loss scale of float16."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.errors import InputError
from lora_jax.paths import named_leaves, nearest


@dataclass(frozen=True)
class LossScaling:
    """How float16's loss scale moves; the defaults are those of `torch.amp.GradScaler`."""

    initial: float = 2.0**16
    growth: float = 2.0
    """Factor after ``interval`` good updates in a row."""
    backoff: float = 0.5
    """Factor after an overflow."""
    interval: int = 2000
    minimum: float = 1.0
    """An overflow at this scale is a fault of the run, not of the scale."""


class LossScale(NamedTuple):
    """The scale of the loss before differentiation (float32), and good updates since it moved."""

    value: jax.Array
    good_updates: jax.Array


@dataclass(frozen=True)
class Precision:
    """Dtypes of a run. Adapter, optimizer state, gradient sums and loss are float32 always."""

    base: str
    """What the base is stored in."""
    compute: str
    """What weights, factors and activations are cast to where they are multiplied."""
    loss_scaling: LossScaling | None = None
    """For gradients that pass through float16, whose range is too small for them as they are."""

    def __post_init__(self) -> None:
        if (self.compute == "float16") != (self.loss_scaling is not None):
            raise InputError(
                f"compute={self.compute!r} with loss_scaling={self.loss_scaling}: float16 needs "
                "LossScaling(), the other dtypes need None"
            )


FLOAT32 = Precision("float32", "float32")

PRECISIONS = {
    "float32": FLOAT32,
    "bfloat16": Precision("bfloat16", "bfloat16"),
    "float16": Precision("float16", "float16", LossScaling()),
    "mixed_bfloat16": Precision("float32", "bfloat16"),
    "mixed_float16": Precision("float32", "float16", LossScaling()),
}
"""Policies by name; the mixed ones keep the base in float32 and cast it at use."""


def precision(name: str) -> Precision:
    """The policy of that name.

    Raises:
      InputError: an unknown name; the message has the nearest ones.

    >>> precision("bfloat16").compute
    'bfloat16'
    """
    if name not in PRECISIONS:
        hint = nearest(name, PRECISIONS) or list(PRECISIONS)
        raise InputError(f"no precision {name!r} (nearest: {hint})")
    return PRECISIONS[name]


def cast_floating(tree: Any, dtype: Any) -> Any:
    """A tree like ``tree`` with every floating array in ``dtype``; the others are as they were.

    >>> cast = cast_floating({"w": jnp.ones(2), "ids": jnp.arange(2)}, "bfloat16")
    >>> cast["w"].dtype, cast["ids"].dtype
    (dtype(bfloat16), dtype('int32'))
    """

    def cast(leaf: Any) -> Any:
        floating = jnp.issubdtype(getattr(leaf, "dtype", int), jnp.floating)
        return leaf.astype(dtype) if floating else leaf

    return jax.tree.map(cast, tree)


def computing_in(model_fn: Callable[..., Any], dtype: Any) -> Callable[..., Any]:
    """``model_fn`` on parameters and floating inputs cast to ``dtype``, with float32 outputs.

    For models that compute in the dtype of their parameters. Plan and adapt the returned
    function: the factors are then cast where the weights are.

    >>> model_fn = computing_in(lambda params, x: x @ params, "bfloat16")
    >>> model_fn(jnp.ones((2, 3)), jnp.ones((1, 2))).dtype
    dtype('float32')
    """

    def run(params: Any, *args: Any, **kwargs: Any) -> Any:
        params, args, kwargs = cast_floating((params, args, kwargs), dtype)
        return cast_floating(model_fn(params, *args, **kwargs), jnp.float32)

    return run


def init_loss_scale(policy: Precision) -> LossScale | None:
    """The loss scale before the first update; None where the policy has none."""
    if policy.loss_scaling is None:
        return None
    return LossScale(jnp.float32(policy.loss_scaling.initial), jnp.zeros((), jnp.int32))


def next_loss_scale(
    rule: LossScaling, scale: LossScale, good: jax.Array, overflow: jax.Array
) -> LossScale:
    """The loss scale after an update that was good, overflowed, or (neither) was left out.

    Source: `torch.amp.GradScaler.update`, with a minimum.

    >>> rule = LossScaling(interval=1)
    >>> scale = LossScale(jnp.float32(8), jnp.int32(0))
    >>> yes, no = jnp.bool_(True), jnp.bool_(False)
    >>> [float(next_loss_scale(rule, scale, *x).value) for x in ((yes, no), (no, yes), (no, no))]
    [16.0, 4.0, 8.0]
    """
    good_updates = jnp.where(overflow, 0, scale.good_updates + good)
    grows = good_updates >= rule.interval
    lower = jnp.maximum(scale.value * rule.backoff, rule.minimum)
    kept = jnp.where(grows, scale.value * rule.growth, scale.value)
    return LossScale(jnp.where(overflow, lower, kept), jnp.where(grows, 0, good_updates))


def require_float32(adapter: Any) -> None:
    """Raise one InputError that names every leaf of ``adapter`` of fewer than 32 bits."""
    narrow = [
        f"{path!r} is {leaf.dtype}"
        for path, leaf in named_leaves(adapter).items()
        if leaf.dtype not in (jnp.float32, jnp.float64)
    ]
    if narrow:
        remedy = "cast it with lora_jax.cast(adapter, 'float32')"
        raise InputError(f"an adapter trains in float32: {'; '.join(narrow)}; {remedy}")
