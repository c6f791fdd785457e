"""Which leaves of a tree belong to an adapter, and optimizers that treat them by kind of factor."""

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.tree_util import tree_map_with_path

from lora_jax.errors import InputError

BASE = "base"
"""The label of every leaf outside an adapter's entries."""

_ENTRIES = {("a", "b"), ("a", "b", "m"), ("value",), ("indices", "rows"), ("bias",)}
_RENAMED = {"value": "full"}
KINDS = ("a", "b", "m", "full", "rows", "bias")
"""The labels inside an adapter's entries."""


def labels(tree: Any) -> Any:
    """A tree like ``tree`` with the kind of each leaf in its place.

    Leaves of an adapter's entries get the name of their field: ``a`` and ``b`` (the low-rank
    factors), ``m`` (DoRA's magnitude), ``rows`` (trained rows of a matrix), ``bias`` (the
    update of a bias), and ``full`` for the value of a leaf that is trained whole. All other leaves
    get ``base``. Entries are known by their fields, wherever in the tree they stand.

    >>> from lora_jax.adapter import LoraPair
    >>> labels({"params": {"w": 1.0}, "adapter": {"w": LoraPair(2.0, 3.0)}})
    {'adapter': {'w': LoraPair(a='a', b='b')}, 'params': {'w': 'base'}}
    """
    return jax.tree.map(_labels_of_node, tree, is_leaf=_is_entry)


def partition(
    tx: optax.GradientTransformation, freeze: Collection[str] = ()
) -> optax.GradientTransformation:
    """``tx`` on the adapter's leaves of a tree that holds more than the adapter.

    For scripts that keep base and adapter in one tree. ``tx`` sees the adapter alone, so its
    state and its global norm are the adapter's; every other leaf keeps its bytes, whatever the
    gradient and the weight decay.

    Args:
      tx: the optimizer of what trains.
      freeze: kinds of factor that don't train either, such as ``("a",)`` for LoRA-FA.

    Raises:
      InputError: an unknown kind; at ``init``, a tree in which nothing is left to train.

    >>> from lora_jax.adapter import LoraPair
    >>> tree = {"w": jnp.ones(2), "lora": {"w": LoraPair(jnp.ones(2), jnp.ones(2))}}
    >>> tx = partition(optax.sgd(0.5))
    >>> updates, _ = tx.update(tree, tx.init(tree))
    >>> moved = optax.apply_updates(tree, updates)
    >>> moved["w"].tolist(), moved["lora"]["w"].b.tolist()
    ([1.0, 1.0], [0.5, 0.5])
    """
    frozen = {BASE, *_known(freeze)}

    def groups(tree: Any) -> Any:
        return jax.tree.map(lambda kind: "freeze" if kind in frozen else "train", labels(tree))

    parted = optax.partition({"train": tx, "freeze": _leave_unchanged()}, groups)

    def init(params: Any) -> optax.OptState:
        if "train" not in jax.tree.leaves(groups(params)):
            found = sorted(set(jax.tree.leaves(labels(params))))
            raise InputError(
                f"nothing to train: the tree has leaves of kind {found}, of which "
                f"{sorted(frozen)} are frozen; pass a tree that holds an adapter"
            )
        return parted.init(params)

    return optax.GradientTransformation(init, parted.update)  # pyright: ignore[reportArgumentType]


def stop_gradients(loss_fn: Callable[..., Any], freeze: Collection[str]) -> Callable[..., Any]:
    """``loss_fn(adapter, ...)`` without gradients for some kinds of factor.

    Their gradients are zero and cost nothing: with A frozen, the product that makes A's gradient
    and the activations kept for it are gone (LoRA-FA). Give the optimizer the same ``freeze``.

    Source: Zhang et al., "LoRA-FA", arXiv:2308.03303.

    >>> from lora_jax.adapter import LoraPair
    >>> held = stop_gradients(lambda adapter: adapter["w"].a * adapter["w"].b, ("a",))
    >>> jax.tree.map(float, jax.grad(held)({"w": LoraPair(2.0, 3.0)}))
    {'w': LoraPair(a=0.0, b=2.0)}
    """
    frozen = set(_known(freeze))

    def held(adapter: Any, *args: Any) -> Any:
        def hold(leaf: Any, kind: str) -> Any:
            return lax.stop_gradient(leaf) if kind in frozen else leaf

        return loss_fn(jax.tree.map(hold, adapter, labels(adapter)), *args)

    return held


def scale_by_kind(factors: dict[str, float]) -> optax.GradientTransformation:
    """Multiply the updates of some kinds of factor, as by LoRA+'s ratio for B.

    >>> from lora_jax.adapter import LoraPair
    >>> tx = scale_by_kind({"b": 16.0})
    >>> tx.update({"w": LoraPair(2.0, 3.0)}, tx.init({}))[0]
    {'w': LoraPair(a=2.0, b=48.0)}
    """
    _known(factors)

    def scale(updates: Any, params: Any = None) -> Any:
        return jax.tree.map(
            lambda update, kind: update * factors.get(kind, 1.0), updates, labels(updates)
        )

    return optax.stateless(scale)


def _is_entry(node: Any) -> bool:
    # The fields of a named tuple and of a dataclass alike.
    return getattr(type(node), "__match_args__", None) in _ENTRIES


def _labels_of_node(node: Any) -> Any:
    if not _is_entry(node):
        return BASE
    return tree_map_with_path(lambda keys, _: _RENAMED.get(keys[0].name, keys[0].name), node)


def _leave_unchanged() -> optax.GradientTransformation:
    # x + 0 turns -0 into 0; x + (-0) is x for every x.
    return optax.stateless(
        lambda updates, params: jax.tree.map(lambda leaf: jnp.full_like(leaf, -0.0), updates)
    )


def _known(kinds: Collection[str]) -> Collection[str]:
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise InputError(f"no such kind of factor: {unknown}; the kinds are {', '.join(KINDS)}")
    return kinds
