"""The base model by the names of both sides, and what each weight is to PEFT.

==========================  =====================  =====================================
kind of weight              axes in torch          keys of its adapter
==========================  =====================  =====================================
``linear``                  out, in                ``lora_A.weight``, ``lora_B.weight``
``linear_in_out``           in, out                the same
``conv``                    out, in, window        the same, with the window in A
``embedding``               in, out                ``lora_embedding_A``, ``…_B``
``parameter``               (expert,) out, in      as linear, experts in the rank axis
``parameter_in_out``        (expert,) in, out      the same
==========================  =====================  =====================================

`MultiheadAttention` has no kind of its own: its ``in_proj_weight`` is a linear weight, and its
``out_proj`` is always adapted with it.
"""

import math
from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any

from interop.keymaps import Index, Keymap, Rule, by_path, indices, tensor_name
from lora_jax.site import Role

PREFIX = "base_model.model."
IN_PROJ = "in_proj_weight"

_ROLES: dict[str, tuple[Role, ...]] = {
    "linear": ("out", "in"),
    "linear_in_out": ("in", "out"),
    "conv": ("out", "in"),
    "embedding": ("in", "out"),
    "parameter": ("stack", "out", "in"),
    "parameter_in_out": ("stack", "in", "out"),
}
PARAMETERS = ("parameter", "parameter_in_out")


class Base:
    """The base model by the names of both sides."""

    def __init__(self, keymap: Keymap, leaves: Mapping[str, Any] | None = None, known: bool = True):
        """``leaves`` are the parameters (arrays or shapes) by path, all of them if ``known``."""
        self.known = known and leaves is not None
        self.leaves = leaves or {}
        self.keymap = keymap.over(self.leaves)
        self.parts = by_path(self.keymap)
        self.rules = {path: rules[0] for path, rules in self.parts.items()}

    @cached_property
    def tensors(self) -> dict[str, tuple[str, Index]]:
        """Every parameter of the torch model, with the leaf that holds it and its index there."""
        rules = [rule for rule in self.keymap.rules if rule.path in self.leaves]
        return {
            tensor_name(rule, index): (rule.path, index)
            for rule in rules
            for index in indices(rule, self.leaves[rule.path].shape)
        }

    @cached_property
    def modules(self) -> dict[str, tuple[str, Index]]:
        """Every torch module with a weight, with the leaf (which may be absent) and its index."""
        return {
            saved_module(name): where
            for name, where in self._named_rules
            if name.endswith((".weight", f".{IN_PROJ}"))
        }

    @cached_property
    def parameters(self) -> dict[str, tuple[str, Index]]:
        """Every weight that PEFT can adapt by the name of the parameter, in the module's order."""
        kinds = ("linear", *PARAMETERS)
        return {n: where for n, where in self._named_rules if self.rules[where[0]].kind in kinds}

    @cached_property
    def attentions(self) -> frozenset[str]:
        """The modules that are a `MultiheadAttention`."""
        names = (name for name, _ in self._named_rules if name.endswith(f".{IN_PROJ}"))
        return frozenset(map(saved_module, names))

    @cached_property
    def _named_rules(self) -> list[tuple[str, tuple[str, Index]]]:
        """Of every rule, leaf or none, each tensor's name; absent leaves have the others' depth."""
        stacked = [r.path for r in self.keymap.rules if r.stack and r.path in self.leaves]
        depth = max((self.leaves[path].shape[0] for path in stacked), default=0)
        return [
            (tensor_name(rule, index), (rule.path, index))
            for rule in self.keymap.rules
            if rule.stack < 2 or rule.path in self.leaves
            for index in indices(rule, getattr(self.leaves.get(rule.path), "shape", (depth,)))
        ]

    def tied_modules(self, path: str) -> list[str]:
        """The modules without a leaf of their own, whose weight is the leaf at ``path``."""
        names = [copy for copy, of in self.keymap.copies.items() if of == self.rules[path].name]
        return [saved_module(name) for name in names if name not in self.tensors]

    def kind(self, path: str) -> str | None:
        """What the leaf is to PEFT, or ``None`` where it has no adapter for it."""
        kind, fused = self.rules[path].kind, len(self.parts[path]) > 1
        return kind if kind in _ROLES and not fused else None

    def target(self, path: str, index: Index) -> str:
        """How PEFT's config names a weight: its module, or the parameter where it has none."""
        name = tensor_name(self.rules[path], index)
        return name if self.rules[path].kind in PARAMETERS else saved_module(name)

    def key(self, target: str, adapted: Collection[str]) -> str:
        """What the keys of a target's adapter begin with.

        Args:
          target: a module, or a parameter of one.
          adapted: every target with a pair. Of several parameters of one module each but the
            last is one layer further in.
        """
        module = saved_module(target)
        together = self._together(module, adapted)
        if target not in together:
            return PREFIX + self._within_attention(target, adapted)
        inside = ".base_layer" * (len(together) - 1 - together.index(target))
        return PREFIX + self._within_attention(module, adapted) + inside

    def base_key(self, tensor: str, adapted: Collection[str]) -> str:
        """Where the model with an adapter has one of the base's own tensors."""
        module, _, parameter = tensor.rpartition(".")
        wrapped = (module in adapted) + len(self._together(module, adapted))
        name = f"{self._within_attention(module, adapted)}{'.base_layer' * wrapped}.{parameter}"
        return PREFIX + name.removeprefix(".")

    def is_nested(self, module: str, adapted: Collection[str]) -> bool:
        """Whether it is the output projection of an attention, which has a pair of its own."""
        parent, _, last = module.rpartition(".")
        return last == "out_proj" and parent in self.attentions and parent in adapted

    def _within_attention(self, module: str, adapted: Collection[str]) -> str:
        parent, _, last = module.rpartition(".")
        return f"{parent}.base_layer.{last}" if self.is_nested(module, adapted) else module

    def _together(self, module: str, adapted: Collection[str]) -> list[str]:
        """The adapted parameters of a module, in its own order."""
        return [p for p in self._parameters_of.get(module, ()) if p in adapted]

    @cached_property
    def _parameters_of(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self.parameters:
            found.setdefault(saved_module(name), []).append(name)
        return found


def saved_module(tensor: str) -> str:
    """The module that holds a tensor."""
    return tensor.rpartition(".")[0]


def roles_in_torch(rule: Rule, axes: int) -> tuple[Role, ...]:
    """The role of each axis of a tensor of an adaptable kind.

    >>> roles_in_torch(Rule("c/kernel", "c.weight", (), "conv"), 4)
    ('out', 'in', 'in', 'in')
    """
    roles = _ROLES[rule.kind]
    if rule.kind == "conv":
        window: tuple[Role, ...] = ("in",) * (axes - len(roles))
        return (*roles, *window)
    return _ROLES["linear"] if rule.kind in PARAMETERS and axes == 2 else roles


def roles_of(rule: Rule, shape: tuple[int, ...]) -> tuple[Role, ...]:
    """The role of each axis of the leaf of an adaptable kind.

    >>> roles_of(Rule("fc/kernel", "h.{i}.fc.weight", (1, 0), "linear"), (3, 4, 6))
    ('stack', 'in', 'out')
    """
    groups = rule.axes(len(shape) - rule.stack)
    roles = zip(groups, roles_in_torch(rule, len(groups)), strict=False)
    of_axis: dict[int, Role] = {axis: role for group, role in roles for axis in group}
    stack: tuple[Role, ...] = ("stack",) * rule.stack
    return (*stack, *(of_axis.get(axis, "out") for axis in range(len(shape) - rule.stack)))


def smaller_side(rule: Rule, shape: tuple[int, ...]) -> int:
    """The smaller of a weight's input and output features.

    >>> smaller_side(Rule("fc/kernel", "h.{i}.fc.weight", (1, 0), "linear"), (3, 4, 6))
    4
    """
    axes = [*zip(roles_of(rule, shape), shape, strict=True)]
    sides = (math.prod(size for its, size in axes if its == role) for role in ("in", "out"))
    return min(sides)
