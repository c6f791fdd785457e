"""The symbolic weight: a base weight on its way to an activation, with its two factors beside it.

Each axis of the weight's current view has a label, and each factor is an array whose axes carry
labels too. A label in both factors is a stack axis, one in ``a`` alone an input axis, one in
``b`` alone an output axis. Transposing the view therefore touches no factor, slicing an axis
slices whichever factor carries its label, and no rule has to keep roles and shapes in step.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.site import Site
from lora_jax.variants import Factors, at_least_float32

RANK = -1
"""The label of the rank axis."""

FACTORS = ("a", "b", "magnitude", "replaced")
"""The arrays that go with a weight's value; each axis of theirs has a label."""


class NotLowRank(Exception):
    """The operation can't be done on the factors: W + ΔW has to be formed here."""


class RolesContradict(NotLowRank):
    """The operation contracts other axes than another use of the weight, or the user, said."""


class Axis(NamedTuple):
    """One axis of a weight's view."""

    label: int
    base: frozenset[tuple[str, int]]
    """Leaf and axis of the base weights it is made of; empty for an axis made on the way."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Factor:
    """A or B: an array whose axes are labelled."""

    array: jax.Array
    labels: tuple[int, ...] = field(metadata={"static": True})

    def grouped(self, *groups: Iterable[int]) -> jax.Array:
        """The array with its axes ordered as ``groups``, each group flattened to one axis."""
        groups = tuple(tuple(group) for group in groups)
        order = [label for group in groups for label in group]
        transposed = lax.transpose(self.array, [self.labels.index(label) for label in order])
        return lax.reshape(transposed, [self.size(group) for group in groups])

    def size(self, group: Iterable[int]) -> int:
        """The product of the sizes of the axes with the given labels."""
        return math.prod(self.array.shape[self.labels.index(label)] for label in group)

    def along(self, label: int, operation: Callable[[jax.Array, int], jax.Array]) -> "Factor":
        """Apply ``operation(array, axis)`` to the axis of that label, where there is one."""
        if label not in self.labels:
            return self
        return replace(self, array=operation(self.array, self.labels.index(label)))

    def without(self, label: int) -> "Factor":
        """Drop the axis of that label, of size 1, where there is one."""
        if label not in self.labels:
            return self
        axis = self.labels.index(label)
        return Factor(lax.squeeze(self.array, (axis,)), _dropped(self.labels, label))

    def with_unit(self, label: int) -> "Factor":
        """Add a leading axis of size 1."""
        return Factor(lax.expand_dims(self.array, (0,)), (label, *self.labels))

    def leading(self, label: int) -> "Factor":
        """Move the axis of that label to the front."""
        labels = (label, *_dropped(self.labels, label))
        return Factor(self.grouped(*((each,) for each in labels)), labels)

    def over(self, labels: Sequence[int]) -> jax.Array:
        """The array with one axis for each of ``labels``, of size 1 where it has none."""
        ordered = self.grouped(*((label,) for label in labels if label in self.labels))
        missing = [k for k, label in enumerate(labels) if label not in self.labels]
        return lax.expand_dims(ordered, missing)

    def regrouped(self, old: Sequence[int], new: Sequence[int], sizes: list[int]) -> "Factor":
        """Reshape the axes ``old`` into axes ``new`` of the given sizes, where it has them."""
        if not set(old) <= set(self.labels):
            return self
        rest = [label for label in self.labels if label not in old]
        moved = self.grouped(old, *((label,) for label in rest))
        return Factor(moved.reshape(*sizes, *moved.shape[1:]), (*new, *rest))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Weight:
    """A view of an adapted weight; the factors are ``None`` while roles are being found out."""

    site: Site = field(metadata={"static": True})
    axes: tuple[Axis, ...] = field(metadata={"static": True})
    value: jax.Array
    a: Factor | None = None
    b: Factor | None = None
    magnitude: Factor | None = None
    """DoRA's m / ‖W + ΔW‖, over stack and output axes; None elsewhere."""
    replaced: Factor | None = None
    """Which entries of an axis are replaced: there the base counts for nothing. None elsewhere."""
    scale: float = field(default=1.0, metadata={"static": True})
    others: tuple[str, ...] = field(default=(), metadata={"static": True})
    """Paths of the leaves that are stacked with the site's own."""

    @property
    def labels(self) -> tuple[int, ...]:
        """The labels of the view's axes, in order."""
        return tuple(axis.label for axis in self.axes)

    def factors(self) -> tuple[Factor, Factor]:
        """A and B, once the roles are known."""
        if self.a is None or self.b is None:
            raise NotLowRank("the axis roles are not known yet")
        return self.a, self.b

    def stack_labels(self) -> list[int]:
        """Labels that both factors carry, in the view's order."""
        a, b = self.factors()
        return [label for label in self.labels if label in a.labels and label in b.labels]

    def own_labels(self, factor: Factor) -> list[int]:
        """Labels that ``factor`` alone carries, in the view's order."""
        stack = self.stack_labels()
        return [label for label in self.labels if label in factor.labels and label not in stack]

    def map_factors(self, operation: Callable[[Factor], Factor]) -> "Weight":
        """The weight with ``operation`` applied to every factor; the value stays."""
        factors = {name: getattr(self, name) for name in FACTORS}
        mapped = {name: f if f is None else operation(f) for name, f in factors.items()}
        return replace(self, **mapped)

    def viewed(self, value: jax.Array, axes: Iterable[Axis] | None = None) -> "Weight":
        """The weight after an operation that gave ``value`` and reordered or dropped axes."""
        return replace(self, value=value, axes=self.axes if axes is None else tuple(axes))


def symbolic_weight(site: Site, value: jax.Array, factors: Factors | None) -> Weight:
    """The weight as the function receives it; without factors, one whose roles are unknown."""
    axes = tuple(Axis(axis, frozenset({(site.path, axis)})) for axis in range(len(site.shape)))
    if factors is None:
        return Weight(site, axes, value)
    stack, inputs, outputs = site.axes("stack"), site.axes("in"), site.axes("out")
    a = Factor(factors.a, (*stack, *inputs, RANK))
    b = Factor(factors.b, (*stack, RANK, *outputs))
    m, rows = factors.magnitude, factors.replaced
    magnitude = None if m is None else Factor(m, (*stack, *outputs))
    replaced = None if rows is None else Factor(rows, (0,))
    return Weight(site, axes, value, a, b, magnitude, replaced, factors.scale)


def effective_value(weight: Weight) -> jax.Array:
    """W + ΔW in the axes of the view: summed in float32 or wider, rounded once."""
    if weight.a is None or weight.b is None:
        return weight.value
    a, b = (replace(f, array=at_least_float32(f.array)) for f in (weight.a, weight.b))
    product = contract(a, b, [RANK], preferred_element_type=a.array.dtype)
    delta = product.grouped(*((label,) for label in weight.labels)) * weight.scale
    base = at_least_float32(weight.value)
    if weight.replaced is not None:
        base = jnp.where(weight.replaced.over(weight.labels), 0, base)
    total = base + delta
    if weight.magnitude is not None:
        total = total * weight.magnitude.over(weight.labels)
    return total.astype(weight.value.dtype)


def contract(left: Factor, right: Factor, over: Sequence[int], **dot_options) -> Factor:
    """Contract two labelled arrays over ``over``, in batch over their other shared labels.

    The product is made on matrices, each group of axes flattened to one: contracting several
    token axes in the backward pass makes XLA:CPU transpose the activations in memory for a
    product as thin as the rank.
    """
    batch = [label for label in left.labels if label in right.labels and label not in over]
    rows = [label for label in left.labels if label not in (*batch, *over)]
    columns = [label for label in right.labels if label not in (*batch, *over)]
    groups = [batch] if batch else []
    lead = len(groups)
    product = lax.dot_general(
        left.grouped(*groups, rows, over),
        right.grouped(*groups, over, columns),
        (((lead + 1,), (lead,)), (range(lead), range(lead))),
        **dot_options,
    )
    sizes = [left.size([label]) for label in (*batch, *rows)]
    sizes += [right.size([label]) for label in columns]
    return Factor(lax.reshape(product, sizes), (*batch, *rows, *columns))


def leading_slices(weight: Weight) -> tuple[Any, Callable[[Any], Weight]]:
    """What to slice along the view's leading axis, and how a slice of it becomes a weight.

    A factor that doesn't carry that axis is not sliced: it is held by the second value.
    """
    label = weight.axes[0].label
    sliced = weight.map_factors(lambda f: f.leading(label) if label in f.labels else f)
    factors = {name: getattr(sliced, name) for name in FACTORS}
    carried = {name: f.array for name, f in factors.items() if f is not None and label in f.labels}

    def rebuild(arrays: tuple[jax.Array, dict[str, jax.Array]]) -> Weight:
        value, parts = arrays
        inner = {name: Factor(part, factors[name].labels[1:]) for name, part in parts.items()}
        return replace(weight, axes=weight.axes[1:], value=value, **{**factors, **inner})

    return (weight.value, carried), rebuild


def fresh_label(weight: Weight) -> int:
    """A label that no axis of the view has; the ones after it are free too."""
    return 1 + max(weight.labels, default=RANK)


def _dropped(labels: tuple[int, ...], label: int) -> tuple[int, ...]:
    return tuple(each for each in labels if each != label)
