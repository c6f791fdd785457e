"""Where a torch module's factors stand in the arrays of a leaf, for every kind of module.

A leaf may stack layers and experts, order its axes in any way, keep heads apart that torch has in
one axis, and be fused from several modules (gate and up): ranks then stand side by side in it,
and each module's B in its own columns.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from interop.adapter_file import Kind
from interop.keymaps import Index, Keymap, Rule, Shape, by_path, indices, tensor_name, tensor_shape
from lora_jax.site import Role, Site


class _Form(NamedTuple):
    """What a kind of rule is to an adapter."""

    kind: Kind
    roles: tuple[Role, ...]
    """Of the tensor's axes; those of a kernel come last, and are inputs."""


_FORMS = {
    "linear": _Form("linear", ("out", "in")),
    "linear_in_out": _Form("linear", ("in", "out")),
    "embedding": _Form("embedding", ("in", "out")),
    "conv": _Form("conv", ("out", "in")),
    "parameter": _Form("experts", ("stack", "out", "in")),
    "parameter_in_out": _Form("experts", ("stack", "in", "out")),
}


class Spot(NamedTuple):
    """Where a torch tensor stands: its rule, and the index in the stack of the rule's leaf."""

    rule: Rule
    index: Index


class Part(NamedTuple):
    """A module's part of an array."""

    view: np.ndarray
    """Of the array, with axes apart that torch has as one."""
    shape: Shape
    """In torch."""

    def get(self) -> np.ndarray:
        """The array as torch has it."""
        return self.view.reshape(self.shape)

    def put(self, array: np.ndarray) -> None:
        """Write what torch has: the inverse of `get`."""
        self.view[...] = array.reshape(self.view.shape)


class Tree:
    """The base's leaves by path, and its torch tensors by name."""

    def __init__(self, keymap: Keymap, leaves: Mapping[str, Any]):
        """``leaves`` are arrays or shapes by path."""
        self.leaves = leaves
        self.keymap = keymap.over(leaves)
        self.rules = by_path(self.keymap)
        self.spots = {
            tensor_name(rule, index): Spot(rule, index)
            for rule in self.keymap.rules
            if rule.path in leaves
            for index in indices(rule, leaves[rule.path].shape)
        }

    @property
    def modules(self) -> dict[str, Spot]:
        """Every module with a weight, and every weight without a module of its own."""
        return {
            module_of(name): spot
            for name, spot in self.spots.items()
            if name.endswith(".weight") or spot.rule.kind in _FORMS
        }

    def spot(self, module: str) -> Spot | None:
        """Where a module's weight stands; ``None`` if the model has no such module."""
        return self.spots.get(f"{module}.weight", self.spots.get(module))

    def sharers(self, rule: Rule) -> list[str]:
        """The modules without a leaf of their own whose weight is the rule's tensor."""
        copies = [copy for copy, of in self.keymap.copies.items() if of == rule.name]
        return [module_of(copy) for copy in copies if copy not in self.spots]


def module_of(tensor: str) -> str:
    """The module that a weight belongs to; the tensor's own name where it has none.

    >>> module_of("h.0.fc.weight"), module_of("h.0.experts.down")
    ('h.0.fc', 'h.0.experts.down')
    """
    return tensor.removesuffix(".weight")


def kind_of(rule: Rule, leaf_rank: int) -> Kind | None:
    """The kind of adapter that the rule's tensor takes; ``None`` if it takes none.

    >>> kind_of(Rule("down", "h.{i}.experts.down", (), "parameter"), 4)
    'experts'
    """
    form = _FORMS.get(rule.kind)
    if form is None:
        return None
    has_experts = len(rule.axes(leaf_rank - rule.stack)) == len(form.roles)
    return "linear" if form.kind == "experts" and not has_experts else form.kind


def roles(rule: Rule, leaf_rank: int) -> tuple[Role, ...]:
    """The role of each axis of the rule's leaf.

    >>> roles(Rule("q/kernel", "h.{i}.q.weight", ((1, 2), 0), "linear"), 4)
    ('stack', 'in', 'out', 'out')
    """
    below: dict[int, Role] = {}
    for role, axes in _axes_in_torch(rule, leaf_rank):
        below |= dict.fromkeys(axes, role)
    stack: tuple[Role, ...] = ("stack",) * rule.stack
    return (*stack, *(below[axis] for axis in sorted(below)))


def factor_shapes(rule: Rule, shape: Shape, rank: int) -> tuple[Shape, Shape]:
    """The shapes of A and B in torch, for the rule's leaf of that shape.

    >>> factor_shapes(Rule("c", "c.weight", (3, 2, 0, 1), "conv"), (3, 3, 16, 32), 4)
    ((4, 16, 3, 3), (32, 4))
    """
    roles_of_axes = [role for role, _ in _axes_in_torch(rule, len(shape))]
    sizes = [*zip(roles_of_axes, tensor_shape(rule, shape), strict=True)]
    stack, inputs, outputs = (
        tuple(size for role, size in sizes if role == wanted) for wanted in ("stack", "in", "out")
    )
    return (*stack, rank, *inputs), (*stack, *outputs, rank)


def factors(
    arrays: Mapping[str, np.ndarray], spot: Spot, site: Site, ranks: range
) -> dict[str, Part]:
    """The parts of a site's arrays that are one module's, by the field of the module.

    Args:
      arrays: ``a``, ``b`` and, with DoRA, ``m`` of the site.
      spot: of the module's weight.
      site: whose arrays they are.
      ranks: which of the site's ranks are the module's.
    """
    rule, index = spot
    in_torch = _axes_in_torch(rule, len(site.shape))
    stack, inputs, outputs = (
        [axis for role, axes in in_torch if role == wanted for axis in axes]
        for wanted in ("stack", "in", "out")
    )
    a_shape, b_shape = factor_shapes(rule, site.shape, len(ranks))
    depth, within = len(stack), slice(ranks.start, ranks.stop)
    columns = _columns(rule, site)
    a_order = [*range(depth), depth + len(inputs), *_places(inputs, depth)]
    b_order = [*range(depth), *_places(outputs, depth + 1), depth]
    a, b = arrays["a"][(*index, ...)], arrays["b"][(*index, ...)]
    b = b[(*(slice(None),) * depth, within, ..., columns)]
    found = {
        "a": Part(a[..., within].transpose(a_order), a_shape),
        "b": Part(b.transpose(b_order), b_shape),
    }
    if "m" in arrays:
        m = arrays["m"][(*index, ..., columns)]
        order = [*range(depth), *_places(outputs, depth)]
        found["magnitude"] = Part(m.transpose(order), b_shape[:-1])
    return found


def _axes_in_torch(rule: Rule, leaf_rank: int) -> list[tuple[Role, tuple[int, ...]]]:
    """For each axis of the tensor its role, and the axes of the leaf (below its stack) it is."""
    axes, of_kind = rule.axes(leaf_rank - rule.stack), _FORMS[rule.kind].roles
    of_kind = of_kind[max(0, len(of_kind) - len(axes)) :]  # a parameter need not have experts
    kernel: tuple[Role, ...] = ("in",) * (len(axes) - len(of_kind))
    return [*zip((*of_kind, *kernel), axes, strict=True)]


def _places(axes: list[int], first: int) -> list[int]:
    """Where axes of the leaf stand in a factor that has these alone, in the leaf's order."""
    stored = sorted(axes)
    return [first + stored.index(axis) for axis in axes]


def _columns(rule: Rule, site: Site) -> slice:
    """What a module has of the last axis, which a leaf fused of several has in parts."""
    number, count = rule.part
    width = site.shape[-1] // count
    return slice(number * width, (number + 1) * width) if count > 1 else slice(None)
