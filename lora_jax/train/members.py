"""Adapters that are trained together, side by side in arrays with a leading axis of members.

What tells members apart is data: first values, learning rate, scale, and a smaller rank, which is
zeros in A and B beyond it. Such zeros get gradients of exactly zero, each a product with the
other factor's zeros; so they stay zero, and count in no norm.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax.errors import InputError

SCALED = frozenset(("b", "bias"))
"""The arrays of an entry that stand for their product with the scale."""


class Member(NamedTuple):
    """One of the adapters that are trained together."""

    plan: Any
    """Its own `Plan`, ``{path: site}``; members may differ in rank, scale and how A starts."""
    adapter: Any
    """Its first values, as `lora_jax.init` gives them for its plan."""
    learning_rate: float


class Traits(NamedTuple):
    """What a member's update depends on beside its state; a leading axis of members."""

    learning_rate: Any
    """(N,) float32."""
    scales: dict[str, Any]
    """Of each site with A and B, or with an update of a bias: (N,), or (N, stack) where it differs
    along the stack."""


class Joint(NamedTuple):
    """Members side by side, on one plan that fits them all."""

    plan: Any
    """Of the largest rank at each site, and scale 1: the scales are in ``traits``."""
    adapter: Any
    """With a leading axis of members on every leaf, zeros beyond a member's rank."""
    traits: Traits


def join(members: Sequence[Member]) -> Joint:
    """Members side by side, with what tells them apart as data; errors as of `train_many`."""
    _require_alike(members)
    plans = [member.plan for member in members]
    sites = {path: [plan[path] for plan in plans] for path in plans[0]}
    plan = replace(plans[0], sites=tuple(map(_common_site, sites.values())))
    scales = {
        path: _scales(each) for path, each in sites.items() if SCALED & {*each[0].entry_shapes}
    }
    rates = np.array([member.learning_rate for member in members], np.float32)
    adapters = jax.device_get([member.adapter for member in members])
    return Joint(plan, jax.tree.map(_stacked, *adapters), Traits(rates, scales))


def _common_site(sites: Sequence[Any]) -> Any:
    return replace(sites[0], rank=max(site.rank for site in sites), scale=1.0, ranks=())


def _scales(sites: Sequence[Any]) -> np.ndarray:
    each = np.broadcast_arrays(*(np.asarray(site.scale, np.float32) for site in sites))
    return np.stack(each)


def _stacked(*leaves: np.ndarray) -> np.ndarray:
    """The leaves along a new first axis, with zeros behind those that are smaller."""
    shape = np.max([leaf.shape for leaf in leaves], axis=0)
    stacked = np.zeros((len(leaves), *shape), leaves[0].dtype)
    for row, leaf in zip(stacked, leaves, strict=True):
        row[corner(leaf)] = leaf
    return stacked


def corner(leaf: Any) -> tuple[slice, ...]:
    """Where a leaf stands in one that was filled up."""
    return tuple(map(slice, np.shape(leaf)))


def _require_alike(members: Sequence[Member]) -> None:
    if not members:
        raise InputError("there are no members to train: give at least one")
    problems = [
        f"member {number}: {problem}"
        for number, member in enumerate(members)
        for problem in _problems(member, members[0].plan)
    ]
    if problems:
        raise InputError(
            "members can't be trained together: " + "; ".join(problems) + "; plan them for one "
            "model, with equal targets, variants and dropout, and init each with its own plan"
        )


def _problems(member: Member, first: Mapping[str, Any]) -> Iterator[str]:
    plan, adapter = member.plan, member.adapter
    for path in sorted({*plan} ^ {*first}):
        yield f"{path!r} is adapted {'here' if path in plan else 'by member 0'} alone"
    for path in [path for path in plan if path in first]:
        if _kind(plan[path]) != _kind(first[path]):
            yield f"{path!r} is {_kind(plan[path])}, of member 0 {_kind(first[path])}"
    for path in plan:
        found, planned = _shapes(adapter.get(path), plan[path]), plan[path].entry_shapes
        if found != planned:
            yield f"the adapter has {found} at {path!r}, the plan says {planned}"
    for path in sorted({*adapter} - {*plan}):
        yield f"the adapter has {path!r}, the plan has not"


def _kind(site: Any) -> dict[str, Any]:
    """What members share of a site."""
    shared = "shape", "dtype", "roles", "variant", "rows", "dropout"
    return {name: getattr(site, name) for name in shared}


def _shapes(entry: Any, site: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the entry's arrays by name; empty where there is no such entry."""
    arrays = {name: getattr(entry, name, None) for name in site.entry_shapes}
    return {name: np.shape(array) for name, array in arrays.items() if array is not None}
