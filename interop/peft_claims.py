"""What a PEFT config does to each leaf of a model, and what of it no plan can say."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from interop.keymaps import Index, indices
from interop.peft_matching import PeftConfig, Setting, settings_by_patterns
from interop.peft_modules import Base

ByLeaf = Mapping[str, Mapping[Index, Any]]


class Claims(NamedTuple):
    """What an adapter does to each leaf, by path and index of its stack."""

    settings: Mapping[str, Setting]
    """By target, a module or a parameter."""
    pair: ByLeaf
    """Rank and scale."""
    full: ByLeaf
    rows: ByLeaf
    """Which rows."""
    bias: ByLeaf
    """The scale of what a bias on B adds."""


def claim_problems(config: PeftConfig, claims: Claims, base: Base) -> Iterator[str]:
    """A line for everything that a plan for the base can't say."""
    yield from _kind_problems(claims, base)
    yield from _tying_problems(config, claims, base)
    yield from _stack_problems(claims.pair, base)
    yield from _dora_problems(config, claims, base)


def _kind_problems(claims: Claims, base: Base) -> Iterator[str]:
    """Leaves with two kinds of entry, and entries that have to be whole but aren't."""
    words = {
        "adapted": claims.pair,
        "trained whole": claims.full,
        "trained in some rows": claims.rows,
        "updated by lora_bias": claims.bias,
    }
    for path in base.leaves:
        kinds = [word for word, found in words.items() if path in found]
        if len(kinds) > 1:
            yield f"{path!r} is {' and '.join(kinds)}, expected one of them"
    for path, found in _in_some_layers(claims.full, base):
        yield f"{path!r} is trained whole in layers {found} alone, expected all or none"


def _tying_problems(config: PeftConfig, claims: Claims, base: Base) -> Iterator[str]:
    for path in {**claims.pair, **claims.full}:
        tied = base.tied_modules(path)
        if tied and not (config.ensure_weight_tying and base.kind(path) == "embedding"):
            yield (
                f"{path!r} is also the weight of {', '.join(tied)}, which this adapter leaves as "
                "it was: train it with ensure_weight_tying=True if it is an embedding, or untie "
                "the base's weights"
            )
        if tied and path in claims.pair:
            yield from _scale_problems(path, tied, claims, config)
        if tied and config.use_dora and path in claims.pair:
            yield f"{path!r} is tied to {', '.join(tied)}, each with a DoRA magnitude of its own"


def _scale_problems(
    path: str, tied: Sequence[str], claims: Claims, config: PeftConfig
) -> Iterator[str]:
    """PEFT takes the scale of a tied module from the patterns for its own name."""
    own = next(iter(claims.pair[path].values()))
    for name, other in settings_by_patterns(config, tied).items():
        if other.scale != own.scale:
            yield (
                f"{path!r} has the scale {own.scale:g}, and {name}, to which it is tied, has "
                f"{other.scale:g}: rank_pattern and alpha_pattern have to say the same of both"
            )


def _stack_problems(pairs: Mapping[str, Mapping[Index, Setting]], base: Base) -> Iterator[str]:
    """Experts of one layer that differ: a site has one rank and one scale for each layer."""
    for path, found in pairs.items():
        rule, shape = base.rules[path], base.leaves[path].shape
        if rule.stack < 2:
            continue
        for layer in sorted({index[0] for index in found}):
            inside = [index for index in indices(rule, shape) if index[0] == layer]
            if len({found.get(index) for index in inside}) > 1:
                yield (
                    f"{path!r} has experts of layer {layer} at different ranks or scales, or some "
                    "without an adapter: expected one for all of a layer"
                )


def _dora_problems(config: PeftConfig, claims: Claims, base: Base) -> Iterator[str]:
    if not config.use_dora:
        return
    for path, found in _in_some_layers(claims.pair, base):
        yield (
            f"{path!r} has DoRA in layers {found} alone, and the others would have magnitudes "
            "here: expected all or none"
        )
    for name in claims.settings:
        if name not in base.modules or name in base.attentions:
            yield f"use_dora is true, but {name!r} has no magnitude in PEFT"


def _in_some_layers(by_leaf: ByLeaf, base: Base) -> Iterator[tuple[str, str]]:
    for path, found in by_leaf.items():
        if len(found) < len(indices(base.rules[path], base.leaves[path].shape)):
            yield path, ", ".join(".".join(map(str, index)) for index in sorted(found))
