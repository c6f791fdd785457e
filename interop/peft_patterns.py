"""The regular expressions of an ``adapter_config.json``, and the module names that they match.

They come from files of strangers, and some take exponential time, which Python can't interrupt
from within: so they run in a process of their own, which the system ends when it has computed for
too long.
"""

import json
import subprocess
import sys
from collections.abc import Collection, Sequence
from typing import NamedTuple

from lora_jax.errors import InputError

_NAMED_AT_MOST = 5


class Pattern(NamedTuple):
    """A regular expression of the config, matched with whole names or with their beginnings."""

    text: str
    whole: bool = False


_MATCH_ALL = """
import json, re, signal, sys
patterns, names, seconds = json.load(sys.stdin)
signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
def indices(pattern, whole):
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return str(error)
    match = compiled.fullmatch if whole else compiled.match
    return {n: m.groupdict().get("idx") for n in names if (m := match(n))}
json.dump([indices(*pattern) for pattern in patterns], sys.stdout)
"""
_MATCHING_SECONDS = 0.5


def matched(
    patterns: Sequence[Pattern], names: Sequence[str]
) -> dict[Pattern, dict[str, str | None]]:
    """The names that each pattern matches, with what its group ``idx`` found there.

    Raises:
      InputError: naming what is no regular expression, or what takes too long.

    >>> matched([Pattern("(?P<idx>[0-9])[.]k_proj", whole=True)], ["3.k_proj", "head"])
    {Pattern(text='(?P<idx>[0-9])[.]k_proj', whole=True): {'3.k_proj': '3'}}
    """
    if not patterns:
        return {}
    command = [sys.executable, "-I", "-S", "-c", _MATCH_ALL]
    question = json.dumps([patterns, names, _MATCHING_SECONDS])
    try:
        done = subprocess.run(
            command,
            input=question,
            capture_output=True,
            text=True,
            timeout=20 * _MATCHING_SECONDS,
            check=True,
        )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        raise InputError(
            f"{len(patterns)} patterns take over {_MATCHING_SECONDS} s to match: "
            f"{', '.join(repr(pattern.text[:80]) for pattern in patterns[:_NAMED_AT_MOST])}; "
            "list the module names"
        ) from error
    found = dict(zip(patterns, json.loads(done.stdout), strict=True))
    if wrong := [
        f"{pattern.text[:80]!r} is not a regular expression: {answer}"
        for pattern, answer in found.items()
        if isinstance(answer, str)
    ]:
        raise InputError("; ".join(wrong[:_NAMED_AT_MOST]))
    return found


def is_named(module: str, names: Collection[str]) -> bool:
    """Whether the module's name, or its end after a dot, is one of ``names``.

    >>> is_named("layers.0.k_proj", {"k_proj"}), is_named("layers.0.k_proj", {"proj"})
    (True, False)
    """
    return any(ending in names for ending in endings(module))


def endings(module: str) -> list[str]:
    """The module's name, and its ends after each dot.

    >>> endings("layers.0.k_proj")
    ['layers.0.k_proj', '0.k_proj', 'k_proj']
    """
    parts = module.split(".")
    return [".".join(parts[first:]) for first in range(len(parts))]
