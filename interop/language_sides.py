"""One language model in JAX and in transformers: what it computes on rows, and how it answers."""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

import lora_jax as lora
from interop.decoder_sides import decoder_function
from lora_jax.adapter import Adapter
from lora_jax.models.config import DecoderConfig
from lora_jax.models.generate import LanguageModel, generate, language_model
from lora_jax.site import Plan

Rows = Sequence[Sequence[int]]
_WIDTH_STEP = 64  # so that few widths are compiled


class Trace(NamedTuple):
    """What a model computes on rows, without what padding gave."""

    hidden: np.ndarray  # float32 (layers, positions, hidden)
    logits: np.ndarray  # float32 (positions, vocab)


class Side(NamedTuple):
    """A model in one framework: what it answers, and what it computes on given rows."""

    answers: Callable[[Rows, int], list[list[int]]]
    trace: Callable[[Rows], Trace]


def adapted_side(config: DecoderConfig, plan: Plan, both: tuple[Any, Adapter]) -> Side:
    """Our decoder with an adapter; ``both`` are base parameters and adapter."""

    def on_both(model_fn: Callable[..., Any]) -> Callable[..., Any]:
        adapted = lora.adapt(model_fn, plan)
        return lambda both, *rest: adapted(*both, *rest)

    language = language_model(config)
    language = language._replace(apply=on_both(language.apply))
    return our_side(language, jax.jit(on_both(forward_of(config))), both)


def our_side(language: LanguageModel, forward: Callable[..., Any], parameters: Any) -> Side:
    """A model of ours; ``forward(parameters, tokens)`` gives hidden states and logits."""

    def answers(prompts: Rows, count: int) -> list[list[int]]:
        return generate(language, parameters, prompts, max_new_tokens=count)

    longest = language.max_positions
    return Side(answers, lambda rows: _trimmed(rows, partial(forward, parameters), longest))


@functools.cache
def forward_of(config: DecoderConfig) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Hidden states of every layer and logits; the same function for equal configs."""

    logits_and_layers = decoder_function(config, layers="hidden")

    @jax.jit
    def forward(params: Any, tokens: Any) -> tuple[Any, Any]:
        logits, layers = logits_and_layers(params, tokens)
        return layers["hidden"], logits

    return forward


def torch_side(model: Any, blocks: Any) -> Side:
    """A transformers model, or a PEFT model around it, with the list of its ``blocks``."""
    import torch

    def forward(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        hidden = []
        hooks = [
            layer.register_forward_hook(lambda _, __, output: hidden.append(output))
            for layer in blocks
        ]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(tokens, dtype=torch.long), use_cache=False).logits
        for hook in hooks:
            hook.remove()
        return torch.stack(hidden).numpy(), logits.numpy()

    longest = model.config.max_position_embeddings
    return Side(partial(_torch_answers, model), lambda rows: _trimmed(rows, forward, longest))


def _torch_answers(model: Any, prompts: Rows, count: int) -> list[list[int]]:
    """One batch, padded on the left as ``generate`` wants it."""
    import torch
    from transformers import GenerationConfig

    width = max(map(len, prompts))
    padding = [width - len(prompt) for prompt in prompts]
    rows = zip(padding, prompts, strict=True)
    output = model.generate(
        input_ids=torch.tensor([[0] * pad + [*prompt] for pad, prompt in rows]),
        attention_mask=torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding]),
        generation_config=GenerationConfig(
            do_sample=False, max_new_tokens=count, eos_token_id=None, pad_token_id=0
        ),
    )
    return output[:, width:].tolist()


def _trimmed(rows: Rows, forward: Callable[[np.ndarray], tuple[Any, Any]], longest: int) -> Trace:
    """Run rows of unequal length as one batch, and drop what the padding gave.

    The padding stands on the right, where no token of a causal model sees it.
    """
    width = min(-(-max(map(len, rows)) // _WIDTH_STEP) * _WIDTH_STEP, longest)
    tokens = np.zeros((len(rows), width), np.int32)
    real = np.zeros(tokens.shape, bool)
    for index, row in enumerate(rows):
        tokens[index, : len(row)], real[index, : len(row)] = row, True
    hidden, logits = map(np.asarray, forward(tokens))
    return Trace(hidden[:, real], logits[real])
