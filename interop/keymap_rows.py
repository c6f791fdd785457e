"""A keymap from rows of two or three words, for a model of one's own."""

from collections.abc import Iterable, Mapping
from typing import Any

from interop.keymaps import Keymap, Kind, Rule
from lora_jax.errors import raise_listed

# What the third word of a row of `keymap` means: the order of the axes, and the kind of module.
_LAYOUTS: dict[str, tuple[tuple[int, ...], Kind]] = {
    "": ((), "other"),
    "embedding": ((), "embedding"),
    "linear": ((1, 0), "linear"),
    "linear in_out": ((), "linear_in_out"),
    "conv1d": ((2, 1, 0), "conv"),
    "conv2d": ((3, 2, 0, 1), "conv"),
    "conv3d": ((4, 3, 0, 1, 2), "conv"),
}


def keymap(
    *rows: tuple[str, ...] | Rule,
    ignored: Iterable[str] = (),
    copies: Mapping[str, str] | None = None,
) -> Keymap:
    """A table for a model of your own, from rows of leaf path, tensor name, and layout.

    =================  ============================  ============================
    layout             leaf                          tensor
    =================  ============================  ============================
    none               any                           the same
    ``embedding``      (rows, features)              the same
    ``linear``         (in, out)                     (out, in)
    ``linear in_out``  (in, out)                     the same, as GPT-2's Conv1D
    ``conv1d`` to 3d   (\\*kernel, in, out)          (out, in, \\*kernel)
    =================  ============================  ============================

    ``{i}`` in the tensor's name is the layer, counted along the leaf's first axis, or in its path
    where each layer is a leaf; ``{e}`` below it is the expert. For anything else give a `Rule`.

    Args:
      rows: tuples of two or three strings, or rules.
      ignored: patterns of tensor names that hold no parameters, such as counters.
      copies: names that may be there and then have to equal another tensor, as of a tied head.

    Raises:
      InputError: rows that can't be read, all of them named.

    >>> import numpy as np
    >>> from interop.conversion import to_torch
    >>> table = keymap(
    ...     ("embed/embedding", "tok.weight", "embedding"),
    ...     ("blocks/fc/kernel", "blocks.{i}.fc.weight", "linear"),
    ...     ("blocks/fc/bias", "blocks.{i}.fc.bias"),
    ...     copies={"head.weight": "tok.weight"},
    ... )
    >>> params = {"embed": {"embedding": np.zeros((9, 4))},
    ...           "blocks": {"fc": {"kernel": np.ones((2, 4, 6)), "bias": np.ones((2, 6))}}}
    >>> {name: tensor.shape for name, tensor in to_torch(params, table).items()}
    ... # doctest: +NORMALIZE_WHITESPACE
    {'tok.weight': (9, 4), 'blocks.0.fc.weight': (6, 4), 'blocks.1.fc.weight': (6, 4),
     'blocks.0.fc.bias': (6,), 'blocks.1.fc.bias': (6,)}
    """
    wrong = [repr(row) for row in rows if not (isinstance(row, Rule) or _is_row(row))]
    raise_listed(
        f"rows of a keymap are (path, name) or (path, name, one of {[*_LAYOUTS][1:]}), got", wrong
    )
    rules = (row if isinstance(row, Rule) else _rule(*row) for row in rows)
    return Keymap(tuple(rules), tuple(ignored), dict(copies or {}))


def _rule(path: str, name: str, layout: str = "") -> Rule:
    order, kind = _LAYOUTS[layout]
    return Rule(path, name, order, kind)


def _is_row(row: Any) -> bool:
    words = all(isinstance(word, str) for word in row)
    return words and len(row) in (2, 3) and (len(row) == 2 or row[2] in _LAYOUTS)
