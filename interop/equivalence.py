"""Does torch with PEFT compute what is computed here? Both sides on the same tokens, in float32.

The base is read by ``transformers`` itself or built there again, the adapter directory is loaded
with ``peft``, and base and adapted model are compared layer by layer, logit by logit, and in what
they answer; if asked, gradient by gradient, and update by update of a training side by side. How
far the adapter moves the logits is measured too: two models that both ignore it would agree.

This is for our decoder; `interop.module_comparison` compares any torch module with any function.
"""

import dataclasses
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

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
from interop.language_sides import Rows, Side, adapted_side, forward_of, our_side, torch_side
from interop.side_by_side import TrainingComparison
from lora_jax.adapter import Adapter
from lora_jax.errors import InputError
from lora_jax.models.config import DecoderConfig
from lora_jax.models.generate import language_model
from lora_jax.site import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    base = our_side(language_model(config), forward_of(config), params)
    adapted = adapted_side(config, plan, (params, adapter))
    with jax.default_matmul_precision("highest"):
        progress("the adapted model answers in JAX")
        answers = adapted.answers(prompts, max_new_tokens)
        task = _Task(prompts, answers, max_new_tokens, model.tokenizer.decode, progress)
        progress("building the base in transformers")
        torch_model = _torch_base(config, params, base_directory)
        blocks = torch_model.get_submodule(blocks_of(keymap_of(hf.counterpart(config))))
        torch_base = torch_side(torch_model, blocks)
        base_answers = base.answers(prompts, max_new_tokens)
        base_comparison, base_logits = _compare("base", base, torch_base, base_answers, task)
        progress("loading the adapter with peft")
        peft_model, warned = _load_with_peft(torch_model, directory)
        torch_adapted = torch_side(peft_model, blocks)
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


def _load_with_peft(torch_model: Any, directory: str | os.PathLike) -> tuple[Any, tuple[str, ...]]:
    """The model with its adapter, and whatever PEFT complained about."""
    from peft import PeftModel

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = os.fspath(directory)
        model = PeftModel.from_pretrained(torch_model, path, is_trainable=True).eval()
    ours = [w for w in caught if issubclass(w.category, (UserWarning, RuntimeWarning))]
    return model, tuple(str(warning.message) for warning in ours)


def _compare(
    name: str, ours: Side, theirs: Side, our_answers: Rows, task: _Task
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
    our_side: Side,
    their_side: Side,
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
