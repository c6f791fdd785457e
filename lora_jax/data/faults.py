"""What is wrong with a row and where, written so that a person finds it and a terminal is safe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

SHOWN_OFFENDERS = 5
EXCERPT_CHARACTERS = 80

FieldPath = tuple[str | int, ...]
"""Keys and indices from a row to one of its fields."""


class Fault(Exception):
    """One row can't be used.

    Args:
      reason: what is wrong and what to do.
      offset: where in the row's text, in characters, if that is known.
      path: or else the field where it is.
    """

    def __init__(self, reason: str, *, offset: int | None = None, path: FieldPath = ()):
        super().__init__(reason)
        self.reason = reason
        self.offset = offset
        self.path = path


def field_name(path: FieldPath) -> str:
    """How a message calls a field.

    >>> field_name(("messages", 1, "content")), field_name(())
    ('messages[1].content', 'the row')
    """
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return "".join(steps).removeprefix(".") or "the row"


def quoted(names: Iterable[str]) -> str:
    """The names in quotes, safe to print and not too long.

    >>> quoted(["role", "content"])
    '"role", "content"'
    """
    return ", ".join(f'"{printable(name[:EXCERPT_CHARACTERS])}"' for name in names)


def excerpt(text: str) -> str:
    """The first characters of a text, on one line, safe to print."""
    more = "..." if len(text) > EXCERPT_CHARACTERS else ""
    return printable(text[:EXCERPT_CHARACTERS]) + more


def listed(offenders: Sequence[str]) -> str:
    """The first few offenders, and how many more there are.

    >>> listed(["a.jsonl:3 (412 tokens)"])
    'a.jsonl:3 (412 tokens)'
    >>> print(listed(list("abcdefg")))
    <BLANKLINE>
      a
      b
      c
      d
      e
      and 2 more
    """
    if len(offenders) == 1:
        return offenders[0]
    hidden = len(offenders) - SHOWN_OFFENDERS
    shown = [*offenders[:SHOWN_OFFENDERS], *([f"and {hidden} more"] if hidden > 0 else [])]
    return "".join(f"\n  {offender}" for offender in shown)


def printable(text: str) -> str:
    r"""The text with every character that could drive a terminal written as an escape.

    >>> printable("caf\u00e9\x1b[2J")
    'café\\x1b[2J'
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )
