"""Pickles that would take for ever, told from their opcodes without running them.

A tuple whose parts are one and the same tuple, again and again, takes a few bytes a level to
write, and twice the time a level to hash: of fifty levels a dictionary's key would take for ever.
"""

import pickletools
from collections.abc import Iterator
from itertools import islice
from typing import IO

MAX_DEPTH = 8
"""Of tuples in tuples; torch itself nests two."""
MAX_OPCODES = 1_000_000
"""Of some 25,000 tensors."""

_MARK = pickletools.markobject
_PUTS = frozenset(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"))
_COPIES = frozenset(("GET", "BINGET", "LONG_BINGET", "DUP"))


def slowness(file: IO[bytes]) -> str | None:
    """Why the pickle that begins here would take too long; the file is read to its end.

    What is no pickle doesn't: its reader will say so.

    >>> import io, pickle
    >>> nested = ()
    >>> for _ in range(20): nested = (nested, nested)
    >>> slowness(io.BytesIO(pickle.dumps(nested)))
    'nests tuples deeper than 8'
    >>> slowness(io.BytesIO(pickle.dumps((1,))))
    """
    depths = _depths(file)
    try:
        if any(depth > MAX_DEPTH for depth in islice(depths, MAX_OPCODES)):
            return f"nests tuples deeper than {MAX_DEPTH}"
        return f"has over {MAX_OPCODES:,} operations" if next(depths, None) is not None else None
    except (ValueError, IndexError, KeyError, UnicodeDecodeError):
        return None


def _depths(file: IO[bytes]) -> Iterator[int]:
    """After each opcode the depth of the tuple that it has made, 0 if it has made none."""
    stack: list[int | None] = []  # None is a mark
    memo: dict[int, int] = {}
    for opcode, argument, _ in pickletools.genops(file):
        depth = 0
        if opcode.name in _PUTS:
            memo[len(memo) if argument is None else argument] = stack[-1] or 0
        elif opcode.name in _COPIES:
            stack.append(stack[-1] if argument is None else memo[argument])
        else:
            taken = _taken(stack, opcode)
            depth = 1 + max(taken, default=0) if "TUPLE" in opcode.name else 0
            stack += [None if made is _MARK else depth for made in opcode.stack_after]
        yield depth


def _taken(stack: list[int | None], opcode: pickletools.OpcodeInfo) -> list[int]:
    """The values that an opcode takes off the stack."""
    taken = []
    if _MARK in opcode.stack_before:
        while (value := stack.pop()) is not None:
            taken.append(value)
    for kind in opcode.stack_before:
        if kind not in (_MARK, pickletools.stackslice):
            taken.append(stack.pop() or 0)
    return taken
