"""Answers to prompts, as text."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from lora_jax.cli.base import Base
from lora_jax.data.chat import render
from lora_jax.errors import InputError
from lora_jax.models.generate import LanguageModel, generate


class Sampling(NamedTuple):
    """How the next token is chosen; greedy unless a temperature is given."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


def prompt_ids(base: Base, prompt: str) -> list[int]:
    """A user's question as the tokens after which the assistant speaks."""
    if _is_broken(prompt):
        raise InputError(f"prompt {prompt!r} is not UTF-8: give it in that encoding")
    tokenizer, template, special = base.chat.tokenizer, base.chat.template, base.chat.special_tokens
    messages = [{"role": "user", "content": prompt}]
    text = render(template, messages, special, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False).ids


def _is_broken(text: str) -> bool:
    """Whether the text came from bytes that were not UTF-8, which Python keeps as surrogates."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def answers(
    base: Base,
    model: LanguageModel,
    params: Any,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008, a frozen value
) -> list[str]:
    """One answer a prompt, all in one batch.

    Raises:
      InputError: a prompt is not UTF-8, or a number of ``sampling`` is out of its range.
    """
    if not 0 <= sampling.seed < 2**32:
        raise InputError(f"seed is {sampling.seed}: give 0 to {2**32 - 1}")
    tokens = generate(
        model,
        params,
        [prompt_ids(base, prompt) for prompt in prompts],
        max_new_tokens=max_new_tokens,
        eos_ids=base.eos_ids,
        key=jax.random.key(sampling.seed),
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
    )
    return [base.chat.tokenizer.decode(row).strip() for row in tokens]
