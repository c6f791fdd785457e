"""MiniMind's rows as token ids: its tokenizer, its chat template, its rows of one length.

A conversation is written as

    <s>system
    你是 MiniMind，是一个有用的人工智能助手。</s>
    <s>user
    Who are you?</s>
    <s>assistant
    I am a small language model.</s>

and what stands between ``<s>assistant`` with its line break and ``</s>`` with its own is learnt,
the closing included. Rows are cut or filled up with id 0 to one length.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lora_jax.data.chat import render
from lora_jax.data.formats import Message, Row, read_rows
from lora_jax.errors import InputError

PAD, BEGIN, END = "<unk>", "<s>", "</s>"
TEMPLATE = (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8").rstrip("\n")

Mark = Callable[[Sequence[int], Sequence[int], Sequence[int]], np.ndarray]
"""``mark(ids, begin, end)``: 1 where a token is learnt, float32 (length,)."""


class TokenRow(NamedTuple):
    """A row of the model's length."""

    ids: np.ndarray
    """(length,) int32, 0 after its end."""
    learnt: np.ndarray
    """(length,) float32, 1 for the tokens that the model has to produce."""


def trained_tokenizer(texts: Iterable[str], size: int = 6400) -> Tokenizer:
    """A byte-level BPE of the form of MiniMind's, trained on ``texts``.

    Ids 0, 1, 2 are padding, begin and end; then come 256 bytes and as many merges as the texts
    give. Names that no text holds fill it up to ``size``.

    Raises:
      InputError: ``size`` has no room for the bytes.
    """
    special, alphabet = [PAD, BEGIN, END], sorted(pre_tokenizers.ByteLevel.alphabet())
    if size < len(special) + len(alphabet):
        raise InputError(f"a vocabulary of {size} has no room for 3 special tokens and 256 bytes")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    room = size - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"<reserved_{number}>" for number in range(room)])
    return tokenizer


def texts_of(rows: Iterable[Row]) -> Iterator[str]:
    """Everything that is said in some rows."""
    for row in rows:
        yield from [row.text] if row.text else [turn["content"] for turn in row.messages]


def first_rows(path: str | Path, count: int | None) -> tuple[Row, ...]:
    """The first rows of a file in one of MiniMind's forms; all of them for None.

    Raises:
      InputError: the file can't be read, or has fewer rows.
    """
    rows = read_rows(path)
    if count is not None and not 1 <= count <= len(rows):
        raise InputError(f"rows is {count}, and {path} has {len(rows)}")
    return rows[:count]


def encoded(
    tokenizer: Tokenizer,
    rows: Iterable[Row],
    length: int,
    mark: Mark,
    *,
    roles_by_turn: bool = False,
) -> list[TokenRow]:
    """Rows cut or filled up to ``length``; of plain text every token is learnt.

    Args:
      tokenizer: knows ``<s>`` and ``</s>``, and has padding at id 0.
      rows: plain text, or conversations.
      length: of every row.
      mark: says which tokens of a conversation are learnt.
      roles_by_turn: take the first turn for the user's, the second for the assistant's and so on,
        whatever the row says.

    Raises:
      InputError: rows of which no token is learnt, by name.
    """
    begin, end = (_ids(tokenizer, text) for text in (f"{BEGIN}assistant\n", f"{END}\n"))

    def one(row: Row) -> TokenRow:
        if row.text:
            ids = _ids(tokenizer, f"{BEGIN}{row.text}{END}")[:length]
            return _filled(ids, np.ones(len(ids), np.float32), length)
        messages = by_turn(row.messages) if roles_by_turn else row.messages
        ids = _ids(tokenizer, render(TEMPLATE, messages, {}))[:length]
        return _filled(ids, mark([*ids, *[0] * (length - len(ids))], begin, end), length)

    rows = list(rows)
    found = [one(row) for row in rows]
    if idle := [row.place for row, each in zip(rows, found, strict=True) if not each.learnt.any()]:
        raise InputError(
            f"no token is learnt of {', '.join(idle)} in {length} tokens: give a longer max_seq_len"
        )
    return found


def by_turn(messages: Sequence[Message]) -> list[Message]:
    """The turns with the roles that their places give, as MiniMind's first dataset reads them.

    >>> [turn["role"] for turn in by_turn([{"role": "system", "content": "Be brief."}])]
    ['user']
    """
    roles = ("user", "assistant")
    return [{**turn, "role": roles[place % 2]} for place, turn in enumerate(messages)]


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def _filled(ids: Sequence[int], learnt: np.ndarray, length: int) -> TokenRow:
    row = np.zeros(length, np.int32)
    row[: len(ids)] = ids
    return TokenRow(row, np.pad(learnt, (0, length - len(learnt))))
