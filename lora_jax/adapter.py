"""The adapter: a flat dictionary ``{path: LoraPair}``, which is everything that trains."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.errors import InputError
from lora_jax.paths import named_leaves, nearest, require_known
from lora_jax.site import Plan


class LoraPair(NamedTuple):
    """The two factors of one weight's update, ΔW = scale · A B.

    ``a`` has shape ``(*stack, *in, rank)`` and ``b`` has shape ``(*stack, rank, *out)``, both
    float32, so that a linear layer reads ``x @ a @ b``.
    """

    a: jax.Array
    b: jax.Array


Adapter = dict[str, LoraPair]


def count(adapter: Adapter) -> int:
    """How many parameters the adapter holds.

    >>> count({"w": LoraPair(jnp.zeros((4, 2)), jnp.zeros((2, 6)))})
    20
    """
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(adapter))


def cast(adapter: Adapter, dtype: Any) -> Adapter:
    """The adapter with every factor in ``dtype``.

    >>> cast({"w": LoraPair(jnp.zeros((4, 2)), jnp.zeros((2, 6)))}, jnp.bfloat16)["w"].a.dtype
    dtype(bfloat16)
    """
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), adapter)


def check(adapter: Adapter, plan: Plan) -> None:
    """Raise one InputError that names every way in which ``adapter`` does not fit ``plan``."""
    problems = list(_problems(adapter, plan))
    if problems:
        raise InputError("the adapter does not fit the plan: " + "; ".join(problems))


def check_params(params: Any, plan: Plan) -> None:
    """Raise one InputError that names every leaf of ``plan`` that ``params`` holds otherwise."""
    leaves = named_leaves(params)
    require_known(plan, leaves)
    wrong = [
        f"{site.path!r} has shape {tuple(leaves[site.path].shape)}, the plan says {site.shape}"
        for site in plan.sites
        if tuple(leaves[site.path].shape) != site.shape
    ]
    if wrong:
        raise InputError("params do not fit the plan: " + "; ".join(wrong))


def _problems(adapter: Adapter, plan: Plan) -> Iterable[str]:
    for path in plan:
        if path not in adapter:
            yield f"no entry for {path!r}: make the adapter with init(key, params, plan)"
    for path, entry in adapter.items():
        if path not in plan:
            yield f"entry {path!r} is not in the plan (nearest: {nearest(path, plan) or 'none'})"
        elif not isinstance(entry, LoraPair):
            yield f"entry {path!r} is a {type(entry).__name__}, expected a LoraPair(a, b)"
        else:
            yield from _pair_problems(path, entry, plan)


def _pair_problems(path: str, pair: LoraPair, plan: Plan) -> Iterable[str]:
    site = plan[path]
    for name, expected in (("a", site.a_shape), ("b", site.b_shape)):
        factor = getattr(pair, name)
        if tuple(factor.shape) != expected:
            yield f"{path!r}: {name} has shape {tuple(factor.shape)}, the plan says {expected}"
        if not jnp.issubdtype(factor.dtype, jnp.floating):
            yield f"{path!r}: {name} is {factor.dtype}, expected a floating dtype such as float32"
