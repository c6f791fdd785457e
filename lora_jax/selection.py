"""From leaves and rules to sites: which rule decides each leaf, and whether the leaf allows it."""

import math
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from lora_jax.adapter import dtype_name
from lora_jax.config import LoraConfig, Rule, scale_of
from lora_jax.errors import InputError
from lora_jax.paths import nearest
from lora_jax.site import Role, Site
from lora_jax.targets import PRESETS, Leaf, Target, described, matches

ADAPTABLE = ("float16", "bfloat16", "float32", "float64")

Roles = tuple[Role, ...] | str
"""The role of each axis of a leaf, or why it has none."""


def select(
    leaves: list[Leaf],
    known: Mapping[str, Roles],
    config: LoraConfig,
    unread: Container[str] = (),
) -> tuple[list[Site], list[str]]:
    """The sites that ``config`` asks for among ``leaves``, and everything that is wrong with it.

    Args:
      leaves: the whole tree, in its order.
      known: the axis roles of those leaves that may be targeted.
      config: the rules.
      unread: leaves that can't be trained in any way, for the reason in ``known``.
    """
    matched = {leaf.path: config.rule_for(leaf) for leaf in leaves}
    problems = [*_idle_patterns(leaves, config), *_idle_rules(leaves, matched, config)]
    sites = []
    for leaf in leaves:
        if rule := matched[leaf.path]:
            roles = known.get(leaf.path, "is not floating")
            whole = rule.variant in ("full", "bias") and leaf.path not in unread
            wrong = list(_leaf_problems(leaf.array, rule, roles, whole))
            problems += [f"{leaf.path!r} {problem}" for problem in wrong]
            sites += [] if wrong else [_site(leaf, rule, roles, config)]
    return sites, problems


def raise_all(problems: Iterable[str]) -> None:
    """Raise one InputError with all of ``problems``, if there are any."""
    if problems := list(problems):
        raise InputError("no plan could be made: " + "; ".join(problems))


def require_config(config: Any) -> None:
    """Raise an InputError for anything that is not a LoraConfig."""
    if not isinstance(config, LoraConfig):
        raise InputError(
            f"config is a {type(config).__name__}: give lora_jax.LoraConfig(rank=..., targets=...)"
        )


def _idle_patterns(leaves: list[Leaf], config: LoraConfig) -> Iterator[str]:
    """Targets of whatever kind that match nothing."""
    kinds: dict[str, list[Target]] = {
        "target": [rule.target for rule in config.rules],
        "exclude": list(config.excluded),
        "axes": [pattern for pattern, _ in config.axes],
    }
    for kind, targets in kinds.items():
        for target in targets:
            if not any(matches(target, leaf) for leaf in leaves):
                yield f"{kind} {described(target)} matches no leaf ({_hint(target, leaves)})"


def _hint(target: Target, leaves: list[Leaf]) -> str:
    paths = [leaf.path for leaf in leaves]
    if not isinstance(target, str):
        return f"the leaves are such as {', '.join(sorted(paths)[:3])}"
    if target in PRESETS:
        contracted = [leaf.path for leaf in leaves if leaf.matrix] or ["none"]
        return f"contracted with an activation: {', '.join(contracted[:5])}; give a pattern"
    words = re.sub(r"[^\w/-]+", "", target)
    found = nearest(words.lower(), PRESETS, count=1) + nearest(words, paths)
    return f"nearest: {', '.join(found[:3] or sorted(paths)[:3])}"


def _idle_rules(
    leaves: list[Leaf], matched: Mapping[str, Rule | None], config: LoraConfig
) -> Iterator[str]:
    """Rules that match leaves, all of which an earlier rule or an exclude pattern decides."""
    deciding = set(matched.values())
    for rule in config.rules:
        if rule not in deciding and any(matches(rule.target, leaf) for leaf in leaves):
            yield (
                f"target {described(rule.target)} decides nothing: earlier targets or exclude "
                "patterns take every leaf it matches; put it first, or drop it"
            )


def _leaf_problems(leaf: Any, rule: Rule, roles: Roles, whole: bool) -> Iterator[str]:
    if dtype_name(leaf) not in ADAPTABLE:
        yield (
            f"is {dtype_name(leaf)}, only {', '.join(ADAPTABLE)} weights can be adapted: exclude it"
        )
    elif whole:  # No axis of it has to have a role.
        yield from _length_problems(rule, leaf.shape[0] if leaf.shape else None, "first axis")
    elif isinstance(roles, str):
        yield roles
    elif rule.variant == "rows":
        yield from _row_problems(leaf, rule, roles)
    else:
        yield from _rank_problems(leaf, rule, roles)


def _row_problems(leaf: Any, rule: Rule, roles: tuple[Role, ...]) -> Iterator[str]:
    if sorted(roles) != ["in", "out"]:
        yield f"has axis roles {' '.join(roles)}: rows are trained of a matrix alone"
    rows = rule.rows or ()
    outside = [row for row in rows if not 0 <= row < leaf.shape[0]]
    if outside or len(set(rows)) < len(rows):
        wrong = f"rows {outside} outside" if outside else "some twice among"
        yield f"has {leaf.shape[0]} rows; the rule names {wrong} them: name each row once"


def _rank_problems(leaf: Any, rule: Rule, roles: tuple[Role, ...]) -> Iterator[str]:
    fan_in, fan_out = (_size(leaf, roles, role) for role in ("in", "out"))
    limit, rank = min(fan_in, fan_out), _largest(rule.rank)
    if rank > limit:
        yield (
            f"has rank {rank}, more than {limit}, the smaller side of its {fan_in} x {fan_out} "
            "matrix: lower the rank"
        )
    layers = leaf.shape[roles.index("stack")] if "stack" in roles else None
    yield from _length_problems(rule, layers, "stack")
    if rule.variant == "dora" and isinstance(rule.rank, tuple) and 0 in rule.rank:
        yield "has layers of rank 0, whose magnitude DoRA would still train: use variant 'lora'"


def _length_problems(rule: Rule, layers: int | None, axis: str) -> Iterator[str]:
    for name, value in (("rank", rule.rank), ("alpha", rule.alpha)):
        if isinstance(value, tuple) and len(value) != layers and rule.variant != "full":
            has = f"no {axis} axis" if layers is None else f"{layers} along its {axis}"
            yield f"has {has}, but {name} has {len(value)} values: {value}"


def _site(leaf: Leaf, rule: Rule, roles: Roles, config: LoraConfig) -> Site:
    variant = rule.variant or "lora"
    path, shape, dtype = leaf.path, tuple(leaf.array.shape), dtype_name(leaf.array)
    if variant == "bias":
        scale = scale_of(rule, config.use_rslora)
        return Site(path, shape, dtype, (), 0, scale, variant="bias")
    if variant == "full" or isinstance(roles, str):
        return Site(path, shape, dtype, (), 0, 1.0, variant="full")
    if variant == "rows":
        rows = rule.rows or ()
        return Site(path, shape, dtype, roles, len(rows), 1.0, variant="rows", rows=rows)
    ranks = rule.rank if isinstance(rule.rank, tuple) and len(set(rule.rank)) > 1 else ()
    return Site(
        path,
        shape,
        dtype,
        roles,
        _largest(rule.rank),
        scale_of(rule, config.use_rslora),
        ranks=ranks,
        variant=variant,
        init=rule.init or "",
        init_std=rule.init_std,
        dropout=rule.dropout or 0.0,
    )


def _largest(rank: Any) -> int:
    return max(rank) if isinstance(rank, tuple) else rank


def _size(leaf: Any, roles: tuple[Role, ...], role: Role) -> int:
    return math.prod(size for size, its in zip(leaf.shape, roles, strict=True) if its == role)


def is_floating(leaf: Any) -> bool:
    """Whether the leaf holds floating numbers."""
    return jnp.issubdtype(leaf.dtype, jnp.floating)
