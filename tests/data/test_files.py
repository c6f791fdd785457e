"""JSON arrays and Parquet files; JSON Lines is tested with the formats."""

import json
import sys

import pyarrow
import pyarrow.parquet
import pytest

from lora_jax.data import files
from lora_jax.data.formats import read_file, read_rows
from lora_jax.errors import InputError

TEXTS = [{"text": "one"}, {"text": "two"}, {"text": "drei ü"}]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_an_array_is_read_as_json_lines_are(tmp_path, indent, newline):
    array, lines = tmp_path / "rows.json", tmp_path / "rows.jsonl"
    array.write_text(json.dumps(TEXTS, indent=indent), encoding="utf-8", newline=newline)
    lines.write_text("".join(json.dumps(row) + "\n" for row in TEXTS), encoding="utf-8")
    assert [row.text for row in read_rows(array)] == [row.text for row in read_rows(lines)]
    starts = [1, 1, 1] if indent is None else [2, 5, 8]
    assert [row.line for row in read_rows(array)] == starts


def test_json_lines_may_be_called_json(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    assert [row.line for row in read_rows(file)] == [1, 2, 3]


# The file, and how the message begins after its name.
ARRAYS = {
    "missing_field": ('[{"text": "a"},\n {"txt": "b"}]', ":2:2: the row is of no known format"),
    "wrong_type": ('[\n {"text":\n  3}\n]', ":3:3: text must be a string, got number"),
    "duplicate": ('[{"text": "a",\n"text": "b"}]', ':2:1: duplicate key "text": keep one'),
    "nan": ('[\n{"text": NaN}]', ":2:1: not usable JSON (NaN is no number in JSON)"),
    "not_an_object": ('["a"]', ":1:2: the row must be an object, got string"),
    "syntax": ('[{"text": "a"},\n {"text": }]', ":2:11: not JSON (Expecting value)"),
    "no_comma": ('[{"text": "a"}\n{"text": "b"}]', ":2:1: not JSON (expected a comma"),
    "trailing_comma": ('[{"text": "a"},]', ":1:16: not JSON (Expecting value)"),
    "cut": ('[{"text": "a"}, {"text": "b', ":1:26: not JSON (Unterminated string"),
    "cut_between": ('[{"text": "a"}', ":1:15: not JSON (expected a comma or the array's end: was"),
    "two_arrays": ('[{"text": "a"}]\n[]', ":2:1: not JSON (more follows the array)"),
    "nul": ('[{"text": "a"},\n{"text": "\0"}]', ":2:11: holds a NUL byte"),
    "latin_1": (b'[{"text": "a"},\n{"text": "\xe9"}]', ":2:11: not UTF-8 (byte 0xe9)"),
    "byte_order_mark": ('\ufeff[{"text": "a"}]', ":1:1: starts with a byte order mark"),
    "nested_deeply": ("[" * 200_000, ":1:2: not usable JSON (nested too deeply)"),
    "empty": ("[]", " is empty: give one row a line"),
    "object": ('{\n"text": "a"\n}', None),
}


@pytest.mark.parametrize("fault", ARRAYS)
def test_a_fault_in_an_array_is_named_with_its_place(tmp_path, fault):
    content, expected = ARRAYS[fault]
    file = tmp_path / "rows.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        read_rows(file)
    message = str(caught.value)
    assert message.startswith(f"{file}{expected}" if expected else "3 of 3 rows can't be used:")
    assert len(message.split(": ")[-1]) <= 83


def test_bad_elements_of_an_array_can_be_skipped_but_bad_syntax_cannot(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text('[{"text": "a"}, {"text": 3}, {"text": "b", "text": "c"}, {"text": "d"}]')
    found = read_file(file, skip_bad_lines=2)
    assert [row.text for row in found.rows] == ["a", "d"]
    assert len(found.skipped) == 2
    file.write_text('[{"text": "a"}, {"text": }, {"text": "d"}]')
    with pytest.raises(InputError, match="not JSON"):
        read_file(file, skip_bad_lines=2)


def test_an_array_too_large_to_hold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_ARRAY_BYTES", 10)
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(TEXTS))
    with pytest.raises(InputError, match="larger than 10 bytes: save it as JSON Lines"):
        read_rows(file)


def parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


def test_parquet_is_read_as_json_lines_are(tmp_path):
    rows = [{"messages": CHAT}] * 5
    found = read_rows(parquet(tmp_path / "rows.parquet", rows))
    assert [row.messages for row in found] == [tuple(CHAT)] * 5
    assert [row.place for row in found][-1] == f"{tmp_path / 'rows.parquet'}:5"
    assert [row.text for row in read_rows(parquet(tmp_path / "b.parquet", TEXTS))] == [
        "one", "two", "drei ü"]  # fmt: skip


def test_fields_that_a_parquet_row_lacks_are_null_and_left_out(tmp_path):
    rows = [
        {"instruction": "a", "input": None, "output": "b"},
        {"instruction": "a", "input": "c", "output": "b"},
    ]
    first, second = read_rows(parquet(tmp_path / "rows.parquet", rows))
    assert first.messages[0]["content"] == "a"
    assert second.messages[0]["content"] == "a\n\nc"


def test_faults_in_parquet_name_the_row_and_show_it(tmp_path):
    file = parquet(tmp_path / "rows.parquet", [{"text": "a"}, {"text": " "}, {"text": "b"}])
    with pytest.raises(InputError) as caught:
        read_rows(file)
    assert str(caught.value) == f'{file}:2: text is blank: remove the row: {{"text": " "}}'
    assert len(read_file(file, skip_bad_lines=1).rows) == 2


@pytest.mark.parametrize("cut", [0, 3, 200])
def test_parquet_cut_short_is_an_input_error(tmp_path, cut):
    file = parquet(tmp_path / "rows.parquet", TEXTS)
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(InputError, match=r"rows\.parquet"):
        read_rows(file)


def test_parquet_with_flipped_bytes_is_an_input_error_or_read(tmp_path):
    file = parquet(tmp_path / "rows.parquet", TEXTS)
    content = file.read_bytes()
    refused = 0
    for at in range(0, len(content), 7):
        file.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
        try:
            read_rows(file)
        except InputError:
            refused += 1
    assert refused > 5


def test_without_pyarrow_the_message_says_what_to_install(tmp_path, monkeypatch):
    file = parquet(tmp_path / "rows.parquet", TEXTS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"takes pyarrow: pip install 'lora-jax\[parquet\]'"):
        read_rows(file)
