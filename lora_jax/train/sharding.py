"""PartitionSpecs for the base, the adapter and the optimizer's state, decided on shapes alone.

The base follows `Rule`s over leaf paths, the adapter follows the base, and the optimizer's state
follows the adapter:

>>> import jax, jax.numpy as jnp, optax
>>> import lora_jax as lora
>>> params = {"q_proj": {"kernel": jax.ShapeDtypeStruct((64, 32), jnp.float32)}}
>>> config = lora.LoraConfig(rank=4, targets=".*kernel")
>>> plan = lora.plan_from_axes(params, config, {".*": "in out"})
>>> adapter = lora.init(jax.random.key(0), params, plan)
>>> base = param_specs(params, {"data": 2, "fsdp": 2, "tensor": 2})
>>> factors = adapter_specs(adapter, plan, base)
>>> moments = state_specs(optax.adam(1e-3).init(adapter), adapter, factors)[0].mu
>>> [[tuple(spec) for spec in jax.tree.leaves(tree)] for tree in (base, factors, moments)]
[[('fsdp', 'tensor')], [('fsdp',), (None, 'tensor')], [('fsdp',), (None, 'tensor')]]
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
from jax.sharding import PartitionSpec
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path

from lora_jax.paths import named_leaves, replace_leaves
from lora_jax.train.sharding_rules import Axes, AxisSizes, Rule, leaf_shardings, trimmed


class Roles(Protocol):
    """What has to be known of an adapted weight: which of its axes play a role."""

    def axes(self, role: Any) -> tuple[int, ...]:
        """The axes that are ``stack``, ``in`` or ``out``, in order."""
        ...


def param_specs(params: Any, sizes: AxisSizes, rules: Sequence[Rule] = ()) -> Any:
    """A tree like ``params`` of PartitionSpecs; arguments and errors as of `leaf_shardings`."""
    decided = leaf_shardings(params, sizes, rules)
    return replace_leaves(params, {path: leaf.spec for path, leaf in decided.items()})


def adapter_specs(adapter: Any, plan: Mapping[str, Roles], base_specs: Any) -> Any:
    """A tree like ``adapter`` of PartitionSpecs, each from its weight's.

    What splits an axis of W splits the same axis of its factors: A has the ``in`` axes, B and
    DoRA's magnitude the ``out`` axes, all of them the ``stack`` axes. The rank is not split.

    Args:
      adapter: ``{path: entry}``, as arrays or shapes.
      plan: ``{path: site}``.
      base_specs: from `param_specs`.
    """
    weights = named_leaves(base_specs)

    def spec(keys: tuple[Any, ...], factor: Any) -> PartitionSpec:
        path, name = keys[0].key, keys[-1].name
        return trimmed(_FACTOR_AXES[name](plan[path], dict(enumerate(weights[path]))))

    return tree_map_with_path(spec, adapter)


def state_specs(state: Any, adapter: Any, specs: Any) -> Any:
    """A tree like ``state`` of PartitionSpecs.

    A leaf whose path ends like a factor's and that has its shape lies like it, as an optimizer's
    moments do; any other leaf is replicated.

    Args:
      state: a tree that holds trees like the adapter, as arrays or shapes.
      adapter: ``{path: entry}``, as arrays or shapes.
      specs: from `adapter_specs`.
    """
    factors, each = tree_leaves_with_path(adapter), jax.tree.leaves(specs)
    known = {
        (keystr(keys), tuple(factor.shape)): spec
        for (keys, factor), spec in zip(factors, each, strict=True)
    }

    def spec(keys: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        ends = ((keystr(keys[start:]), tuple(leaf.shape)) for start in range(len(keys)))
        return next((known[end] for end in ends if end in known), PartitionSpec())

    return tree_map_with_path(spec, state)


def _of_role(site: Roles, weight: Mapping[int, Axes], role: str) -> list[Axes]:
    return [weight.get(axis) for axis in site.axes(role)]


def _a(site: Roles, weight: Mapping[int, Axes]) -> list[Axes]:
    return [*_of_role(site, weight, "stack"), *_of_role(site, weight, "in"), None]


def _b(site: Roles, weight: Mapping[int, Axes]) -> list[Axes]:
    return [*_of_role(site, weight, "stack"), None, *_of_role(site, weight, "out")]


def _magnitude(site: Roles, weight: Mapping[int, Axes]) -> list[Axes]:
    return [*_of_role(site, weight, "stack"), *_of_role(site, weight, "out")]


def _whole(site: Roles, weight: Mapping[int, Axes]) -> list[Axes]:
    return list(weight.values())


def _rows(site: Roles, weight: Mapping[int, Axes]) -> list[Axes]:
    return [None, *[axes for axis, axes in weight.items() if axis]]


_FACTOR_AXES: dict[str, Callable[[Roles, Mapping[int, Axes]], list[Axes]]] = {
    "a": _a,
    "b": _b,
    "m": _magnitude,
    "value": _whole,
    "rows": _rows,
    "bias": _whole,
}
"""By an array's name in its entry: the mesh axes of each of its axes."""
