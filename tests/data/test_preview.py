import numpy as np
import pytest
from rich.console import Console

from lora_jax.data.chat import ChatFormat, Encoded, encode_rows
from lora_jax.data.formats import Row
from lora_jax.data.preview import TRAINED_STYLE, preview, summary

import templates

ROWS = [
    Row(
        (
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ),
        "chat.jsonl",
        line,
    )
    for line, (question, answer) in enumerate(
        [("Who are you?", "An assistant. 🙂"), ("Hi\x1b[2J", "Hello\nthere!"), ("Bye", "Bye!")],
        start=1,
    )
]


@pytest.fixture(scope="session")
def chat_format(tokenizer, special_tokens) -> ChatFormat:
    return ChatFormat(tokenizer, templates.CHATML, special_tokens)


def test_without_colour_trained_text_stands_in_brackets(chat_format):
    first, second, _ = encode_rows(chat_format, ROWS)
    assert str(preview(ROWS, chat_format, 2, colour=False)).startswith(
        f"chat.jsonl:1: {len(first.ids)} tokens, {first.trained.sum()} trained\n"
        "<|im_start|>user\nWho are you?<|im_end|>\n"
        "<|im_start|>assistant\n⟦An assistant. 🙂<|im_end|>⟧\n\n\n"
        f"chat.jsonl:2: {len(second.ids)} tokens, {second.trained.sum()} trained\n"
        "<|im_start|>user\nHi\\x1b[2J<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hello\nthere!<|im_end|>⟧\n"
    )


def test_with_colour_exactly_the_trained_text_is_coloured(chat_format):
    text = preview(ROWS, chat_format, 3, colour=True)
    coloured = [
        text.plain[span.start : span.end] for span in text.spans if span.style == TRAINED_STYLE
    ]
    assert coloured == [
        "An assistant. 🙂<|im_end|>",
        "Hello\nthere!<|im_end|>",
        "Bye!<|im_end|>",
    ]
    assert "⟦" not in text.plain


def test_a_terminal_gets_escape_codes_and_a_pipe_none(chat_format):
    for terminal in (True, False):
        console = Console(force_terminal=terminal, color_system="truecolor" if terminal else None)
        colour = console.color_system is not None
        with console.capture() as captured:
            console.print(preview(ROWS, chat_format, 1, colour=colour))
        assert ("\x1b[" in captured.get()) == terminal
        assert ("⟦" in captured.get()) != terminal


def test_the_statistics_count_all_rows_whatever_is_shown(chat_format):
    text = str(preview(ROWS, chat_format, 1, colour=False))
    assert text.endswith(summary(encode_rows(chat_format, ROWS)))
    assert "chat.jsonl:2" not in text


def test_the_statistics_are_those_of_the_rows():
    rows = [Encoded(np.zeros(n, np.int32), np.arange(n) < 1) for n in range(1, 101)]
    assert summary(rows) == (
        "100 rows, 5050 tokens, 100 trained (2%)\ntokens a row: min 1, median 51, p95 96, max 100"
    )
