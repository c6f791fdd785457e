r"""Parses JSON strictly, and finds where in its text a value stands.

A key given twice, NaN and Infinity are faults here, though Python's parser lets them pass.
Positions are looked up only once something is wrong, so reading good rows costs nothing more.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from lora_jax.data.faults import Fault, FieldPath, quoted

_SPACE = re.compile(r"[ \t\n\r]*")
_LENIENT = json.JSONDecoder()


def parse(text: str, start: int = 0) -> tuple[Any, int]:
    """The value that begins at ``start`` after any white space, and the offset of its end.

    Raises:
      Fault: it isn't JSON, or no JSON that two parsers would read alike.

    >>> parse(' {"a": 1} rest')
    ({'a': 1}, 9)
    """
    start = skip_space(text, start)
    try:
        return _STRICT.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise Fault(f"not JSON ({error.msg})", offset=error.pos) from error
    except RecursionError as error:
        raise Fault("not usable JSON (nested too deeply)", offset=start) from error
    except _Repeated as error:
        reason = f"duplicate key {quoted(error.args)}: keep one"
        raise Fault(reason, offset=_repetition(text, start)) from error
    except ValueError as error:
        raise Fault(f"not usable JSON ({error})", offset=start) from error


def end_of(text: str, start: int) -> int:
    """Where the value that begins at ``start`` ends, faults of meaning in it or not."""
    return _LENIENT.raw_decode(text, start)[1]


def locate(text: str, path: FieldPath) -> int:
    """The offset of the value that keys and indices lead to, or of the last one there is.

    >>> text = '{"messages": [{"role": "user"}, {"role": 7}]}'
    >>> text[locate(text, ("messages", 1, "role"))]
    '7'
    >>> text[locate(text, ("messages", 0, "content")) :]
    '{"role": "user"}, {"role": 7}]}'
    """
    at = skip_space(text, 0)
    for step in path:
        members = _members(text, at)
        found = next((value_at for key, _, value_at in members if key == step), None)
        if found is None:
            return at
        at = found
    return at


def skip_space(text: str, start: int) -> int:
    """The offset of the first character from ``start`` on that isn't JSON's white space."""
    found = _SPACE.match(text, start)
    return found.end() if found else start


class _Repeated(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise _Repeated(*(key for key, count in counts.items() if count > 1))
    return result


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


_STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant)


def _members(text: str, at: int) -> Iterator[tuple[Any, int, int]]:
    """(key, its offset, its value's offset) of the object or array at ``at``; else nothing."""
    opening = text[at : at + 1]
    at = skip_space(text, at + 1)
    index = 0
    while opening in ("{", "[") and text[at] not in "]}":
        key, key_at = index, at
        if opening == "{":
            key, at = _LENIENT.raw_decode(text, at)
            at = skip_space(text, skip_space(text, at) + 1)
        yield key, key_at, at
        at = skip_space(text, end_of(text, at))
        at = skip_space(text, at + 1) if text[at] == "," else at
        index += 1


def _repetition(text: str, at: int) -> int | None:
    """The offset of the first key that its object has already."""
    seen = set()
    for key, key_at, value_at in _members(text, at):
        if key in seen:
            return key_at
        seen.add(key)
        inner = _repetition(text, value_at)
        if inner is not None:
            return inner
    return None
