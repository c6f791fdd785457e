"""The maths of one weight, for each variant of an entry: its effective value and its factors."""

import math
from collections.abc import Callable
from string import ascii_letters
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.adapter import Bias, DoraTriple, Full, LoraPair, Rows
from lora_jax.errors import InputError
from lora_jax.site import ROLES, Site


class Factors(NamedTuple):
    """A weight's update without the weight: W' = magnitude · (W + scale · A B).

    ``a`` (\\*stack, \\*in, rank), ``b`` (\\*stack, rank, \\*out); ``magnitude`` (\\*stack, \\*out)
    rescales each output; ``replaced`` (first axis,) says of which rows W itself counts for nothing.
    """

    a: jax.Array
    b: jax.Array
    scale: float
    magnitude: jax.Array | None = None
    replaced: jax.Array | None = None


def delta_weight(site: Site, pair: LoraPair | DoraTriple) -> jax.Array:
    """ΔW = scale · A B, in the axes of the weight and at least in float32.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.

    Args:
      site: the weight's shape, axis roles and scale.
      pair: ``a`` (\\*stack, \\*in, rank) and ``b`` (\\*stack, rank, \\*out).

    Returns:
      An array of ``site.shape``.

    >>> site = Site("w", (2, 3), "float32", ("out", "in"), rank=1, scale=2.0)
    >>> pair = LoraPair(jnp.array([[1.0], [2.0], [3.0]]), jnp.array([[1.0, 10.0]]))
    >>> delta_weight(site, pair)
    Array([[ 2.,  4.,  6.],
           [20., 40., 60.]], dtype=float32)
    """
    stack, inputs, outputs = (site.dims(role) for role in ROLES)
    a = at_least_float32(pair.a).reshape(*stack, math.prod(inputs), site.rank)
    b, scale = _b_and_scale(site, at_least_float32(pair.b))
    product = a @ b.reshape(*stack, site.rank, math.prod(outputs)) * scale
    grouped = [axis for role in ROLES for axis in site.axes(role)]
    return product.reshape(*stack, *inputs, *outputs).transpose(_inverse(grouped))


def effective_weight(site: Site, weight: jax.Array, entry: Any) -> jax.Array:
    """The weight with its entry folded in, in float32 (or wider) and rounded once to its dtype."""
    return exact_weight(site, weight, entry).astype(weight.dtype)


def exact_weight(site: Site, weight: jax.Array, entry: Any) -> jax.Array:
    """The weight with its entry folded in, in float32 (or wider)."""
    return _EXACT[site.variant](site, at_least_float32(weight), entry)


def factors_of(site: Site, weight: jax.Array, entry: Any) -> Factors:
    """The entry as factors in the weight's own axes; not for ``full`` and ``bias``, which have
    none."""
    return _FACTORS[site.variant](site, weight, entry)


def magnitude_norm(site: Site, weight: jax.Array, pair: LoraPair | DoraTriple) -> jax.Array:
    """‖W + ΔW‖ over the input axes, (\\*stack, \\*out), without forming W + ΔW.

    From ‖W‖² + 2·scale·⟨AᵀW, B⟩ + scale²·⟨AᵀA·B, B⟩, each bracket a sum over the rank axis: the
    products are of rank's size, and W is only read.

    Source: the norm of Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation",
    arXiv:2402.09353, equation 5, expanded.
    """
    axes = dict(enumerate(ascii_letters))
    of_weight = "".join(axes[k] for k in range(len(site.shape)))
    stack, inputs, outputs = ("".join(axes[k] for k in site.axes(role)) for role in ROLES)
    hidden, kept = f"{stack}z{outputs}", f"{stack}{outputs}"
    b, scale = _b_and_scale(site, at_least_float32(pair.b))
    wide = {"preferred_element_type": b.dtype, "precision": lax.Precision.HIGHEST}
    own = jnp.sum(jnp.square(at_least_float32(weight)), axis=site.axes("in"))
    own = jnp.einsum(f"{of_weight.translate(_without(inputs))}->{kept}", own)
    a_in_weights_dtype = pair.a.astype(weight.dtype)
    a_w = jnp.einsum(f"{of_weight},{stack}{inputs}z->{hidden}", weight, a_in_weights_dtype, **wide)
    gram = jnp.einsum(f"{stack}{inputs}z,{stack}{inputs}y->{stack}zy", pair.a, pair.a, **wide)
    gram_b = jnp.einsum(f"{stack}zy,{stack}y{outputs}->{hidden}", gram, b, **wide)
    mixed = (2 * scale * a_w + scale**2 * gram_b) * b
    return jnp.sqrt(jnp.maximum(own + mixed.sum(axis=len(stack)), 0))


def scaled_bias(site: Site, entry: Bias) -> jax.Array:
    """scale · bias, at least in float32; a scale that differs along the stack is one a layer."""
    bias, scale = _b_and_scale(site, at_least_float32(entry.bias))
    return bias * scale


def at_least_float32(array: jax.Array) -> jax.Array:
    """The array in float32, or as it is where its dtype is wider."""
    return in_dtype(array, jnp.promote_types(array.dtype, jnp.float32))


def in_dtype(array: jax.Array, dtype: Any) -> jax.Array:
    """The array in ``dtype``; the same object where it is already, which keeps tracing quick."""
    return array if array.dtype == dtype else lax.convert_element_type(array, dtype)


def values_of(site: Site, leaf: Any) -> jax.Array:
    """The leaf as an array; an InputError where only its shape is known."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise InputError(
            f"{site.path!r} is a shape without values, which variant {site.variant!r} starts "
            "from: give params, not their shapes"
        )
    return jnp.asarray(leaf)


def _exact_lora(site: Site, weight: jax.Array, pair: LoraPair) -> jax.Array:
    return weight + delta_weight(site, pair)


def _exact_dora(site: Site, weight: jax.Array, entry: DoraTriple) -> jax.Array:
    total = weight + delta_weight(site, entry)
    norm = jnp.sqrt(jnp.sum(jnp.square(lax.stop_gradient(total)), site.axes("in"), keepdims=True))
    order = [*site.axes("stack"), *site.axes("out")]
    m = jnp.expand_dims(entry.m.transpose(_inverse(order)), site.axes("in"))
    return total * _ratio(m, norm)


def _exact_full(site: Site, weight: jax.Array, entry: Full) -> jax.Array:
    return in_dtype(entry.value, weight.dtype)


def _exact_rows(site: Site, weight: jax.Array, entry: Rows) -> jax.Array:
    return weight.at[jnp.array(entry.indices)].set(in_dtype(entry.rows, weight.dtype))


def _exact_bias(site: Site, weight: jax.Array, entry: Bias) -> jax.Array:
    return weight + scaled_bias(site, entry)


def _lora_factors(site: Site, weight: jax.Array, entry: LoraPair) -> Factors:
    b, scale = _b_and_scale(site, entry.b)
    return Factors(entry.a, b, scale)


def _dora_factors(site: Site, weight: jax.Array, entry: DoraTriple) -> Factors:
    norm = magnitude_norm(site, *lax.stop_gradient((weight, entry)))
    return _lora_factors(site, weight, LoraPair(entry.a, entry.b))._replace(
        magnitude=_ratio(entry.m, norm)
    )


def _row_factors(site: Site, weight: jax.Array, entry: Rows) -> Factors:
    """Replacing rows is an update of W without them: one factor picks, the other is they."""
    rows = at_least_float32(entry.rows)
    one_hot = jax.nn.one_hot(jnp.array(entry.indices), site.shape[0], dtype=rows.dtype)
    a_and_b = (one_hot.T, rows) if site.roles[0] == "in" else (rows.T, one_hot)
    return Factors(*a_and_b, 1.0, replaced=one_hot.any(axis=0))


_EXACT: dict[str, Callable[[Site, jax.Array, Any], jax.Array]] = {
    "lora": _exact_lora,
    "dora": _exact_dora,
    "full": _exact_full,
    "rows": _exact_rows,
    "bias": _exact_bias,
}

_FACTORS: dict[str, Callable[[Site, jax.Array, Any], Factors]] = {
    "lora": _lora_factors,
    "dora": _dora_factors,
    "rows": _row_factors,
}


def _b_and_scale(site: Site, b: jax.Array) -> tuple[jax.Array, float]:
    """B (or a bias) and the scale; one that differs along the stack is folded into it."""
    if isinstance(site.scale, tuple):
        along_stack = jnp.array(site.scale, b.dtype)
        return b * along_stack.reshape(-1, *(1,) * (b.ndim - 1)), 1.0
    return b, site.scale


def _ratio(m: jax.Array, norm: jax.Array) -> jax.Array:
    """m / norm; where the norm is zero so is the weight, and any factor will do."""
    return m / jnp.where(norm == 0, 1, norm)


def _without(letters: str) -> dict[int, None]:
    return dict.fromkeys(map(ord, letters))


def _inverse(permutation: list[int]) -> list[int]:
    return sorted(range(len(permutation)), key=permutation.__getitem__)
