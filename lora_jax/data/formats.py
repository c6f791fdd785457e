"""Reads chat rows from JSON Lines files, strictly: a file is used whole or refused whole."""

from __future__ import annotations

import codecs
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lora_jax.errors import InputError

Message = Mapping[str, str]
"""One turn: ``{"role": "system" | "user" | "assistant", "content": text}``."""

ROLES = ("system", "user", "assistant")
MAX_LINE_BYTES = 8 * 2**20
SHOWN_OFFENDERS = 5
EXCERPT_CHARACTERS = 80


class Row(NamedTuple):
    """One conversation and where it was read.

    >>> Row(({"role": "user", "content": "Hi"},), "chat.jsonl", 3).place
    'chat.jsonl:3'
    """

    messages: tuple[Message, ...]
    file: str
    line: int

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"


class RowFormat(NamedTuple):
    """How one kind of JSON object becomes messages: known by its fields, all required."""

    fields: frozenset[str]
    messages: Callable[[Mapping[str, Any]], Any]


FORMATS = (RowFormat(frozenset({"messages"}), lambda row: row["messages"]),)


def read_rows(path: str | Path) -> tuple[Row, ...]:
    r"""Reads every line of a JSONL file as one conversation.

    A line is an object of one of :data:`FORMATS`, today
    ``{"messages": [{"role": ..., "content": ...}, ...]}`` with at least one assistant turn.
    Lines may end in LF or CRLF. Nothing is skipped or repaired.

    Args:
      path: a UTF-8 file of at most ``MAX_LINE_BYTES`` bytes a line.

    Returns:
      One :class:`Row` a line, in file order.

    Raises:
      InputError: the file can't be read or is empty, or some lines can't be used: they are
        counted, and the first are shown with file, line, column, field and beginning.

    >>> import pathlib, tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp(), "chat.jsonl")
    >>> _ = file.write_text('{"messages": [{"role": "assistant", "content": "Hello!"}]}\n')
    >>> read_rows(file)[0].messages
    ({'role': 'assistant', 'content': 'Hello!'},)
    """
    rows: list[Row] = []
    faults: list[str] = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(_lines(file), start=1):
                try:
                    rows.append(Row(_conversation(line), str(path), number))
                except _Fault as fault:
                    faults.append(_located(fault, f"{path}:{number}", line))
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror}: pass a JSONL file") from error
    _refuse(path, faults, lines=len(rows) + len(faults))
    return tuple(rows)


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


class _Fault(Exception):
    def __init__(self, reason: str, column: int | None = None):
        super().__init__(reason)
        self.reason = reason
        self.column = column


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Every line; of one beyond the limit only the beginning, so that memory stays bounded."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        yield line
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES + 1)


def _conversation(line: bytes) -> tuple[Message, ...]:
    return _checked_messages(_messages_field(_parsed(_decoded(line))))


def _decoded(line: bytes) -> str:
    if len(line) > MAX_LINE_BYTES:
        raise _Fault(f"the line is longer than {MAX_LINE_BYTES} bytes: one conversation a line")
    if line.startswith(codecs.BOM_UTF8):
        raise _Fault("starts with a byte order mark: save the file as UTF-8 without BOM", 1)
    if b"\0" in line:
        raise _Fault("holds a NUL byte: save the file as UTF-8", line.index(b"\0") + 1)
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        byte = f"byte 0x{line[error.start]:02x}"
        raise _Fault(f"not UTF-8 ({byte}): save the file as UTF-8", error.start + 1) from error


def _parsed(text: str) -> Any:
    if not text.strip():
        raise _Fault("the line is empty: remove it")
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        cut = "" if text.endswith("\n") else "; the file ends inside this line: was it cut short?"
        raise _Fault(f"not JSON ({error.msg}{cut})", error.colno) from error
    except RecursionError as error:
        raise _Fault("not usable JSON (nested too deeply)") from error
    except ValueError as error:
        raise _Fault(f"not usable JSON ({error})") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if repeated:
        raise _Fault(f"duplicate key {_quoted(repeated)}: keep one")
    return dict(pairs)


def _messages_field(row: Any) -> Any:
    if not isinstance(row, dict):
        raise _Fault(f"the line must be an object, got {_json_type(row)}")
    for row_format in FORMATS:
        if row_format.fields <= row.keys():
            _refuse_unknown(row, row_format.fields, "the line")
            return row_format.messages(row)
    known = " or ".join(_quoted(sorted(row_format.fields)) for row_format in FORMATS)
    raise _Fault(f"lacks {known}, has {_quoted(list(row)) or 'no field'}")


def _checked_messages(messages: Any) -> tuple[Message, ...]:
    if not isinstance(messages, list):
        raise _Fault(f"messages must be an array, got {_json_type(messages)}")
    if not messages:
        raise _Fault("messages is empty: give at least one assistant turn")
    for index, message in enumerate(messages):
        _check_message(message, f"messages[{index}]")
    if not any(message["role"] == "assistant" for message in messages):
        raise _Fault("messages has no assistant turn, so there is nothing to learn: add one")
    return tuple(messages)


def _check_message(message: Any, field: str) -> None:
    if not isinstance(message, dict):
        raise _Fault(f"{field} must be an object, got {_json_type(message)}")
    fields = ("role", "content")
    if missing := [name for name in fields if name not in message]:
        raise _Fault(f"{field} lacks {_quoted(missing)}")
    _refuse_unknown(message, fields, field)
    for name in fields:
        _check_text(message[name], f"{field}.{name}")
    if message["role"] not in ROLES:
        raise _Fault(f"{field}.role is {_quoted([message['role']])}: use {', '.join(ROLES)}")
    if message["role"] == "assistant" and not message["content"].strip():
        raise _Fault(f"{field}.content is blank: an assistant turn must say something")


def _check_text(text: Any, field: str) -> None:
    if not isinstance(text, str):
        raise _Fault(f"{field} must be a string, got {_json_type(text)}")
    if "\0" in text:
        raise _Fault(f"{field} holds a NUL character: remove it")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise _Fault(f"{field} holds half of a surrogate pair: write the whole character")


def _refuse_unknown(value: Mapping[str, Any], known: Sequence[str] | frozenset[str], where: str):
    unknown = [name for name in value if name not in known]
    if unknown:
        raise _Fault(f"{where} has {_quoted(unknown)}, which nothing reads: remove it")


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f'"{printable(name[:EXCERPT_CHARACTERS])}"' for name in names)


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _located(fault: _Fault, place: str, line: bytes) -> str:
    column = "" if fault.column is None else f":{fault.column}"
    text = line[: 4 * EXCERPT_CHARACTERS].decode("utf-8", "backslashreplace").strip("\r\n")
    more = "..." if len(text) > EXCERPT_CHARACTERS else ""
    return f"{place}{column}: {fault.reason}: {printable(text[:EXCERPT_CHARACTERS])}{more}"


def _refuse(path: str | Path, faults: Sequence[str], lines: int) -> None:
    if not lines:
        raise InputError(f"{path} is empty: give one conversation a line")
    if faults:
        count = "" if len(faults) == 1 else f"{len(faults)} of {lines} lines can't be used:"
        raise InputError(f"{count}{listed(faults)}")
