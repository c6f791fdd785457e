"""Where a torch module's factors stand in the arrays of a leaf, for every kind of module.

A leaf may stack layers and experts, order its axes in any way, and be fused from several modules
(gate and up): ranks then stand side by side in it, and each module's B in its own columns.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from interop.keymaps import Index, Keymap, Rule, by_path, indices, tensor_name, tensor_shape
from lora_jax.site import Role, Site

# What the axes of a module's weight are in torch; those of a kernel come last, and are inputs.
_TORCH_ROLES: dict[str, tuple[Role, ...]] = {
    "linear": ("out", "in"),
    "linear_in_out": ("in", "out"),
    "embedding": ("in", "out"),
    "conv": ("out", "in"),
}
ADAPTABLE = frozenset(_TORCH_ROLES)


class Spot(NamedTuple):
    """Where a torch tensor stands: its rule, and the index in the stack of the rule's leaf."""

    rule: Rule
    index: Index


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
    def modules(self) -> list[str]:
        """Every module with a weight."""
        weights = (name for name in self.spots if name.endswith(".weight"))
        return [name.removesuffix(".weight") for name in weights]

    def spot(self, module: str) -> Spot | None:
        """Where a module's weight stands; ``None`` if the model has no such module."""
        return self.spots.get(f"{module}.weight")

    def sharers(self, rule: Rule) -> list[str]:
        """The modules without a leaf of their own whose weight is the rule's tensor."""
        absent = {rule.name for rule in self.keymap.rules if rule.path not in self.leaves}
        copies = self.keymap.copies.items()
        names = [copy for copy, original in copies if original == rule.name and copy in absent]
        return [name.removesuffix(".weight") for name in names]


def roles(rule: Rule, leaf_rank: int) -> tuple[Role, ...]:
    """The role of each axis of the rule's leaf.

    >>> roles(Rule("h/kernel", "h.{i}.weight", (1, 0), "linear"), 3)
    ('stack', 'in', 'out')
    """
    of_tensor = _torch_roles(rule, leaf_rank)
    order = rule.order or range(len(of_tensor))
    stack: tuple[Role, ...] = ("stack",) * rule.stack
    return (*stack, *(of_tensor[axis] for axis in sorted(range(len(order)), key=order.__getitem__)))


def factor_shapes(rule: Rule, shape: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """The inputs, which are A's axes beside the rank, and how many outputs; of the tensor.

    >>> factor_shapes(Rule("c", "c.weight", (3, 2, 0, 1), "conv"), (3, 3, 16, 32))
    ((16, 3, 3), 32)
    """
    sizes, of_tensor = tensor_shape(rule, tuple(shape)), _torch_roles(rule, len(shape))
    inputs = tuple(n for n, role in zip(sizes, of_tensor, strict=True) if role == "in")
    return inputs, sizes[of_tensor.index("out")]


def factors(
    arrays: Mapping[str, np.ndarray], spot: Spot, site: Site, ranks: range
) -> dict[str, np.ndarray]:
    """The parts of a site's arrays that are one module's, as views in torch's orientation.

    Args:
      arrays: ``a``, ``b`` and, with DoRA, ``m`` of the site.
      spot: of the module's weight.
      site: whose arrays they are.
      ranks: which of the site's ranks are the module's.

    Returns:
      ``a``, ``b`` and ``magnitude``: read them to write a file, assign them to read one.
    """
    rule, index = spot
    number, count = rule.part
    inputs = [k for k, role in enumerate(_torch_roles(rule, len(site.shape))) if role == "in"]
    order = rule.order or range(len(site.shape) - rule.stack)
    stored = sorted(inputs, key=order.__getitem__)
    within, width = slice(ranks.start, ranks.stop), site.fan_out // count
    columns = slice(number * width, (number + 1) * width)
    a = arrays["a"][index][..., within]
    views = {
        "a": a.transpose(a.ndim - 1, *map(stored.index, inputs)),
        "b": arrays["b"][index][within, columns].T,
    }
    return views | ({"magnitude": arrays["m"][index][columns]} if "m" in arrays else {})


def _torch_roles(rule: Rule, leaf_rank: int) -> tuple[Role, ...]:
    kernel: tuple[Role, ...] = ("in",) * (leaf_rank - rule.stack - 2)
    return (*_TORCH_ROLES[rule.kind], *kernel)
