"""Pickles that would take for ever, told from their opcodes without running them.

A tuple whose parts are one and the same tuple, again and again, takes a few bytes a level to
write, and twice the time a level to hash: of fifty levels a dictionary's key would take for ever.
Multiples of Python's modulus of hashes have one hash, and as a dictionary's keys are each compared
with all before it.
"""

import pickletools
import sys
from collections.abc import Iterator
from itertools import islice
from typing import IO

MAX_DEPTH = 8
"""Of tuples in tuples; torch itself nests two."""
MAX_OPCODES = 400_000
"""Of some 10,000 tensors; looking through them takes half a second."""
MAX_LARGE_INTEGERS = 256
"""Of at least the modulus of hashes, 2⁶¹ - 1; state dicts have none."""

_MARK = pickletools.markobject
_INTEGERS = frozenset(("INT", "LONG", "LONG1", "LONG4"))
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
    costs, large = _costs(file), 0
    try:
        for depth, is_large in islice(costs, MAX_OPCODES):
            large += is_large
            if depth > MAX_DEPTH:
                return f"nests tuples deeper than {MAX_DEPTH}"
            if large > MAX_LARGE_INTEGERS:
                return f"holds more than {MAX_LARGE_INTEGERS} integers beyond 61 bits"
        return f"has over {MAX_OPCODES:,} operations" if next(costs, None) is not None else None
    except (ValueError, IndexError, KeyError, UnicodeDecodeError):
        return None


def _costs(file: IO[bytes]) -> Iterator[tuple[int, bool]]:
    """Of each opcode the depth of the tuple that it makes or 0, and if it is a large integer."""
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
        yield depth, opcode.name in _INTEGERS and abs(argument or 0) >= sys.hash_info.modulus


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
