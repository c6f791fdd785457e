"""Does torch with PEFT compute what is computed here? Both sides on the same tokens, in float32.

The base is read by ``transformers`` itself or built there again, the adapter directory is loaded
with ``peft``, and base and adapted model are compared layer by layer, logit by logit, and in what
they answer; if asked, gradient by gradient, and update by update of a training side by side. How
far the adapter moves the logits is measured too: two models that both ignore it would agree.

This is for our decoder; `interop.module_comparison` compares any torch module with any function.
"""

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

import lora_jax as lora
from interop import hf, peft
from interop.decoder_training import Start, Training, compare_gradients, train_beside
from interop.differences import Difference, difference
from interop.equivalence_report import (
    STANDARD,
    Comparison,
    Criteria,
    Flip,
    GreedyAnswer,
    Report,
)
from interop.families import keymap_of
from interop.keymaps import Keymap, blocks_of
from interop.side_by_side import TrainingComparison
from lora_jax.adapter import Adapter
from lora_jax.errors import InputError
from lora_jax.models.config import DecoderConfig
from lora_jax.models.decoder import Decoder
from lora_jax.models.generate import LanguageModel, generate, language_model
from lora_jax.site import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Rows = Sequence[Sequence[int]]


class Model(Protocol):
    """What is compared: an `interop.pretrained.Pretrained`, or anything with these."""

    @property
    def config(self) -> DecoderConfig: ...
    @property
    def params(self) -> Any: ...
    @property
    def tokenizer(self) -> Tokenizer: ...


def verify(
    model: Model,
    directory: str | os.PathLike,
    prompts: Rows,
    *,
    trained: tuple[Adapter, Plan] | None = None,
    max_new_tokens: int = 64,
    criteria: Criteria = STANDARD,
    keymap: Keymap | None = None,
    progress: Callable[[str], None] = lambda stage: None,
    gradients: bool = False,
    training: Training | None = None,
    base_directory: str | Path | None = None,
) -> Report:
    """Compare a base and an adapter with the same in ``transformers`` and ``peft``.

    Hidden states and logits are compared on each prompt followed by our adapted model's answer.
    Answers run to ``max_new_tokens``, past any end token.

    Args:
      model: the base: config, parameters, and the tokenizer for the report's texts.
      directory: a PEFT adapter directory, as `interop.peft.write` makes it.
      prompts: token ids, one row per prompt.
      trained: adapter and plan that the directory should hold; by default they are read from it.
      max_new_tokens: greedy tokens per prompt.
      criteria: what has to hold.
      keymap: which torch module holds which leaf; by default the one of the model's family.
      progress: called with what is about to be computed.
      gradients: compare those of A and B too, on the first prompts and answers.
      training: train on both sides too, from the adapter on.
      base_directory: the Hugging Face directory that ``model`` was read from, so that
        ``transformers`` reads config and weights itself; by default it is given ours.

    Raises:
      InputError: the directory doesn't fit the model, or prompts are empty, too long or hold ids
        outside the vocabulary.
    """
    _require_vocabulary(prompts, model.config.vocab_size)
    config = dataclasses.replace(model.config, dtype="float32")
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), model.params)
    keymap = keymap or keymap_of(config)
    if keymap_of(hf.counterpart(config)) is not keymap_of(config):
        raise InputError(
            f"transformers names the weights of {config.family} otherwise, so that peft can't load "
            "its adapters there: bring the base into transformers' family first, with "
            "interop.hf.in_transformers, and train the adapter on that"
        )
    stored = peft.read(directory, params, keymap=keymap)
    adapter, plan = trained or stored
    base = _our_side(language_model(config), _forward(config), params)
    adapted = _adapted_side(config, plan, (params, adapter))
    with jax.default_matmul_precision("highest"):
        progress("the adapted model answers in JAX")
        answers = adapted.answers(prompts, max_new_tokens)
        task = _Task(prompts, answers, max_new_tokens, model.tokenizer.decode, progress)
        progress("building the base in transformers")
        torch_model = _torch_base(config, params, base_directory)
        blocks = torch_model.get_submodule(blocks_of(keymap_of(hf.counterpart(config))))
        torch_base = _torch_side(torch_model, blocks)
        base_answers = base.answers(prompts, max_new_tokens)
        base_comparison, base_logits = _compare("base", base, torch_base, base_answers, task)
        progress("loading the adapter with peft")
        peft_model, warned = _load_with_peft(torch_model, directory)
        torch_adapted = _torch_side(peft_model, blocks)
        comparison, logits = _compare("adapted model", adapted, torch_adapted, answers, task)
        start = Start(config, params, adapter, plan, keymap)
        found = _of_training(start, peft_model, task, gradients, training)
    effect = _max_abs(logits - base_logits)
    positions = sum(map(len, task.rows))
    return Report(base_comparison, comparison, effect, positions, warned, criteria, *found)


def _torch_base(
    config: DecoderConfig, params: Any, directory: str | Path | None
) -> "PreTrainedModel":
    """The base as transformers reads it; as ours says it where it can't be read there."""
    if directory is None or hf.counterpart(config) != config:
        return hf.to_transformers(config, params)
    return hf.read_with_transformers(directory, config)


def _of_training(
    start: Start, peft_model: Any, task: "_Task", gradients: bool, training: Training | None
) -> tuple[tuple[Difference, ...], TrainingComparison | None]:
    """Gradients and a training side by side, as far as they are asked for."""
    of_factors = ()
    if gradients:
        task.progress("gradients of A and B")
        of_factors = compare_gradients(start, peft_model, task.rows)
    if training is None:
        return of_factors, None
    task.progress(f"{len(training.batches)} updates on both sides")
    return of_factors, train_beside(start, peft_model, training)


class _Task(NamedTuple):
    prompts: Rows
    continuations: Rows
    max_new_tokens: int
    decode: Callable[..., str]
    progress: Callable[[str], None]

    @property
    def rows(self) -> list[list[int]]:
        """What hidden states and logits are compared on."""
        return [[*p, *c] for p, c in zip(self.prompts, self.continuations, strict=True)]


class _Trace(NamedTuple):
    hidden: np.ndarray  # float32 (layers, positions, hidden)
    logits: np.ndarray  # float32 (positions, vocab)


class _Side(NamedTuple):
    """A model in one framework: what it answers, and what it computes on given rows."""

    answers: Callable[[Rows, int], list[list[int]]]
    trace: Callable[[Rows], _Trace]


def _adapted_side(config: DecoderConfig, plan: Plan, both: tuple[Any, Adapter]) -> _Side:
    def on_both(model_fn: Callable[..., Any]) -> Callable[..., Any]:
        adapted = lora.adapt(model_fn, plan)
        return lambda both, *rest: adapted(*both, *rest)

    language = language_model(config)
    language = language._replace(apply=on_both(language.apply))
    return _our_side(language, jax.jit(on_both(_forward(config))), both)


def _our_side(language: LanguageModel, forward: Callable[..., Any], parameters: Any) -> _Side:
    def answers(prompts: Rows, count: int) -> list[list[int]]:
        return generate(language, parameters, prompts, max_new_tokens=count)

    longest = language.max_positions
    return _Side(answers, lambda rows: _trimmed(rows, partial(forward, parameters), longest))


@functools.cache
def _forward(config: DecoderConfig) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Hidden states of every layer and logits; the same function for equal configs."""

    @jax.jit
    def forward(params: Any, tokens: Any) -> tuple[Any, Any]:
        variables = {"params": params}
        (logits, _), seen = Decoder(config).apply(variables, tokens, mutable=["intermediates"])
        return seen["intermediates"]["layers"]["hidden"], logits

    return forward


def _torch_side(model: Any, blocks: Any) -> _Side:
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
    return _Side(partial(_torch_answers, model), lambda rows: _trimmed(rows, forward, longest))


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


def _load_with_peft(torch_model: Any, directory: str | os.PathLike) -> tuple[Any, tuple[str, ...]]:
    """The model with its adapter, and whatever PEFT complained about."""
    from peft import PeftModel

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = os.fspath(directory)
        model = PeftModel.from_pretrained(torch_model, path, is_trainable=True).eval()
    ours = [w for w in caught if issubclass(w.category, (UserWarning, RuntimeWarning))]
    return model, tuple(str(warning.message) for warning in ours)


def _trimmed(rows: Rows, forward: Callable[[np.ndarray], tuple[Any, Any]], longest: int) -> _Trace:
    """Run rows of unequal length as one batch, and drop what the padding gave.

    The padding stands on the right, where no token of a causal model sees it.
    """
    width = min(-(-max(map(len, rows)) // _WIDTH_STEP) * _WIDTH_STEP, longest)
    tokens = np.zeros((len(rows), width), np.int32)
    real = np.zeros(tokens.shape, bool)
    for index, row in enumerate(rows):
        tokens[index, : len(row)], real[index, : len(row)] = row, True
    hidden, logits = map(np.asarray, forward(tokens))
    return _Trace(hidden[:, real], logits[real])


_WIDTH_STEP = 64  # so that few widths are compiled


def _compare(
    name: str, ours: _Side, theirs: _Side, our_answers: Rows, task: _Task
) -> tuple[Comparison, np.ndarray]:
    """The comparison, and torch's logits."""
    task.progress(f"{name}: comparing hidden states and logits")
    here, there = ours.trace(task.rows), theirs.trace(task.rows)
    differences = np.abs(here.logits - there.logits)
    layers = tuple(
        difference(str(layer), *pair)
        for layer, pair in enumerate(zip(here.hidden, there.hidden, strict=True))
    )
    task.progress(f"{name}: {len(task.prompts)} prompts answered in torch")
    their_answers = theirs.answers(task.prompts, task.max_new_tokens)
    answers = tuple(
        _greedy_answer(ours, theirs, task.decode, *row)
        for row in zip(task.prompts, our_answers, their_answers, strict=True)
    )
    largest, mean = float(differences.max()), float(differences.mean())
    return Comparison(layers, largest, mean, answers), there.logits


def _max_abs(values: np.ndarray) -> float:
    return float(np.max(np.abs(values)))


def _greedy_answer(
    our_side: _Side,
    their_side: _Side,
    decode: Callable[..., str],
    prompt: Sequence[int],
    ours: Sequence[int],
    theirs: Sequence[int],
) -> GreedyAnswer:
    pairs = zip(ours, theirs, strict=True)
    agreeing = next((index for index, (our, their) in enumerate(pairs) if our != their), None)
    texts = decode([*prompt]), decode([*ours])
    if agreeing is None:
        return GreedyAnswer(*texts, tokens=len(ours), agreeing=len(ours), flip=None)
    prefix = [*prompt, *ours[:agreeing]]
    our_logits, their_logits = (s.trace([prefix]).logits[-1] for s in (our_side, their_side))
    flip = _flip(ours[agreeing], theirs[agreeing], our_logits, their_logits, decode)
    return GreedyAnswer(*texts, tokens=len(ours), agreeing=agreeing, flip=flip)


def _flip(
    our_token: int,
    their_token: int,
    our_logits: np.ndarray,
    their_logits: np.ndarray,
    decode: Callable[..., str],
) -> Flip:
    second, best = np.argsort(their_logits)[-2:].tolist()
    margin = float(their_logits[best] - their_logits[second])
    difference = _max_abs(our_logits - their_logits)
    return Flip(
        ours=decode([our_token], skip_special_tokens=False),
        theirs=decode([their_token], skip_special_tokens=False),
        margin=margin,
        difference=difference,
        explained={our_token, their_token} == {best, second} and margin <= difference,
    )


def _require_vocabulary(prompts: Rows, size: int) -> None:
    outside = {
        number: wrong
        for number, row in enumerate(prompts, start=1)
        if (wrong := sorted({token for token in row if not 0 <= token < size}))
    }
    if outside:
        raise InputError(f"prompts hold ids outside the vocabulary of {size}: {outside}")
