import json

import pytest

from lora_jax.data import files
from lora_jax.data.formats import read_file, read_rows
from lora_jax.errors import InputError

GOOD = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}'


def chat(*turns: tuple[object, object], **extra: object) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    return json.dumps({"messages": messages} | extra)


# What stands in line 2, where in it the fault is reported, and what the message must say.
FAULTS = {
    "not_json": (b'{"messages": [,]}', ",", ["not JSON", "Expecting value"]),
    "trailing_comma": (b'{"text": "a",}', "}", ["not JSON"]),
    "two_objects": (b'{"text": "a"} {"text": "b"}', '{"text": "b', ["not JSON", "one row a line"]),
    "array": (b"[1, 2]", "[", ["the row must be an object", "got array"]),
    "number": (b"  3", "3", ["must be an object", "got number"]),
    "empty_line": (b"", "", ["the line is empty", "remove it"]),
    "no_format": (
        b'{"question": "Hi", "answer": "Yo"}',
        "{",
        ["is of no known format", 'has "question", "answer"', '"messages"; "conversations"'],
    ),
    "half_a_format": (
        b'{"instruction": "Hi", "response": "Yo"}',
        "{",
        ['has "instruction", "response"', '"instruction", "output" ("input", "system")'],
    ),
    "no_field": (b"{}", "{", ["no known format", "has no field"]),
    "two_formats": (
        b'{"text": "a", "messages": []}',
        "{",
        ["mixes the fields of several formats", 'has "text", "messages"'],
    ),
    "another_format": (
        b'{"text": "a"}',
        "{",
        ['the row has "text"', 'that in line 1 has "messages"', "keep one format"],
    ),
    "messages_null": (b'{"messages": null}', "null", ["messages must be an array", "got null"]),
    "messages_object": (b'{"messages": {}}', "{}", ["messages must be an array", "got object"]),
    "messages_empty": (b'{"messages": []}', "[]", ["messages is empty"]),
    "message_string": (
        b'{"messages": ["Hi"]}',
        '"Hi"',
        ["messages[0] must be an object", "string"],
    ),
    "no_content": (
        b'{"messages": [{"role": "user"}]}',
        '{"role"',
        ['messages[0] lacks "content"'],
    ),
    "no_role": (b'{"messages": [{"content": ""}]}', '{"content"', ['messages[0] lacks "role"']),
    "content_number": (
        chat(("assistant", 7)).encode(),
        "7",
        ["messages[0].content must be a string", "got number"],
    ),
    "content_parts": (
        chat(("user", [{"type": "text"}])).encode(),
        '[{"type"',
        ["messages[0].content must be a string", "got array"],
    ),
    "role_boolean": (chat((True, "")).encode(), "true", ["messages[0].role", "got boolean"]),
    "unknown_role": (
        chat(("user", "Hi"), ("bot", "Yo")).encode(),
        '"bot"',
        ['messages[1].role is "bot"', "use system, user, assistant"],
    ),
    "role_case": (chat(("User", "Hi")).encode(), '"User"', ['messages[0].role is "User"']),
    "no_assistant": (
        chat(("user", "Hi")).encode(),
        '[{"role"',
        ["no assistant turn", "add one"],
    ),
    "blank_answer": (
        chat(("user", "Hi"), ("assistant", " \n")).encode(),
        r'" \n"',
        ["messages[1].content is blank"],
    ),
    "unknown_field": (
        chat(("assistant", "Hi"), tools=[1]).encode(),
        "[1]",
        ['the row has "tools"', "remove it, or pass --ignore-fields"],
    ),
    "unknown_message_field": (
        b'{"messages": [{"role": "user", "content": "Hi", "name": "Al"}]}',
        '"Al"',
        ['messages[0] has "name"', "remove it"],
    ),
    "duplicate_key": (
        b'{"messages": [1, {}], "messages": []}',
        '"messages": []',
        ['duplicate key "messages"', "keep one"],
    ),
    "duplicate_inner_key": (
        b'{"messages": [{"role": "a", "content": ""}, {"role": "b", "role": "c"}]}',
        '"role": "c"',
        ['duplicate key "role"'],
    ),
    "byte_order_mark": (b"\xef\xbb\xbf" + GOOD.encode(), "", ["byte order mark", "without BOM"]),
    "nul_byte": (b'{"mess\x00ages": []}', "\0", ["NUL byte", "UTF-8"]),
    "nul_after_umlauts": ('{"ääh": "\0"}'.encode(), "\0", ["NUL byte"]),
    "nul_escape": (
        chat(("assistant", "a\0b")).encode(),
        r'"a\u0000b"',
        ["messages[0].content holds a NUL character"],
    ),
    "half_surrogate": (
        chat(("assistant", "\ud83d")).encode(),
        r'"\ud83d"',
        ["messages[0].content holds half of a surrogate pair"],
    ),
    "latin_1": ('{"messages": "ö'.encode() + b'\xe9"}', r"\xe9", ["not UTF-8", "0xe9"]),
    "utf_16": (GOOD.encode("utf-16"), "", ["save the file as UTF-8"]),
    "nested_deeply": (b"[" * 200_000, "[", ["nested too deeply"]),
    "nested_below_the_limit": (
        b'{"text": ' + b"[" * 300 + b"]" * 300 + b"}",
        "[[",
        ["text must be a string, got array"],
    ),
    "huge_integer": (b"1" * 5000, "1", ["not usable JSON"]),
    "huge_float": (b'{"text": 1e999}', "1e999", ["text must be a string, got number"]),
    "not_a_number": (b'{"text": NaN}', "{", ["NaN is no number in JSON"]),
    "infinity": (b'{"text": -Infinity}', "{", ["-Infinity is no number in JSON"]),
    "alpaca_null": (
        b'{"instruction": "a", "input": null, "output": "b"}',
        "null",
        ["input must be a string, got null"],
    ),
    "alpaca_blank": (
        b'{"instruction": "a", "output": " "}',
        '" "',
        ["output is blank: an assistant turn must say something"],
    ),
    "completion_number": (
        b'{"prompt": "a", "completion": 3}',
        "3",
        ["completion must be a string, got number"],
    ),
    "text_blank": (b'{"text": "\\n"}', r'"\n"', ["text is blank"]),
    "other_naming": (
        b'{"conversations": [{"from": "human", "content": "a"}]}',
        '{"from"',
        ['conversations[0] lacks "value"'],
    ),
    "unknown_speaker": (
        b'{"conversations": [{"from": "bing", "value": "a"}]}',
        '"bing"',
        ['conversations[0].from is "bing"', "use human, gpt, system, user, assistant"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_line_is_named_with_its_place_and_its_remedy(tmp_path, fault):
    line, pointed, expected = FAULTS[fault]
    file = tmp_path / "chat.jsonl"
    file.write_bytes(b"\n".join([GOOD.encode(), line, GOOD.encode(), b""]))
    with pytest.raises(InputError) as caught:
        read_rows(file)
    message = str(caught.value)
    text = line.decode("utf-8", "backslashreplace")
    assert message.startswith(f"{file}:2:{text.index(pointed) + 1}: ")
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
    with pytest.raises(InputError, match=r"chat\.jsonl:2:\d+: not JSON .*was the file cut short\?"):
        read_rows(file)


def test_the_cut_is_not_suspected_within_the_file(tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text(f"{GOOD[:20]}\n{GOOD}\n")
    with pytest.raises(InputError) as caught:
        read_rows(file)
    assert "cut short" not in str(caught.value)


def test_an_absurdly_long_line_is_named_and_the_next_one_still_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 1000)
    file = tmp_path / "chat.jsonl"
    file.write_text(f"{chat(('assistant', 'a' * 5000))}\n{GOOD}\n[]\n{'x' * 3000}")
    with pytest.raises(InputError) as caught:
        read_rows(file)
    message = str(caught.value)
    assert f"{file}:1:1: the line is longer than 1000 bytes" in message
    assert f"{file}:3:1: the row must be an object" in message
    assert f"{file}:4:1: the line is longer" in message
    assert "3 of 4 rows" in message


def test_the_line_limit_counts_the_whole_line(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_LINE_BYTES", len(GOOD) + 1)
    file = tmp_path / "chat.jsonl"
    file.write_text(f"{GOOD}\n{GOOD}\n")
    assert len(read_rows(file)) == 2


def test_all_bad_lines_are_counted_and_the_first_five_shown(tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join([GOOD, *["[]"] * 7, GOOD]) + "\n")
    with pytest.raises(InputError) as caught:
        read_rows(file)
    message = str(caught.value)
    assert message.startswith("7 of 9 rows can't be used:")
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
    with pytest.raises(InputError, match="is empty: give one row a line"):
        read_rows(file)


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_a_path_that_is_no_file_is_named(tmp_path, name):
    with pytest.raises(InputError, match=r"can't read .*: pass a JSONL, JSON or Parquet file"):
        read_rows(tmp_path / name)


def written(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


SAID = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo"},
)
FORMS = {
    "messages": ({"messages": SAID}, SAID),
    "conversations_from_value": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Yo"},
            ]
        },
        SAID,
    ),
    "conversations_role_content": ({"conversations": SAID}, SAID),
    "conversations_system": ({"conversations": SAID[1:], "system": "Be brief."}, SAID),
    "alpaca": ({"instruction": "Hi", "output": "Yo"}, SAID[1:]),
    "alpaca_system": ({"system": "Be brief.", "instruction": "Hi", "output": "Yo"}, SAID),
    "alpaca_empty_input": ({"instruction": "Hi", "input": " ", "output": "Yo"}, SAID[1:]),
    "alpaca_input": (
        {"instruction": "Add", "input": "1 and 2", "output": "3"},
        (
            {"role": "user", "content": "Add\n\n1 and 2"},
            {"role": "assistant", "content": "3"},
        ),
    ),
    "prompt_and_completion": ({"prompt": "Hi", "completion": "Yo"}, SAID[1:]),
    "text": ({"text": "Once upon a time."}, ()),
}


@pytest.mark.parametrize("form", FORMS)
def test_formats_are_found_by_their_keys(tmp_path, form):
    row, messages = FORMS[form]
    (found,) = read_rows(written(tmp_path / "rows.jsonl", row))
    assert found.messages == messages
    assert found.text == row.get("text", "")


def test_fields_can_be_ignored_by_name_and_only_by_name(tmp_path):
    row = {"text": "a", "id": 7, "meta": {"url": "b"}}
    file = written(tmp_path / "rows.jsonl", row)
    assert [r.text for r in read_file(file, ignore_fields=("id", "meta")).rows] == ["a"]
    with pytest.raises(InputError, match='the row has "meta", which nothing reads'):
        read_file(file, ignore_fields=("id",))


def test_bad_lines_are_skipped_only_as_far_as_allowed_and_reported(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join([GOOD, "{", GOOD, "[]", GOOD]) + "\n")
    found = read_file(file, skip_bad_lines=2)
    assert [row.line for row in found.rows] == [1, 3, 5]
    assert [fault.split(": ")[0] for fault in found.skipped] == [f"{file}:2:2", f"{file}:4:1"]
    with pytest.raises(InputError, match=r"2 of 5 rows can't be used, --skip-bad-lines allows 1:"):
        read_file(file, skip_bad_lines=1)


def test_skipping_every_row_is_an_error(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("{\n[]\n")
    with pytest.raises(InputError, match=r"no usable row of 2"):
        read_file(file, skip_bad_lines=9)


def test_a_skipped_row_does_not_decide_the_format(tmp_path):
    file = written(tmp_path / "rows.jsonl", {"text": ""}, {"prompt": "a", "completion": "b"})
    assert len(read_file(file, skip_bad_lines=1).rows) == 1
