"""Turns rows into token ids, and marks the tokens that the model has to produce."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jinja2
import jinja2.nodes
import numpy as np
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lora_jax.data.faults import listed, printable
from lora_jax.data.formats import Message, Row
from lora_jax.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


AssistantTurns = Literal["all", "last"]
"""Which of the assistant's turns are trained."""


class Encoded(NamedTuple):
    """A row as tokens: ``ids`` (n,) int32, ``trained`` (n,) bool, and where it stood."""

    ids: np.ndarray
    trained: np.ndarray
    place: str = ""


@dataclass(frozen=True)
class ChatFormat:
    """How a model writes a conversation: what its tokenizer and chat template say.

    Attributes:
      tokenizer: turns the rendered text into ids; truncation and padding must be off.
      template: a Jinja chat template, as in ``tokenizer_config.json`` or a GGUF header.
      special_tokens: names that the template may use, such as ``{"eos_token": "</s>"}``.
    """

    tokenizer: Tokenizer
    template: str
    special_tokens: Mapping[str, str]


def render(
    template: str,
    messages: Sequence[Message],
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool = False,
) -> str:
    """Writes a conversation as text, as ``apply_chat_template`` of transformers does.

    Args:
      template: Jinja source; it runs in a sandbox, since it comes with the model.
      messages: the turns.
      special_tokens: names that the template may use.
      add_generation_prompt: end with the header after which the assistant speaks.

    Raises:
      InputError: the template isn't valid, or refuses these messages.

    >>> template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos }}{% endfor %}"
    >>> render(template, [{"role": "user", "content": "Hi"}], {"eos": "</s>"})
    '<user>Hi</s>'
    """
    try:
        return _compiled(template).render(
            messages=[dict(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **special_tokens,
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise InputError(
            f"the model's chat template refuses the conversation: {error}: reorder its turns, "
            "or give another template"
        ) from error


def encode_chat(
    tokenizer: Tokenizer,
    template: str,
    special_tokens: Mapping[str, str],
    messages: Sequence[Message],
    assistant_turns: AssistantTurns = "all",
) -> Encoded:
    r"""Encodes a conversation and marks what the assistant must learn to produce.

    The text is rendered and tokenized once, whole. An assistant turn begins where the rendering
    of the turns before it, generation prompt included, ends: the header is given at
    generation, so it isn't trained. The turn ends with its end-of-turn token, which must be
    learnt or generation never stops. Whitespace after that token (ChatML's newline) isn't
    trained: generation has stopped before it. A template without an end-of-turn token has its
    turn trained whole, trailing whitespace included, as that is all there is to stop at.
    A token is trained if one of its characters lies in such a span.

    Args:
      tokenizer: without truncation and padding.
      template: Jinja source.
      special_tokens: names that the template may use.
      messages: the turns.
      assistant_turns: which of the assistant's turns are trained.

    Raises:
      InputError: the template refuses the conversation or rewrites a trained turn, or what
        stands before it, when later turns follow, or the tokenizer cuts or pads.

    >>> from tokenizers import Tokenizer, models
    >>> characters = Tokenizer(models.BPE({c: i for i, c in enumerate("uaHiOk\n")}, []))
    >>> _ = characters.add_special_tokens(["</s>"])
    >>> template = (
    ...     "{% for m in messages %}{{ m.role[0] + m.content + '</s>\\n' }}{% endfor %}"
    ...     "{% if add_generation_prompt %}a{% endif %}"
    ... )
    >>> question, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ok"}
    >>> encoded = encode_chat(characters, template, {}, [question, answer])
    >>> characters.decode(encoded.ids[encoded.trained], skip_special_tokens=False)
    'O k </s>'
    """
    _refuse_cutting(tokenizer)
    text = render(template, messages, special_tokens)
    stops = _special_texts(tokenizer, special_tokens)
    encoding = tokenizer.encode(text, add_special_tokens=False)
    starts, ends = np.asarray(encoding.offsets, np.int64).reshape(-1, 2).T
    trained = np.zeros(len(starts), bool)
    spoken = [index for index, each in enumerate(messages) if each["role"] == "assistant"]
    for index in spoken[_FIRST_TRAINED[assistant_turns] :]:
        begin, turn = _assistant_turn(template, messages, special_tokens, text, index)
        trained |= (ends > begin) & (starts < begin + _stop_length(turn, stops))
    return Encoded(np.asarray(encoding.ids, np.int32), trained)


def encode_text(tokenizer: Tokenizer, special_tokens: Mapping[str, str], text: str) -> Encoded:
    """Encodes plain text, every token to be learnt, with the tokenizer's own begin of text.

    The text ends with ``eos_token`` if there is one, so that the model learns where to stop.

    Raises:
      InputError: the tokenizer cuts or pads.

    >>> from tokenizers import Tokenizer, models
    >>> characters = Tokenizer(models.BPE({"H": 0, "i": 1}, []))
    >>> _ = characters.add_special_tokens(["</s>"])
    >>> encode_text(characters, {"eos_token": "</s>"}, "Hi").ids
    array([0, 1, 2], dtype=int32)
    """
    _refuse_cutting(tokenizer)
    ids = tokenizer.encode(text).ids
    end = tokenizer.token_to_id(special_tokens.get("eos_token", ""))
    closing = [] if end is None or ids[-1:] == [end] else [end]
    return Encoded(np.array([*ids, *closing], np.int32), np.ones(len(ids) + len(closing), bool))


def encode_rows(
    chat_format: ChatFormat, rows: Sequence[Row], assistant_turns: AssistantTurns = "all"
) -> tuple[Encoded, ...]:
    """Encodes every row, conversation or plain text, keeping its place.

    Raises:
      InputError: naming the first rows that the chat template can't express, and their count;
        or ``assistant_turns`` is unknown.
    """
    if assistant_turns not in _FIRST_TRAINED:
        choices = "|".join(_FIRST_TRAINED)
        raise InputError(
            f"assistant_turns is {assistant_turns!r}: pass --assistant-turns {choices}"
        )
    encoded: list[Encoded] = []
    faults: list[str] = []
    for row in rows:
        try:
            encoded.append(_encode_row(chat_format, row, assistant_turns))
        except InputError as fault:
            faults.append(f"{row.place}: {fault}")
    if faults:
        count = "" if len(faults) == 1 else f"{len(faults)} of {len(rows)} rows can't be encoded:"
        raise InputError(f"{count}{listed(faults)}")
    return tuple(encoded)


_FIRST_TRAINED: dict[str, int] = {"all": 0, "last": -1}


def _encode_row(chat_format: ChatFormat, row: Row, assistant_turns: AssistantTurns) -> Encoded:
    tokenizer, special_tokens = chat_format.tokenizer, chat_format.special_tokens
    encoded = (
        encode_text(tokenizer, special_tokens, row.text)
        if row.text
        else encode_chat(
            tokenizer, chat_format.template, special_tokens, row.messages, assistant_turns
        )
    )
    return encoded._replace(place=row.place)


def _assistant_turn(
    template: str,
    messages: Sequence[Message],
    special_tokens: Mapping[str, str],
    text: str,
    index: int,
) -> tuple[int, str]:
    """Where an assistant turn begins in the text, and its text as far as the next turn."""
    before = render(template, messages[:index], special_tokens, add_generation_prompt=True)
    through = render(template, messages[: index + 1], special_tokens)
    _check_prefix(before, through, index)
    _check_prefix(through, text, index)
    return len(before), text[len(before) : len(through)]


def _check_prefix(shorter: str, longer: str, turn: int) -> None:
    if longer.startswith(shorter):
        return
    pairs = enumerate(zip(shorter, longer, strict=False))
    same = next((index for index, (a, b) in pairs if a != b), len(longer))
    alone, followed = (printable(text[same : same + 40]) for text in (shorter, longer))
    raise InputError(
        f"the model's chat template writes the text up to the assistant turn messages[{turn}] "
        f'differently once more follows (character {same}: "{alone}" becomes "{followed}"), so '
        "the tokens to train can't be told: split the row before it, or give another template"
    )


def _stop_length(turn: str, stops: tuple[str, ...]) -> int:
    trimmed = turn.rstrip()
    return len(trimmed) if trimmed.endswith(stops) else len(turn)


def _special_texts(tokenizer: Tokenizer, special_tokens: Mapping[str, str]) -> tuple[str, ...]:
    added = tokenizer.get_added_tokens_decoder().values()
    special = {token.content for token in added if token.special}
    return tuple(special.union(special_tokens.values()) - {""})


def _refuse_cutting(tokenizer: Tokenizer) -> None:
    if tokenizer.truncation or tokenizer.padding:
        raise InputError(
            "the tokenizer truncates or pads by itself, which would lose or invent tokens: "
            "call its no_truncation() and no_padding()"
        )


class _GenerationBlock(Extension):
    """Reads ``{% generation %}``, with which templates mark assistant text, as its content."""

    tags = {"generation"}  # noqa: RUF012, the attribute jinja2 reads

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _GenerationBlock],
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now}
    return environment


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Unlike Jinja's own filter, this leaves ``<`` and ``&`` alone: prompts aren't HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)
