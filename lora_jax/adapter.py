"""The adapter: a flat dictionary ``{path: entry}``, which is everything that trains."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.errors import InputError
from lora_jax.paths import named_leaves, nearest, require_known
from lora_jax.site import Plan, Site


class LoraPair(NamedTuple):
    """The two factors of one weight's update, ΔW = scale · A B.

    ``a`` has shape ``(*stack, *in, rank)`` and ``b`` has shape ``(*stack, rank, *out)``, both
    float32, so that a linear layer reads ``x @ a @ b``.
    """

    a: jax.Array
    b: jax.Array


class DoraTriple(NamedTuple):
    """LoRA's factors and the magnitude of each output: W' = m · (W + ΔW) / ‖W + ΔW‖.

    ``m`` has shape ``(*stack, *out)``, float32; the norm is over the input axes.
    """

    a: jax.Array
    b: jax.Array
    m: jax.Array


class Full(NamedTuple):
    """A leaf that is trained whole, in float32 and in its own shape; cast to its dtype at use."""

    value: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """Rows of a matrix that are trained, as of new tokens; the others stay the base's.

    ``indices`` along the first axis are static, ``rows`` has shape ``(len(indices), features)``,
    float32.
    """

    indices: tuple[int, ...] = field(metadata={"static": True})
    rows: jax.Array


class Bias(NamedTuple):
    """An update of a bias: W' = W + scale · bias, in the leaf's own shape, float32.

    It is what a bias on B adds to a layer's output, as PEFT's ``lora_bias`` has it.
    """

    bias: jax.Array


Entry = LoraPair | DoraTriple | Full | Rows | Bias
Adapter = dict[str, Entry]

ENTRIES: dict[str, type] = {
    "lora": LoraPair,
    "dora": DoraTriple,
    "full": Full,
    "rows": Rows,
    "bias": Bias,
}
"""The type of an adapter's entry, by the site's variant."""


def entry_of(site: Site, arrays: dict[str, Any]) -> Any:
    """The site's entry from its arrays by name."""
    static = {"indices": site.rows} if site.variant == "rows" else {}
    return ENTRIES[site.variant](**static, **arrays)


def shapes_of(plan: Plan) -> dict[str, Any]:
    """The adapter that belongs to ``plan``, as shapes: float32, nothing allocated.

    >>> site = Site("w", (4, 6), "float32", ("in", "out"), rank=2, scale=1.0)
    >>> shapes_of(Plan((site,), 24))["w"].b.shape
    (2, 6)
    """

    def entry(site: Site) -> Any:
        shapes = site.entry_shapes.items()
        return entry_of(site, {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes})

    return {site.path: entry(site) for site in plan.sites}


def count(adapter: Adapter) -> int:
    """How many numbers the adapter's arrays hold.

    >>> count({"w": LoraPair(jnp.zeros((4, 2)), jnp.zeros((2, 6)))})
    20
    """
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(adapter))


def cast(adapter: Adapter, dtype: Any) -> Adapter:
    """The adapter with every array in ``dtype``.

    >>> cast({"w": LoraPair(jnp.zeros((4, 2)), jnp.zeros((2, 6)))}, jnp.bfloat16)["w"].a.dtype
    dtype(bfloat16)
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(f"an adapter can't be {dtype}: give a floating dtype, such as float32")
    return jax.tree.map(lambda leaf: jnp.array(leaf, dtype), adapter)


def check(adapter: Adapter, plan: Plan) -> None:
    """Raise one InputError that names every way in which ``adapter`` does not fit ``plan``."""
    require_plan(plan)
    if not isinstance(adapter, dict):
        raise InputError(
            f"the adapter is a {type(adapter).__name__}, expected {{path: entry}}: make it with "
            "init(key, params, plan)"
        )
    problems = list(_problems(adapter, plan))
    if problems:
        raise InputError("the adapter does not fit the plan: " + "; ".join(problems))


def check_params(params: Any, plan: Plan) -> None:
    """Raise one InputError that names every leaf of ``plan`` that ``params`` holds otherwise."""
    require_plan(plan)
    leaves = named_leaves(params)
    require_known(plan, leaves)
    wrong = [
        f"{site.path!r} is {found}, the plan says {expected}"
        for site in plan.sites
        if (found := _kind(leaves[site.path])) != (expected := f"{site.dtype}{list(site.shape)}")
    ]
    if wrong:
        raise InputError(
            f"params do not fit the plan: {'; '.join(wrong)}; plan with the params that are used"
        )


def dtype_name(leaf: Any) -> str:
    """The dtype that JAX computes in for the leaf, as a word; extended ones (random keys) too."""
    extended = jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    return str(leaf.dtype if extended else jax.dtypes.canonicalize_dtype(leaf.dtype))


def require_plan(plan: Any) -> None:
    """Raise an InputError for anything that is not a Plan."""
    if not isinstance(plan, Plan):
        raise InputError(
            f"the plan is a {type(plan).__name__}: make it with plan(model_fn, params, ..., config)"
        )


def _kind(leaf: Any) -> str:
    dtype = dtype_name(leaf) if hasattr(leaf, "dtype") else type(leaf).__name__
    return f"{dtype}{list(getattr(leaf, 'shape', ()))}"


def _problems(adapter: Adapter, plan: Plan) -> Iterable[str]:
    for path in plan:
        if path not in adapter:
            yield f"no entry for {path!r}: make the adapter with init(key, params, plan)"
    for path, entry in adapter.items():
        if path not in plan:
            near = ", ".join(nearest(path, plan)) or "none"
            yield f"entry {path!r} is not in the plan (nearest: {near})"
        elif not isinstance(entry, expected := ENTRIES[plan[path].variant]):
            fields = ", ".join(plan[path].entry_shapes)
            kind = type(entry).__name__
            yield f"entry {path!r} is a {kind}, expected a {expected.__name__}({fields})"
        else:
            yield from _entry_problems(entry, plan[path])


def _entry_problems(entry: Entry, site: Site) -> Iterable[str]:
    for name, expected in site.entry_shapes.items():
        array = getattr(entry, name)
        if not hasattr(array, "dtype"):
            yield f"{site.path!r}: {name} is a {type(array).__name__}, expected an array"
            continue
        if tuple(array.shape) != expected:
            yield f"{site.path!r}: {name} has shape {tuple(array.shape)}, the plan says {expected}"
        if not jnp.issubdtype(array.dtype, jnp.floating):
            yield (
                f"{site.path!r}: {name} is {array.dtype}, expected a floating dtype such as float32"
            )
    if isinstance(entry, Rows) and entry.indices != site.rows:
        yield f"{site.path!r} trains rows {entry.indices}, the plan says {site.rows}"
