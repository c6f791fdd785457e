"""Answers to prompts, as text."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from lora_jax.cli.base import Base
from lora_jax.data.chat import render
from lora_jax.models.generate import LanguageModel, generate


class Sampling(NamedTuple):
    """How the next token is chosen; greedy unless a temperature is given."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


def prompt_ids(base: Base, prompt: str) -> list[int]:
    """A user's question as the tokens after which the assistant speaks."""
    tokenizer, template, special = base.chat.tokenizer, base.chat.template, base.chat.special_tokens
    messages = [{"role": "user", "content": prompt}]
    text = render(template, messages, special, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False).ids


def answers(
    base: Base,
    model: LanguageModel,
    params: Any,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008, a frozen value
) -> list[str]:
    """One answer a prompt, all in one batch."""
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
