"""The optimizer: AdamW as torch computes it, clipped by the adapter's norm."""

import math
import re
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import tree_map_with_path

from lora_jax.paths import path_of
from lora_jax.train.partition import labels, partition, scale_by_kind

_NORM_OR_BIAS = re.compile(r"norm|bias|(^|/)ln_", re.IGNORECASE)


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    clip_norm: float = 1.0,
    b_ratio: float = 1.0,
    freeze: Collection[str] = (),
) -> optax.GradientTransformation:
    """AdamW with torch's defaults after clipping by the global norm, over an adapter.

    It only ever sees the adapter: that is what freezes the base. For a tree that holds both,
    wrap it in `lora_jax.train.partition.partition`.

    Args:
      learning_rate: a number, or a schedule such as `lora_jax.train.schedules.schedule` gives.
      b1, b2, eps: of Adam.
      weight_decay: decoupled; scaled by the learning rate, and not applied to norms and biases
        that are trained whole, as Hugging Face's Trainer leaves them out.
      clip_norm: largest global norm of the gradient; infinity for none.
      b_ratio: LoRA+: B's learning rate over that of everything else.
      freeze: kinds of factor that don't train and get no moments; ``("a",)`` is LoRA-FA. See
        `lora_jax.train.partition.stop_gradients` for the gradients that they then don't need.

    Raises:
      InputError: an unknown kind in ``freeze``.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101;
    `torch.optim.AdamW`. LoRA+: Hayou et al., arXiv:2402.12354. LoRA-FA: arXiv:2308.03303.

    >>> tx = adamw(0.1, weight_decay=0.0)
    >>> adapter = {"w": jnp.ones(2)}
    >>> updates, _ = tx.update(adapter, tx.init(adapter), adapter)
    >>> [round(x, 4) for x in updates["w"].tolist()]
    [-0.1, -0.1]
    """
    tx = optax.chain(
        clip_by_global_norm(clip_norm),
        scale_by_adam(b1, b2, eps),
        optax.add_decayed_weights(weight_decay, mask=decays),
        scale_by_kind({"b": b_ratio}),
        optax.scale_by_learning_rate(learning_rate),
    )
    return partition(tx, freeze) if freeze else tx


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """m̂ / (√v̂ + eps), with m̂ = m / (1 - b1ᵗ) and v̂ = v / (1 - b2ᵗ) to float32's last bits.

    `optax.scale_by_adam` takes 1 - b2ᵗ as a difference of float32 numbers: with 0.999 it is off by
    1.3e-5 for hundreds of updates, where torch computes in float64. Its state is the same.

    Source: Kingma and Ba, "Adam", arXiv:1412.6980; `torch.optim.AdamW`.

    >>> tx = scale_by_adam(0.9, 0.999, 0.0)
    >>> float(tx.update(jnp.float32(3), tx.init(jnp.float32(0)))[0])
    1.0
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        count = state.count + 1
        first, second = _one_minus_power(b1, count), _one_minus_power(b2, count)
        scaled = jax.tree.map(lambda m, v: (m / first) / (jnp.sqrt(v / second) + eps), mu, nu)
        return scaled, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(optax.scale_by_adam(b1, b2, eps).init, update)


def _one_minus_power(base: float, count: jax.Array) -> jax.Array:
    """1 - baseᵗ, the logarithm in float64."""
    return -jnp.expm1(count * (math.log(base) if base else -math.inf))


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Multiply the gradients by ``min(1, limit / (norm + 1e-6))``.

    Source: `torch.nn.utils.clip_grad_norm_`, whose 1e-6 optax's clipping does not have.

    >>> tx = clip_by_global_norm(1.0)
    >>> [round(x, 4) for x in tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))[0].tolist()]
    [0.6, 0.8]
    """

    def clip(updates: Any, params: Any = None) -> Any:
        factor = jnp.minimum(1.0, limit / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda leaf: leaf * factor, updates)

    return optax.stateless(clip)


def decays(adapter: Any) -> Any:
    """A tree of booleans like ``adapter``: which leaves weight decay applies to.

    All but norms and biases that are trained whole, which are known by their paths.

    >>> from lora_jax.adapter import Full, LoraPair
    >>> decays({"q/bias": Full(1.0), "head/kernel": Full(1.0), "norm_proj": LoraPair(1.0, 1.0)})
    {'head/kernel': Full(value=True), 'norm_proj': LoraPair(a=True, b=True), \
'q/bias': Full(value=False)}
    """

    def applies(keys: Any, kind: str) -> bool:
        return kind != "full" or not _NORM_OR_BIAS.search(path_of(keys))

    return tree_map_with_path(applies, labels(adapter))
