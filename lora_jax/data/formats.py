"""Understands the rows of data files, known by their keys: chats, questions, and plain text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.data.faults import Fault, listed, quoted
from lora_jax.data.fields import (
    ALL_TURNS,
    OUR_TURNS,
    Message,
    checked,
    checked_conversation,
    checked_text,
    checked_turn,
    refuse_unknown,
)
from lora_jax.data.files import Record, described, read_records
from lora_jax.errors import InputError


class Content(NamedTuple):
    """What a row says: the turns of a conversation, or else plain text."""

    messages: tuple[Message, ...] = ()
    text: str = ""


class Row(NamedTuple):
    """One row and where it was read.

    Attributes:
      messages: the turns of a conversation; none if the row is plain text.
      file: its file.
      line: where it begins there, counted from 1; in a Parquet file the row's number.
      text: plain text, all of it to be learnt; empty if the row is a conversation.

    >>> Row(({"role": "user", "content": "Hi"},), "chat.jsonl", 3).place
    'chat.jsonl:3'
    """

    messages: tuple[Message, ...]
    file: str
    line: int
    text: str = ""

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"


class FileRows(NamedTuple):
    """The usable rows of a file in its order, and what was wrong with each that was skipped."""

    rows: tuple[Row, ...]
    skipped: tuple[str, ...]


class RowFormat(NamedTuple):
    """One kind of row: the fields it must and may have, and what they say."""

    required: frozenset[str]
    optional: frozenset[str]
    content: Callable[[Mapping[str, Any]], Content]

    def __str__(self) -> str:
        optional = f" ({quoted(sorted(self.optional))})" if self.optional else ""
        return quoted(sorted(self.required)) + optional


def read_rows(path: str | Path) -> tuple[Row, ...]:
    r"""All rows of a file that must be good from end to end; see :func:`read_file`.

    >>> import pathlib, tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp(), "chat.jsonl")
    >>> _ = file.write_text('{"messages": [{"role": "assistant", "content": "Hello!"}]}\n')
    >>> read_rows(file)[0].messages
    ({'role': 'assistant', 'content': 'Hello!'},)
    """
    return read_file(path).rows


def read_file(
    path: str | Path, *, skip_bad_lines: int = 0, ignore_fields: Collection[str] = ()
) -> FileRows:
    r"""Reads a JSON Lines, JSON or Parquet file whose rows are all of one of :data:`FORMATS`.

    ====================================  ====================================================
    fields                                what is learnt
    ====================================  ====================================================
    messages                              the assistant's turns of a chat: role and content
    conversations (system)                the same, as role and content or as from and value
    instruction, output (input, system)   ``output``, asked instruction, blank line, input
    prompt, completion                    ``completion``, as the answer to the user's ``prompt``
    text                                  all of it, without a chat template
    ====================================  ====================================================

    Nothing is repaired, and a field that nothing reads is a fault.

    Args:
      path: a UTF-8 file, or Parquet.
      skip_bad_lines: how many rows may be unusable. They are left out and reported.
      ignore_fields: fields of rows to leave out of account.

    Returns:
      The rows in file order, and the faults skipped.

    Raises:
      InputError: the file can't be read or holds no row, or more rows than allowed can't be
        used: they are counted, and the first are shown with file, line, column, field and
        beginning.
    """
    rows: list[Row] = []
    faults: list[str] = []
    known: tuple[RowFormat, int] | None = None
    for record in read_records(path):
        try:
            row_format, content = _understood(_fields(record, ignore_fields))
            known = known or (row_format, record.line)
            _refuse_mixing(row_format, *known)
            rows.append(Row(content.messages, str(path), record.line, content.text))
        except Fault as fault:
            faults.append(described(path, record, fault))
    _refuse(path, len(rows), faults, skip_bad_lines)
    return FileRows(tuple(rows), tuple(faults))


def _fields(record: Record, ignored: Collection[str]) -> dict[str, Any]:
    if record.fault:
        raise record.fault
    row = checked(record.value, dict, ())
    return {name: value for name, value in row.items() if name not in ignored}


def _understood(row: Mapping[str, Any]) -> tuple[RowFormat, Content]:
    found = [each for each in FORMATS if each.required <= row.keys()]
    if len(found) != 1:
        mixed = "mixes the fields of several formats" if found else "is of no known format"
        formats = "; ".join(map(str, FORMATS))
        raise Fault(f"the row {mixed}, has {quoted(row) or 'no field'}: give one of {formats}")
    row_format = found[0]
    refuse_unknown(row, row_format.required | row_format.optional, ())
    return row_format, row_format.content(row)


def _refuse_mixing(row_format: RowFormat, first: RowFormat, line: int) -> None:
    if row_format is not first:
        raise Fault(
            f"the row has {quoted(sorted(row_format.required))}, but that in line {line} has "
            f"{quoted(sorted(first.required))}: keep one format a file"
        )


def _messages(row: Mapping[str, Any]) -> Content:
    return Content(checked_conversation(row["messages"], "messages", (OUR_TURNS,)))


def _conversations(row: Mapping[str, Any]) -> Content:
    turns = checked_conversation(row["conversations"], "conversations", ALL_TURNS)
    return Content((*_turns(row, {"system": "system"}), *turns))


def _alpaca(row: Mapping[str, Any]) -> Content:
    asked = [_text(row, name) for name in ("instruction", "input") if name in row]
    question = {"role": "user", "content": "\n\n".join(filter(str.strip, asked))}
    return Content(
        (*_turns(row, {"system": "system"}), question, *_turns(row, {"output": "assistant"}))
    )


def _prompt_and_completion(row: Mapping[str, Any]) -> Content:
    return Content(_turns(row, {"prompt": "user", "completion": "assistant"}))


def _plain_text(row: Mapping[str, Any]) -> Content:
    text = _text(row, "text")
    if not text.strip():
        raise Fault("text is blank: remove the row", path=("text",))
    return Content(text=text)


FORMATS = tuple(
    RowFormat(frozenset(required), frozenset(optional), content)
    for required, optional, content in (
        (("messages",), (), _messages),
        (("conversations",), ("system",), _conversations),
        (("instruction", "output"), ("input", "system"), _alpaca),
        (("prompt", "completion"), (), _prompt_and_completion),
        (("text",), (), _plain_text),
    )
)


def _turns(row: Mapping[str, Any], roles: Mapping[str, str]) -> tuple[Message, ...]:
    """A message for each of these fields that the row has."""
    return tuple(
        checked_turn(role, _text(row, field), (field,))
        for field, role in roles.items()
        if field in row
    )


def _text(row: Mapping[str, Any], field: str) -> str:
    return checked_text(row[field], (field,))


def _refuse(path: str | Path, rows: int, faults: Sequence[str], skip: int) -> None:
    total = rows + len(faults)
    if not total:
        raise InputError(f"{path} is empty: give one row a line")
    if len(faults) > skip:
        allowed = f", --skip-bad-lines allows {skip}" if skip else ""
        many = f"{len(faults)} of {total} rows can't be used{allowed}:"
        raise InputError(f"{many if len(faults) > 1 else ''}{listed(faults)}")
    if not rows:
        raise InputError(f"{path} has no usable row of {total}: {listed(faults)}")
