"""What a reader of a PEFT directory should know: above all where PEFT computes something else.

An adapter's function here is the one that its formulas say. Each row is a fact that was found by
running PEFT 0.21.2, and the condition under which it concerns an adapter.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from interop.peft_claims import Claims
from interop.peft_config import REBASED_INITS
from interop.peft_matching import PeftConfig, ambiguous_patterns, patterns_of_no_module
from interop.peft_modules import Base
from interop.peft_patterns import endings
from interop.peft_versions import swapped_parameters
from lora_jax.errors import listed

Shapes = Mapping[str, tuple[int, ...]]


class About(NamedTuple):
    """An adapter that is being read."""

    config: PeftConfig
    claims: Claims
    shapes: Shapes
    """Of the file's tensors."""
    base: Base


def notes_of(about: About) -> tuple[str, ...]:
    """A sentence for each fact, and for each layer where they differ."""
    return tuple(note for found in _NOTES for note in found(about))


def _attention(about: About) -> Iterator[str]:
    for name in sorted(about.claims.settings):
        if name in about.base.attentions:
            yield (
                f"{name}: PEFT adds the update of its out_proj twice, in training and in merging "
                "too; here it is added once, as s·B·A is meant: scale that B by 2 for what PEFT "
                "computes"
            )
        elif _is_lone_projection(name, about):
            yield (
                f"{name}: PEFT ignores an adapter of the output projection of an attention alone; "
                "here it counts"
            )


def _is_lone_projection(name: str, about: About) -> bool:
    parent, _, last = name.rpartition(".")
    nested = about.base.is_nested(name, about.claims.settings)
    return last == "out_proj" and parent in about.base.attentions and not nested


def _convolutions(about: About) -> Iterator[str]:
    for name, window in _windows(about):
        if math.prod(window) > 1:
            yield (
                f"{name}: PEFT's A takes neither dilation nor padding mode from its layer, so with "
                "a dilation it fails and with a padding other than zeros it differs from its own "
                "merged weight; here ΔW = s·B·A is a kernel like the layer's"
            )
        if len(window) == 3 and window[:2] == (1, 1) and window[2] > 1:
            yield f"{name}: PEFT can't merge a convolution with the window {window}; here it can"


def _windows(about: About) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The convolutions with the sizes of their windows."""
    base = about.base
    for name in sorted(about.claims.settings):
        path, index = base.modules.get(name, ("", ()))
        if path and base.kind(path) == "conv":
            inner = base.leaves[path].shape[len(index) :]
            groups = base.rules[path].axes(len(inner))
            yield name, tuple(math.prod(inner[axis] for axis in axes) for axes in groups[2:])


def _patterns(about: About) -> Iterator[str]:
    for key, name, values in ambiguous_patterns(about.config, [*about.claims.settings]):
        yield (
            f"{name}: several entries of {key} match it, with the values {values}; the first in "
            "the file counts, but PEFT sorts them when it saves, so it may have been trained with "
            "another"
        )


def _patterns_of_experts(about: About) -> Iterator[str]:
    targets, own = about.claims.settings, about.base.modules
    modules = [name for name in targets if name in own]
    bare = [name for name in targets if name not in own]
    if idle := patterns_of_no_module(about.config, modules, bare):
        yield (
            f"PEFT warns that {listed(idle)} match no module and are ignored: it looks for "
            "modules alone, and follows them for parameters all the same"
        )


def _both_layouts(about: About) -> Iterator[str]:
    base, paths = about.base, [*about.claims.pair]
    kinds = {base.kind(path) for path in paths}
    has_linear = "linear" in kinds or any(map(base.tied_modules, paths))
    if "linear_in_out" in kinds and has_linear:
        yield (
            "PEFT warns of fan_in_fan_out, whatever it is: there are a Conv1D and a linear layer, "
            "and it goes by the type of each"
        )


def _tied(about: About) -> Iterator[str]:
    for path in about.claims.pair:
        if tied := about.base.tied_modules(path):
            yield (
                f"{path}: PEFT merges its update twice into the weight that it shares with "
                f"{', '.join(tied)}, and trains two copies of A and B; here it is one of each"
            )


def _tied_rows(about: About) -> Iterator[str]:
    for path in about.claims.rows:
        if tied := about.base.tied_modules(path):
            names = ", ".join(tied)
            yield (
                f"{path}: its trained rows count in {names} too, as PEFT has it in models of "
                f"transformers alone; in any other it leaves {names} as it was"
            )


def _swapped(about: About) -> Iterator[str]:
    config, claims = about.config, about.claims
    for name in sorted(swapped_parameters(config, about.shapes, claims.settings, about.base)):
        yield (
            f"{name}: written by PEFT {config.peft_version or 'before 0.19.1'}, with the inputs in "
            "B and the outputs in A; a newer PEFT reads that wrongly or not at all"
        )


def _rebased(about: About) -> Iterator[str]:
    if (init := about.config.init_lora_weights) in REBASED_INITS:
        yield (
            f"init_lora_weights is {init!r}: what it took off the base was computed anew, and the "
            "adapter is a plain one of twice the rank against the base as it is"
        )


def _unmatched(about: About) -> Iterator[str]:
    targets: Any = about.config.target_modules
    names = [] if isinstance(targets, str) else sorted(targets or ())
    tied = (name for path in about.claims.pair for name in about.base.tied_modules(path))
    ends = {end for target in (*about.claims.settings, *tied) for end in endings(target)}
    if idle := [repr(name) for name in names if name not in ends]:
        yield f"target_modules: {listed(idle)} match nothing, which PEFT passes over in silence"


_NOTES: tuple[Callable[[About], Iterator[str]], ...] = (
    _attention,
    _convolutions,
    _patterns,
    _patterns_of_experts,
    _both_layouts,
    _tied,
    _tied_rows,
    _swapped,
    _rebased,
    _unmatched,
)
