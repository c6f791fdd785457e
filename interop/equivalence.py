"""Does torch with PEFT compute what is computed here? Both sides on the same tokens, in float32.

The base is built again in ``transformers``, the adapter directory is loaded with ``peft``, and
base and adapted model are compared layer by layer, logit by logit, and in what they answer. How
far the adapter moves the logits is measured too: two models that both ignore it would agree.
"""

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from interop import hf, peft
from interop.keymaps import LLAMA, Keymap
from lora_jax.adapter import Adapter
from lora_jax.errors import InputError
from lora_jax.models.config import DecoderConfig
from lora_jax.models.decoder import Decoder
from lora_jax.models.generate import LanguageModel, generate, language_model
from lora_jax.site import Plan

if TYPE_CHECKING:
    from interop.pretrained import Pretrained

Rows = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Criteria:
    """What has to hold for the two sides to count as the same function.

    Args:
      max_logit_difference: largest |ours - torch's| over all logits, base and adapted.
      min_effect: least value of the largest |adapted - base| over all logits.
      min_positions: tokens compared, all rows together.
      min_prompts: prompts answered.
    """

    max_logit_difference: float = 1e-3
    min_effect: float = 1.0
    min_positions: int = 256
    min_prompts: int = 5


@dataclass(frozen=True)
class LayerDifference:
    """One layer's output, (positions, hidden), ours against torch's.

    ``max_abs`` is the largest |ours - torch's|, ``relative`` is ‖ours - torch's‖ / ‖torch's‖
    over all positions, ``cosine`` the smallest cosine similarity of any position.
    """

    layer: int
    max_abs: float
    relative: float
    cosine: float


@dataclass(frozen=True)
class Flip:
    """The first token in which two greedy answers differ.

    ``margin`` is by how much torch's best logit exceeds its second best there, ``difference``
    the largest |ours - torch's| over the logits of this position.
    """

    ours: str
    theirs: str
    margin: float
    difference: float
    explained: bool
    """The two tokens are torch's two best, and ``margin`` is at most ``difference``."""


@dataclass(frozen=True)
class GreedyAnswer:
    """One prompt, continued by both sides with the most likely token each time."""

    prompt: str
    answer: str
    tokens: int
    agreeing: int
    """Tokens before the first that differs; the comparison stops there."""
    flip: Flip | None

    @property
    def agrees(self) -> bool:
        """Whether all tokens are the same, or the first other one is explained by rounding."""
        return self.flip is None or self.flip.explained


@dataclass(frozen=True)
class Comparison:
    """Ours against torch's, for the base or for the adapted model."""

    layers: tuple[LayerDifference, ...]
    max_logit_difference: float
    mean_logit_difference: float
    answers: tuple[GreedyAnswer, ...]


@dataclass(frozen=True)
class Report:
    """Everything that `verify` measured."""

    base: Comparison
    adapted: Comparison
    effect: float
    """Largest |adapted - base| over all logits of the torch side."""
    positions: int
    peft_warnings: tuple[str, ...]
    criteria: Criteria

    @property
    def reasons(self) -> tuple[str, ...]:
        """Every criterion that does not hold, in words."""
        return tuple(_reasons(self))

    @property
    def agrees(self) -> bool:
        """Whether every criterion holds."""
        return not self.reasons


def verify(
    model: "Pretrained",
    directory: str | os.PathLike,
    prompts: Rows,
    *,
    trained: tuple[Adapter, Plan] | None = None,
    max_new_tokens: int = 64,
    criteria: Criteria = Criteria(),
    keymap: Keymap = LLAMA,
    progress: Callable[[str], None] = lambda stage: None,
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
      keymap: which torch module holds which leaf.
      progress: called with what is about to be computed.

    Raises:
      InputError: the directory doesn't fit the model, or prompts are empty, too long or hold ids
        outside the vocabulary.
    """
    _require_vocabulary(prompts, model.config.vocab_size)
    config = dataclasses.replace(model.config, dtype="float32")
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), model.params)
    stored = peft.read(directory, params, keymap=keymap)
    adapter, plan = trained or stored
    base = _our_side(language_model(config), _forward(config), params)
    adapted = _adapted_side(config, plan, (params, adapter))
    with jax.default_matmul_precision("highest"):
        progress("the adapted model answers in JAX")
        answers = adapted.answers(prompts, max_new_tokens)
        task = _Task(prompts, answers, max_new_tokens, model.tokenizer.decode, progress)
        progress("building the base in transformers")
        torch_model = hf.to_transformers(config, params)
        torch_base = _torch_side(torch_model, torch_model)
        base_answers = base.answers(prompts, max_new_tokens)
        base_comparison, base_logits = _compare("base", base, torch_base, base_answers, task)
        progress("loading the adapter with peft")
        peft_model, warned = _load_with_peft(torch_model, directory)
        torch_adapted = _torch_side(peft_model, torch_model)
        comparison, logits = _compare("adapted model", adapted, torch_adapted, answers, task)
    effect = _max_abs(logits - base_logits)
    positions = sum(map(len, task.rows))
    return Report(base_comparison, comparison, effect, positions, warned, criteria)


class _Task(NamedTuple):
    prompts: Rows
    continuations: Rows
    max_new_tokens: int
    decode: Callable[[Any], str]
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

    return _Side(answers, lambda rows: _trimmed(rows, partial(forward, parameters)))


@functools.cache
def _forward(config: DecoderConfig) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Hidden states of every layer and logits; the same function for equal configs."""

    @jax.jit
    def forward(params: Any, tokens: Any) -> tuple[Any, Any]:
        variables = {"params": params}
        (logits, _), seen = Decoder(config).apply(variables, tokens, mutable=["intermediates"])
        return seen["intermediates"]["layers"]["hidden"], logits

    return forward


def _torch_side(model: Any, decoder: Any) -> _Side:
    """A transformers model, or a PEFT model around the ``decoder`` of transformers."""
    import torch

    def forward(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        hidden = []
        hooks = [
            layer.register_forward_hook(lambda _, __, output: hidden.append(output))
            for layer in decoder.model.layers
        ]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(tokens, dtype=torch.long), use_cache=False).logits
        for hook in hooks:
            hook.remove()
        return torch.stack(hidden).numpy(), logits.numpy()

    return _Side(partial(_torch_answers, model), lambda rows: _trimmed(rows, forward))


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
        model = PeftModel.from_pretrained(torch_model, os.fspath(directory)).eval()
    ours = [w for w in caught if issubclass(w.category, (UserWarning, RuntimeWarning))]
    return model, tuple(str(warning.message) for warning in ours)


def _trimmed(rows: Rows, forward: Callable[[np.ndarray], tuple[Any, Any]]) -> _Trace:
    """Run rows of unequal length as one batch, and drop what the padding gave.

    The padding stands on the right, where no token of a causal model sees it.
    """
    width = -(-max(map(len, rows)) // _WIDTH_STEP) * _WIDTH_STEP
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
        _layer_difference(layer, *pair)
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


def _layer_difference(layer: int, ours: np.ndarray, theirs: np.ndarray) -> LayerDifference:
    norms = np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1)
    return LayerDifference(
        layer=layer,
        max_abs=_max_abs(ours - theirs),
        relative=float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)),
        cosine=float(np.min(np.sum(ours * theirs, axis=-1) / norms)),
    )


def _max_abs(values: np.ndarray) -> float:
    return float(np.max(np.abs(values)))


def _greedy_answer(
    our_side: _Side,
    their_side: _Side,
    decode: Callable[[Any], str],
    prompt: Sequence[int],
    ours: Sequence[int],
    theirs: Sequence[int],
) -> GreedyAnswer:
    pairs = zip(ours, theirs, strict=True)
    agreeing = next((index for index, (our, their) in enumerate(pairs) if our != their), None)
    answer = GreedyAnswer(decode([*prompt]), decode([*ours]), len(ours), len(ours), None)
    if agreeing is None:
        return answer
    prefix = [*prompt, *ours[:agreeing]]
    our_logits, their_logits = (side.trace([prefix]).logits[-1] for side in (our_side, their_side))
    second, best = np.sort(their_logits)[-2:]
    margin, difference = float(best - second), _max_abs(our_logits - their_logits)
    candidates = {ours[agreeing], theirs[agreeing]} == {*np.argsort(their_logits)[-2:].tolist()}
    tokens = decode([ours[agreeing]]), decode([theirs[agreeing]])
    flip = Flip(*tokens, margin, difference, explained=candidates and margin <= difference)
    return dataclasses.replace(answer, agreeing=agreeing, flip=flip)


def _reasons(report: Report) -> Iterator[str]:
    criteria = report.criteria
    if report.positions < criteria.min_positions:
        yield f"{report.positions} positions were compared, fewer than {criteria.min_positions}"
    if (prompts := len(report.base.answers)) < criteria.min_prompts:
        yield f"{prompts} prompts were answered, fewer than {criteria.min_prompts}"
    yield from _comparison_reasons("base", report.base, criteria)
    yield from _comparison_reasons("adapted model", report.adapted, criteria)
    if not report.effect > criteria.min_effect:
        yield (
            f"the adapter changes no logit by more than {report.effect:.2g}, which is not above "
            f"{criteria.min_effect:g}: agreement with torch says little"
        )
    yield from (f"PEFT warned: {message}" for message in report.peft_warnings)


def _comparison_reasons(name: str, comparison: Comparison, criteria: Criteria) -> Iterator[str]:
    difference, limit = comparison.max_logit_difference, criteria.max_logit_difference
    if not difference <= limit:
        yield f"{name}: logits differ from torch's by {difference:.2g}, more than {limit:g}"
    for number, answer in enumerate(comparison.answers, start=1):
        if (flip := answer.flip) and not flip.explained:
            yield (
                f"{name}: answer {number} differs at token {answer.agreeing + 1}: {flip.ours!r} "
                f"here, {flip.theirs!r} in torch, whose two best logits are {flip.margin:.2g} apart"
            )


def _require_vocabulary(prompts: Rows, size: int) -> None:
    outside = {
        number: wrong
        for number, row in enumerate(prompts, start=1)
        if (wrong := sorted({token for token in row if not 0 <= token < size}))
    }
    if outside:
        raise InputError(f"prompts hold ids outside the vocabulary of {size}: {outside}")
