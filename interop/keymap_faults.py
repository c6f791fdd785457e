"""What keeps a table from saying which tensors hold a tree's leaves, before any is read."""

import re
from collections.abc import Iterator, Mapping, Sequence

from interop.keymaps import Keymap, Rule, Shape, by_path
from lora_jax.errors import raise_listed


def require_sound(table: Keymap, shapes: Mapping[str, Shape]) -> None:
    """Raise one InputError for every leaf that the table's rules don't fill exactly once.

    Args:
      table: written out by `Keymap.over`.
      shapes: of the leaves, by path.

    >>> half = Keymap((Rule("mlp/kernel", "gate.weight", (1, 0), part=(0, 2)),))
    >>> require_sound(half, {"mlp/kernel": (4, 6)})
    Traceback (most recent call last):
    ...
    lora_jax.errors.InputError: the keymap doesn't fit the leaves: mlp/kernel (4, 6) is filled \
by part 0 of 2 (gate.weight), expected each part once
    """
    rules = by_path(table)
    raise_listed(
        "the keymap doesn't fit the leaves",
        (
            f"{path} {shape} {fault}"
            for path, shape in shapes.items()
            for fault in _faults(rules.get(path, []), shape)
        ),
    )


def _faults(rules: Sequence[Rule], shape: Shape) -> Iterator[str]:
    parts = sorted(rule.part for rule in rules)
    if not rules:
        yield "has no rule"
    elif parts != [(number, len(rules)) for number in range(len(rules))]:
        filled = (f"part {r.part[0]} of {r.part[1]} ({r.name})" for r in rules)
        yield f"is filled by {', '.join(filled)}, expected each part once"
    elif (shape[-1:] or (1,))[0] % len(rules):
        yield f"can't be cut into {len(rules)} equal parts"
    for rule in rules:
        yield from _layout_faults(rule, shape)


def _layout_faults(rule: Rule, shape: Shape) -> Iterator[str]:
    rank = len(shape) - rule.stack
    if re.search(r"{(?!\w})|{e}.*{i}", rule.name):
        yield f"needs {{i}} for the layer, then {{e}} for the expert, in {rule.name}"
    elif not 0 <= rule.stack <= len(shape):
        yield f"doesn't have the {rule.stack} stack axes of {rule.name}"
    elif 0 in shape[: rule.stack]:
        yield f"stacks nothing that {rule.name} could be"
    elif sorted(sum(rule.axes(rank), ())) != [*range(rank)]:
        yield f"has {rank} axes below its stack, and {rule.name} orders {rule.order}"
