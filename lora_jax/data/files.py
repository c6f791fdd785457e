"""Reads the records of a data file: JSON Lines, one JSON array, or Parquet."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lora_jax.data.faults import Fault, excerpt
from lora_jax.data.json_text import end_of, locate, parse, skip_space
from lora_jax.errors import InputError

MAX_LINE_BYTES = 8 * 2**20
MAX_ARRAY_BYTES = 2**30
_SHOWN = 400


class Record(NamedTuple):
    """One row of a file, not yet understood.

    Attributes:
      line: where it begins, counted from 1; in a Parquet file the row's number.
      column: where in that line, counted from 1 in characters; 0 in a file without columns.
      text: as it is written, or its beginning if it can't be decoded.
      value: what it says, if there is no fault.
      fault: why it can't be parsed.
    """

    line: int
    column: int
    text: str
    value: Any = None
    fault: Fault | None = None


def read_records(path: str | Path) -> Iterator[Record]:
    """All rows of a file, bad ones included; what kind of file it is, its suffix says.

    ``.parquet`` is read with pyarrow. ``.json`` may hold one array. Everything else is
    JSON Lines, read line by line: memory stays bounded whatever the length of a line.

    Raises:
      InputError: the file can't be read at all.
    """
    read = _READERS.get(Path(path).suffix.lower(), _json_lines)
    try:
        yield from read(Path(path))
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"can't read {path}: {reason}: pass a JSONL, JSON or Parquet file"
        ) from error


def described(path: str | Path, record: Record, fault: Fault) -> str:
    """The fault with file, line, column, and the beginning of the row."""
    place = f"{path}:{record.line}"
    if record.column:
        offset = locate(record.text, fault.path) if fault.offset is None else fault.offset
        place = f"{path}:{_line_and_column(record, offset)}"
    text = record.text.strip() or json.dumps(record.value, default=str, ensure_ascii=False)
    return f"{place}: {fault.reason}: {excerpt(text)}"


def _line_and_column(record: Record, offset: int) -> str:
    before = record.text[:offset]
    lines = before.count("\n")
    column = len(before) - before.rfind("\n") if lines else record.column + offset
    return f"{record.line + lines}:{column}"


def _json_lines(path: Path) -> Iterator[Record]:
    with open(path, "rb") as file:
        for number, line in enumerate(_lines(file), start=1):
            yield _line_record(number, line)


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Every line; of one beyond the limit only the beginning, so that memory stays bounded."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        yield line
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES + 1)


def _line_record(number: int, line: bytes) -> Record:
    try:
        text = _utf8(_short_enough(line))
    except Fault as fault:
        return Record(number, 1, line[:_SHOWN].decode("utf-8", "backslashreplace"), fault=fault)
    try:
        return Record(number, 1, text, _sole_value(text))
    except Fault as fault:
        return Record(number, 1, text, fault=fault)


def _short_enough(line: bytes) -> bytes:
    if len(line) > MAX_LINE_BYTES:
        raise Fault(f"the line is longer than {MAX_LINE_BYTES} bytes: one row a line", offset=0)
    return line


def _utf8(data: bytes) -> str:
    if data.startswith(codecs.BOM_UTF8):
        raise Fault("starts with a byte order mark: save the file as UTF-8 without BOM", offset=0)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 (byte 0x{data[error.start]:02x}): save the file as UTF-8"
        raise Fault(reason, offset=len(data[: error.start].decode())) from error
    if "\0" in text:
        raise Fault("holds a NUL byte: save the file as UTF-8", offset=text.index("\0"))
    return text


def _sole_value(text: str) -> Any:
    if not text.strip():
        raise Fault("the line is empty: remove it", offset=0)
    line = text.rstrip("\r\n")
    try:
        value, end = parse(line)
    except Fault as fault:
        may_be_cut = line == text and fault.reason.startswith("not JSON")
        cut = "; no line break follows: was the file cut short?" if may_be_cut else ""
        raise Fault(fault.reason + cut, offset=fault.offset) from fault
    end = skip_space(line, end)
    if end < len(line):
        raise Fault("not JSON (more follows the first value): one row a line", offset=end)
    return value


def _json_array(path: Path) -> Iterator[Record]:
    if path.stat().st_size > MAX_ARRAY_BYTES:
        raise InputError(f"{path} is larger than {MAX_ARRAY_BYTES} bytes: save it as JSON Lines")
    data = path.read_bytes()
    if not data.lstrip().startswith(b"["):
        return _json_lines(path)
    text = data.decode("utf-8", "backslashreplace")
    try:
        _utf8(data)
    except Fault as fault:
        line_start = text.rfind("\n", 0, fault.offset) + 1
        raise _refusal(path, text, line_start, fault) from fault
    return _elements(path, text)


def _elements(path: Path, text: str) -> Iterator[Record]:
    """Every element; what stands between them must be JSON, or the rest can't be told apart."""
    line, start = 1, 0
    at = skip_space(text, text.index("[") + 1)
    more = text[at : at + 1] != "]"
    while more:
        line += text.count("\n", start, at)
        start = at
        record, at = _element(path, text, at, line)
        yield record
        at = skip_space(text, at)
        more = text[at : at + 1] == ","
        at = skip_space(text, at + 1) if more else at
    if text[at : at + 1] != "]":
        cut = ": was the file cut short?" if at == len(text) else ""
        fault = Fault(f"not JSON (expected a comma or the array's end{cut})", offset=at)
        raise _refusal(path, text, start, fault)
    after = skip_space(text, at + 1)
    if after < len(text):
        fault = Fault("not JSON (more follows the array): keep one array", offset=after)
        raise _refusal(path, text, after, fault)


def _element(path: Path, text: str, at: int, line: int) -> tuple[Record, int]:
    column = at - text.rfind("\n", 0, at)
    try:
        value, end = parse(text, at)
        return Record(line, column, text[at:end], value), end
    except Fault as fault:
        try:
            end = end_of(text, at)
        except (ValueError, RecursionError):
            raise _refusal(path, text, at, fault) from fault
        inside = Fault(fault.reason, offset=(fault.offset or at) - at)
        return Record(line, column, text[at:end], fault=inside), end


def _refusal(path: Path, text: str, start: int, fault: Fault) -> InputError:
    """What to raise for a file that can't be read on, shown from ``start``."""
    offset = start if fault.offset is None else fault.offset
    line, column = text.count("\n", 0, start) + 1, start - text.rfind("\n", 0, start)
    record = Record(line, column, text[start : offset + _SHOWN])
    return InputError(described(path, record, Fault(fault.reason, offset=offset - start)))


def _parquet(path: Path) -> Iterator[Record]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise InputError(
            f"reading {path} takes pyarrow: pip install 'lora-jax[parquet]', or save the rows as "
            "JSON Lines"
        ) from error
    try:
        with open(path, "rb") as file:
            batches = ParquetFile(file).iter_batches()
            rows = (row for batch in batches for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield Record(number, 0, "", _without_nulls(row))
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not usable Parquet: {excerpt(str(error))}") from error


def _without_nulls(value: Any) -> Any:
    """Parquet writes a field that a row lacks as null."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".json": _json_array,
    ".parquet": _parquet,
}
