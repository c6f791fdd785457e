import json

import pytest

from lora_jax.data import formats
from lora_jax.data.formats import read_rows
from lora_jax.errors import InputError

GOOD = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}'


def chat(*turns: tuple[object, object], **extra: object) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    return json.dumps({"messages": messages} | extra)


# What stands in line 2, the column reported (None: none), and what the message must say.
FAULTS = {
    "not_json": (b'{"messages": [,]}', 15, ["not JSON", "Expecting value"]),
    "trailing_comma": (GOOD[:-1].encode() + b",}", len(GOOD) + 1, ["not JSON"]),
    "two_objects": (GOOD.encode() * 2, len(GOOD) + 1, ["not JSON", "Extra data"]),
    "array": (b"[1, 2]", None, ["must be an object", "got array"]),
    "number": (b"3", None, ["must be an object", "got number"]),
    "empty_line": (b"", None, ["the line is empty", "remove it"]),
    "no_messages": (b'{"text": "Hi"}', None, ['lacks "messages"', 'has "text"']),
    "no_field": (b"{}", None, ['lacks "messages"', "has no field"]),
    "messages_null": (b'{"messages": null}', None, ["messages must be an array", "got null"]),
    "messages_object": (b'{"messages": {}}', None, ["messages must be an array", "got object"]),
    "messages_empty": (b'{"messages": []}', None, ["messages is empty"]),
    "message_string": (b'{"messages": ["Hi"]}', None, ["messages[0] must be an object", "string"]),
    "no_content": (b'{"messages": [{"role": "user"}]}', None, ['messages[0] lacks "content"']),
    "no_role": (b'{"messages": [{"content": ""}]}', None, ['messages[0] lacks "role"']),
    "content_number": (
        chat(("assistant", 7)).encode(),
        None,
        ["messages[0].content must be a string", "got number"],
    ),
    "content_parts": (
        chat(("user", [{"type": "text"}])).encode(),
        None,
        ["messages[0].content must be a string", "got array"],
    ),
    "role_boolean": (chat((True, "")).encode(), None, ["messages[0].role", "got boolean"]),
    "unknown_role": (
        chat(("user", "Hi"), ("bot", "Yo")).encode(),
        None,
        ['messages[1].role is "bot"', "use system, user, assistant"],
    ),
    "role_case": (chat(("User", "Hi")).encode(), None, ['messages[0].role is "User"']),
    "no_assistant": (chat(("user", "Hi")).encode(), None, ["no assistant turn", "add one"]),
    "blank_answer": (
        chat(("user", "Hi"), ("assistant", " \n")).encode(),
        None,
        ["messages[1].content is blank"],
    ),
    "unknown_field": (
        chat(("assistant", "Hi"), tools=[]).encode(),
        None,
        ['the line has "tools"', "remove it"],
    ),
    "unknown_message_field": (
        b'{"messages": [{"role": "user", "content": "Hi", "name": "Al"}]}',
        None,
        ['messages[0] has "name"', "remove it"],
    ),
    "duplicate_key": (
        b'{"messages": [], "messages": []}',
        None,
        ['duplicate key "messages"', "keep one"],
    ),
    "duplicate_inner_key": (
        b'{"messages": [{"role": "user", "role": "user", "content": "Hi"}]}',
        None,
        ['duplicate key "role"'],
    ),
    "byte_order_mark": (b"\xef\xbb\xbf" + GOOD.encode(), 1, ["byte order mark", "without BOM"]),
    "nul_byte": (b'{"mess\x00ages": []}', 7, ["NUL byte", "UTF-8"]),
    "nul_escape": (
        chat(("assistant", "a\0b")).encode(),
        None,
        ["messages[0].content holds a NUL character"],
    ),
    "half_surrogate": (
        chat(("assistant", "\ud83d")).encode(),
        None,
        ["messages[0].content holds half of a surrogate pair"],
    ),
    "latin_1": ('{"messages": "é"}'.encode("latin-1"), 15, ["not UTF-8", "0xe9"]),
    "utf_16": (GOOD.encode("utf-16"), None, ["save the file as UTF-8"]),
    "nested_deeply": (b"[" * 200_000, None, ["nested too deeply"]),
    "huge_integer": (b"1" * 5000, None, ["not usable JSON"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_line_is_named_with_its_place_and_its_remedy(tmp_path, fault):
    line, column, expected = FAULTS[fault]
    file = tmp_path / "chat.jsonl"
    file.write_bytes(b"\n".join([GOOD.encode(), line, GOOD.encode(), b""]))
    with pytest.raises(InputError) as caught:
        read_rows(file)
    message = str(caught.value)
    place = f"{file}:2:" if column is None else f"{file}:2:{column}:"
    assert message.startswith(place)
    assert all(text in message for text in expected)
    assert "\n" not in message
    assert message.isprintable()


def test_good_rows_keep_their_file_and_line(tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text(f"{GOOD}\n{GOOD}\n")
    rows = read_rows(file)
    assert [row.place for row in rows] == [f"{file}:1", f"{file}:2"]
    assert rows[1].messages == tuple(json.loads(GOOD)["messages"])


@pytest.mark.parametrize(
    "text", [f"{GOOD}\r\n{GOOD}\r\n", f"{GOOD}\n{GOOD}", f"  {GOOD}\n{GOOD}\t\n"]
)
def test_windows_lines_and_a_missing_last_newline_are_fine(tmp_path, text):
    file = tmp_path / "chat.jsonl"
    file.write_text(text, newline="")
    assert [row.messages for row in read_rows(file)] == [tuple(json.loads(GOOD)["messages"])] * 2


@pytest.mark.parametrize(
    "content", ["漢字 🙂", "line\u2028separator\u2029\x85", '"quotes" \\ and\ttabs\n', "{% x %}"]
)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_content_arrives_as_written(tmp_path, content, ascii_only):
    row = {"messages": [{"role": "assistant", "content": content}]}
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps(row, ensure_ascii=ascii_only) + "\n", encoding="utf-8")
    assert read_rows(file)[0].messages[0]["content"] == content


@pytest.mark.parametrize("cut", [1, 20, len(GOOD) - 1])
def test_a_file_cut_short_says_so(tmp_path, cut):
    file = tmp_path / "chat.jsonl"
    file.write_text(f"{GOOD}\n{GOOD[:cut]}")
    with pytest.raises(InputError, match=r"chat\.jsonl:2:\d+: not JSON .*was it cut short\?"):
        read_rows(file)


def test_the_cut_is_not_suspected_within_the_file(tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text(f"{GOOD[:20]}\n{GOOD}\n")
    with pytest.raises(InputError) as caught:
        read_rows(file)
    assert "cut short" not in str(caught.value)


def test_an_absurdly_long_line_is_named_and_the_next_one_still_read(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_LINE_BYTES", 1000)
    file = tmp_path / "chat.jsonl"
    file.write_text(f"{chat(('assistant', 'a' * 5000))}\n{GOOD}\n[]\n{'x' * 3000}")
    with pytest.raises(InputError) as caught:
        read_rows(file)
    message = str(caught.value)
    assert f"{file}:1: the line is longer than 1000 bytes" in message
    assert f"{file}:3: the line must be an object" in message
    assert f"{file}:4: the line is longer" in message
    assert "3 of 4 lines" in message


def test_the_line_limit_counts_the_whole_line(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_LINE_BYTES", len(GOOD) + 1)
    file = tmp_path / "chat.jsonl"
    file.write_text(f"{GOOD}\n{GOOD}\n")
    assert len(read_rows(file)) == 2


def test_all_bad_lines_are_counted_and_the_first_five_shown(tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join([GOOD, *["[]"] * 7, GOOD]) + "\n")
    with pytest.raises(InputError) as caught:
        read_rows(file)
    message = str(caught.value)
    assert message.startswith("7 of 9 lines can't be used:")
    assert [f"{file}:{line}:" in message for line in range(1, 10)] == (
        [False] + [True] * 5 + [False] * 3
    )
    assert message.endswith("and 2 more")


def test_an_excerpt_has_at_most_80_characters_and_no_terminal_escapes(tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text("\x1b[31m" + "é" * 200 + "\n")
    with pytest.raises(InputError) as caught:
        read_rows(file)
    message = str(caught.value)
    assert "\x1b" not in message
    assert message.endswith(": \\x1b[31m" + "é" * 75 + "...")


@pytest.mark.parametrize("content", ["", "\ufeff"])
def test_a_file_without_rows_is_refused(tmp_path, content):
    file = tmp_path / "chat.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"chat\.jsonl"):
        read_rows(file)


def test_an_empty_file_is_called_empty(tmp_path):
    file = tmp_path / "chat.jsonl"
    file.touch()
    with pytest.raises(InputError, match="is empty: give one conversation a line"):
        read_rows(file)


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_a_path_that_is_no_file_is_named(tmp_path, name):
    with pytest.raises(InputError, match=r"can't read .*: pass a JSONL file"):
        read_rows(tmp_path / name)
