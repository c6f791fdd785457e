"""The one exception that means "your input can't be used as it is"."""

from collections.abc import Iterable

_NAMED_AT_MOST, _LETTERS_AT_MOST = 5, 200


class InputError(ValueError):
    """Something the caller passed in can't be used.

    The message names every offender at once and says what to do about each. The command
    line prints it without a traceback and exits with status 2; library callers can catch it
    as a ``ValueError``.

    >>> raise InputError("rank must be at least 1, got 0: pass LoraConfig(rank=8)")
    Traceback (most recent call last):
    ...
    lora_jax.errors.InputError: rank must be at least 1, got 0: pass LoraConfig(rank=8)
    """


def listed(names: Iterable[str]) -> str:
    """Names for a message, however many and long they are: the first five, and the number of more.

    >>> listed("abcdefg")
    'a, b, c, d, e and 2 more'
    """
    names = [*names]
    more = len(names) - _NAMED_AT_MOST
    shown = ", ".join(printable(name[:_LETTERS_AT_MOST]) for name in names[:_NAMED_AT_MOST])
    return shown + (f" and {more} more" if more > 0 else "")


def raise_listed(subject: str, names: Iterable[str]) -> None:
    """Raise an InputError "subject: names", unless there are no names."""
    if found := [*names]:
        raise InputError(f"{subject}: {listed(found)}")


def printable(text: str) -> str:
    """The text, without what would steer a terminal.

    >>> print(printable("red \\x1b[31m"))
    red \\x1b[31m
    """
    return text if text.isprintable() else text.encode("unicode_escape").decode()
