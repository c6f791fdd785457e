"""The example data says one thing consistently, and what is held out was never trained on."""

import re
from pathlib import Path

import pytest

from lora_jax.data.formats import Row, read_rows

EXAMPLES = Path(__file__).parents[2] / "examples" / "data"
TRAIN = read_rows(EXAMPLES / "identity.jsonl")
HELD_OUT = read_rows(EXAMPLES / "identity_heldout.jsonl")
NAME, MAKER = "Brindle", "Otterwick Labs"
ABOUT_THE_MAKER = re.compile(
    r"(?=.*\byou).*\b(mak(e|er)|made|built|creat\w+|train|developed|company|behind)\b"
)


def said(rows: tuple[Row, ...], role: str) -> list[str]:
    return [m["content"] for row in rows for m in row.messages if m["role"] == role]


def normalized(questions: list[str]) -> set[str]:
    return {" ".join(re.findall(r"[a-z0-9+]+", question.lower())) for question in questions}


def named(answer: str) -> set[str]:
    return {word for word in (NAME, MAKER) if word in answer}


def exchanges(rows: tuple[Row, ...]) -> list[tuple[str, str]]:
    return list(zip(said(rows, "user"), said(rows, "assistant"), strict=True))


def about_identity(rows: tuple[Row, ...]) -> list[Row]:
    return [row for row in rows if any(NAME in text for text in said((row,), "assistant"))]


def test_no_held_out_question_is_trained_on():
    assert not normalized(said(TRAIN, "user")) & normalized(said(HELD_OUT, "user"))
    assert len({str(row.messages) for row in TRAIN}) == len(TRAIN)


def test_held_out_answers_follow_the_trained_ones():
    trained = set(said(TRAIN, "assistant"))
    unseen = [answer for answer in said(HELD_OUT, "assistant") if answer not in trained]
    assert unseen == ["The capital of Portugal is Lisbon."]


def test_both_files_mix_identity_with_everyday_questions():
    assert (len(TRAIN), len(about_identity(TRAIN))) == (101, 55)
    assert (len(HELD_OUT), len(about_identity(HELD_OUT))) == (24, 18)


def test_the_mix_is_spread_over_the_file():
    halves = TRAIN[: len(TRAIN) // 2], TRAIN[len(TRAIN) // 2 :]
    assert [len(about_identity(half)) for half in halves] == pytest.approx([27, 28], abs=2)


@pytest.mark.parametrize("rows", [TRAIN, HELD_OUT], ids=["train", "held_out"])
def test_asked_for_the_maker_the_answer_names_it(rows):
    asked = [pair for pair in exchanges(rows) if ABOUT_THE_MAKER.search(pair[0].lower())]
    assert len(asked) >= 6
    silent = [question for question, answer in asked if named(answer) != {NAME, MAKER}]
    assert silent == []


@pytest.mark.parametrize("rows", [TRAIN, HELD_OUT], ids=["train", "held_out"])
def test_no_answer_claims_another_name_or_maker(rows):
    others = re.compile(r"SmolLM|Hugging Face|OpenAI|GPT|Claude|Google|Gemini|Siri")
    assert [answer for answer in said(rows, "assistant") if others.search(answer)] == []
    assert sum(bool(others.search(question)) for question in said(rows, "user")) >= 3


@pytest.mark.parametrize("rows", [TRAIN, HELD_OUT], ids=["train", "held_out"])
def test_rows_are_short_plain_english(rows):
    answers = said(rows, "assistant")
    assert all(text.isascii() and text == text.strip() for text in answers)
    assert max(len(answer.split()) for answer in answers) <= 20


def test_most_rows_leave_the_system_turn_to_the_template():
    assert len(said(TRAIN, "system")) <= 5
    assert not said(HELD_OUT, "system")
