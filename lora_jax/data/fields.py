"""Checks the fields of rows: texts, and turns of a conversation under the names files use."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from lora_jax.data.faults import Fault, FieldPath, field_name, quoted

Message = Mapping[str, str]
"""One turn: ``{"role": "system" | "user" | "assistant", "content": text}``."""

ROLES = ("system", "user", "assistant")
_SURROGATE = re.compile("[\ud800-\udfff]")


class TurnNames(NamedTuple):
    """How one kind of message calls its fields and the roles in them."""

    role: str
    content: str
    roles: Mapping[str, str]


OUR_TURNS = TurnNames("role", "content", {role: role for role in ROLES})
ALL_TURNS = (
    OUR_TURNS,
    TurnNames(
        "from",
        "value",
        {"human": "user", "gpt": "assistant"} | {role: role for role in ROLES},
    ),
)


def checked_conversation(
    messages: Any, field: str, names: Sequence[TurnNames]
) -> tuple[Message, ...]:
    """The messages under our names, at least one of them the assistant's.

    Raises:
      Fault: they can't be used.

    >>> checked_conversation([{"from": "gpt", "value": "Hi!"}], "conversations", ALL_TURNS)
    ({'role': 'assistant', 'content': 'Hi!'},)
    """
    checked(messages, list, (field,))
    if not messages:
        raise Fault(f"{field} is empty: give at least one assistant turn", path=(field,))
    turns = tuple(_message(each, (field, index), names) for index, each in enumerate(messages))
    if not any(turn["role"] == "assistant" for turn in turns):
        reason = f"{field} has no assistant turn, so there is nothing to learn: add one"
        raise Fault(reason, path=(field,))
    return turns


def _message(message: Any, path: FieldPath, names: Sequence[TurnNames]) -> Message:
    checked(message, dict, path)
    used = next((each for each in names if each.role in message), names[0])
    fields = (used.role, used.content)
    if missing := [name for name in fields if name not in message]:
        raise Fault(f"{field_name(path)} lacks {quoted(missing)}", path=path)
    refuse_unknown(message, fields, path)
    role, content = (checked_text(message[name], (*path, name)) for name in fields)
    if role not in used.roles:
        where = (*path, used.role)
        reason = f"{field_name(where)} is {quoted([role])}: use {', '.join(used.roles)}"
        raise Fault(reason, path=where)
    return checked_turn(used.roles[role], content, (*path, used.content))


def checked_turn(role: str, content: str, path: FieldPath) -> Message:
    """One turn; a Fault if it is the assistant's and says nothing."""
    if role == "assistant" and not content.strip():
        reason = f"{field_name(path)} is blank: an assistant turn must say something"
        raise Fault(reason, path=path)
    return {"role": role, "content": content}


def checked_text(text: Any, path: FieldPath) -> str:
    """The value if it is a string that a tokenizer takes as it is, or a Fault."""
    checked(text, str, path)
    if "\0" in text:
        raise Fault(f"{field_name(path)} holds a NUL character: remove it", path=path)
    if _SURROGATE.search(text):
        reason = f"{field_name(path)} holds half of a surrogate pair: write the whole character"
        raise Fault(reason, path=path)
    return text


def checked(value: Any, kind: type, path: FieldPath) -> Any:
    """The value if it is a ``dict``, ``list`` or ``str``, whichever is asked for, or a Fault."""
    if type(value) is not kind:
        expected, got = _JSON_TYPES[kind], _JSON_TYPES.get(type(value), "number")
        article = "a" if kind is str else "an"
        raise Fault(f"{field_name(path)} must be {article} {expected}, got {got}", path=path)
    return value


_JSON_TYPES = {
    dict: "object",
    list: "array",
    str: "string",
    bool: "boolean",
    type(None): "null",
}


def refuse_unknown(value: Iterable[str], known: Collection[str], path: FieldPath) -> None:
    """Raise a Fault if an object has a field that nothing reads."""
    unknown = [name for name in value if name not in known]
    if unknown:
        remedy = "remove it" if path else "remove it, or pass --ignore-fields"
        raise Fault(
            f"{field_name(path)} has {quoted(unknown)}, which nothing reads: {remedy}",
            path=(*path, unknown[0]),
        )
