"""What the user asks for: which weights are adapted, at which rank and scale."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from lora_jax.errors import InputError
from lora_jax.site import INITIALISERS, ROLES, VARIANTS, Role
from lora_jax.targets import PRESETS, Leaf, Target, described, matches


@dataclass(frozen=True)
class Rule:
    """A target and what it overrides; ``None`` keeps the config's own value.

    ``rank`` and ``alpha`` may be tuples for a weight that stacks layers: one value for each
    index of its first stack axis; rank 0 leaves that layer as it is.

    >>> Rule(r".*/mlp/.*", rank=4).rank
    4
    """

    target: Target
    rank: int | tuple[int, ...] | None = None
    alpha: float | tuple[float, ...] | None = None
    variant: str | None = None
    rows: tuple[int, ...] | None = None
    """Of variant ``rows``: which indices of the first axis are trained."""
    init: str | None = None
    init_std: float | None = None
    dropout: float | None = None

    def __post_init__(self):
        for name in ("rank", "alpha", "rows"):
            object.__setattr__(self, name, _normalised(getattr(self, name)))


@dataclass(frozen=True)
class LoraConfig:
    """Which weights get an adapter, and its hyper-parameters.

    Args:
      rank: size of the inner axis of A and B.
      alpha: numerator of the scale.
      targets: tried in order, the first that matches decides. Each is a regular expression that
        matches a whole leaf path; a preset, ``all-linear`` (every contracted weight but heads
        and embeddings), ``attention``, ``mlp`` or ``square``; a function ``f(path, leaf)`` that
        says yes or no; or a `Rule`, which overrides what is below for what it matches.
      exclude: as targets; a leaf that one of them matches is never adapted.
      variant: ``lora``; ``dora``, with a magnitude beside A and B (Liu et al.,
        arXiv:2402.09353); ``full``, the leaf itself is trained, in float32 (norms, biases,
        heads); ``rows``, some rows of it are (new tokens of an embedding); ``bias``, an update
        is added to it, scaled as the factors are (PEFT's ``lora_bias``).
      use_rslora: scale = alpha/√rank instead of alpha/rank (Kalajdzievski, arXiv:2312.03732).
      init: how A starts: ``kaiming_uniform`` (as PEFT does) or ``gaussian``. B starts at zero.
      init_std: standard deviation of ``gaussian``; 1/rank where not given, as in PEFT.
      dropout: share of the entries of A's input that are dropped when `adapt`'s function is
        given a ``dropout_key``; lookups have no such input.
      axes: ``(pattern, roles)`` pairs for weights whose axis roles the trace can't tell or
        that should be read otherwise; roles are words of ``stack``, ``in``, ``out``.

    Raises:
      InputError: naming every value that is out of range or not a regular expression.

    >>> config = LoraConfig(rank=16, alpha=32, targets=(Rule(".*k_proj.*", rank=4), ".*proj.*"))
    >>> leaves = [Leaf(path, None) for path in ("layers/k_proj/kernel", "norm/scale")]
    >>> config.rule_for(leaves[0]).rank, config.rule_for(leaves[1])
    (4, None)
    """

    rank: int | tuple[int, ...] = 8
    alpha: float | tuple[float, ...] = 16.0
    targets: Target | Rule | tuple[Target | Rule, ...] = ()
    exclude: Target | tuple[Target, ...] = ()
    variant: str = "lora"
    use_rslora: bool = False
    init: str = "kaiming_uniform"
    init_std: float | None = None
    dropout: float = 0.0
    axes: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        for name in ("rank", "alpha"):
            object.__setattr__(self, name, _normalised(getattr(self, name)))
        problems = list(_type_problems(self)) or list(_problems(self))
        if problems:
            raise InputError("LoraConfig: " + "; ".join(problems))

    @property
    def rules(self) -> tuple[Rule, ...]:
        """``targets`` as rules, each completed by the config's own values."""
        return tuple(_completed(_as_rule(target), self) for target in _as_tuple(self.targets))

    @property
    def excluded(self) -> tuple[Target, ...]:
        """``exclude`` as a tuple."""
        return _as_tuple(self.exclude)

    def rule_for(self, leaf: Leaf) -> Rule | None:
        """The first rule that matches ``leaf``; ``None`` if the leaf stays frozen."""
        if any(matches(target, leaf) for target in self.excluded):
            return None
        return next((rule for rule in self.rules if matches(rule.target, leaf)), None)

    def roles_for(self, path: str) -> tuple[Role, ...] | None:
        """The axis roles that the user declared for ``path``, if any."""
        matching = (roles for pattern, roles in self.axes if re.fullmatch(pattern, path))
        found = next(matching, None)
        return None if found is None else parse_roles(found)


def scale_of(rule: Rule, use_rslora: bool) -> float | tuple[float, ...]:
    """alpha/rank, or alpha/√rank under rsLoRA; a tuple where it differs along a stack.

    >>> scale_of(Rule(".*", rank=16, alpha=32), use_rslora=False)
    2.0
    >>> scale_of(Rule(".*", rank=(4, 0, 16), alpha=32), use_rslora=False)
    (8.0, 0.0, 2.0)
    """
    ranks, alphas = _as_tuple(_given(rule.rank)), _as_tuple(_given(rule.alpha))
    count = max(len(ranks), len(alphas))
    pairs = zip(_repeated(ranks, count), _repeated(alphas, count), strict=True)
    scales = tuple(_scale(rank, alpha, use_rslora) for rank, alpha in pairs)
    # Of a pair the layers of rank 0 are zero under any scale, of a bias under scale 0 alone.
    different = {scale for scale in scales if scale or rule.variant == "bias"}
    return different.pop() if len(different) == 1 else scales


def parse_roles(text: str) -> tuple[Role, ...]:
    """Read axis roles from words: ``"stack in out"``.

    >>> parse_roles("stack in out out")
    ('stack', 'in', 'out', 'out')
    """
    words = text.split()
    unknown = sorted(set(words) - set(ROLES))
    if unknown or "in" not in words or "out" not in words:
        raise InputError(
            f"axis roles {text!r}: use the words {', '.join(ROLES)}, one an axis, "
            "with at least one 'in' and one 'out'"
        )
    return tuple(role for word in words for role in ROLES if role == word)


def _scale(rank: int, alpha: float, use_rslora: bool) -> float:
    return alpha / (math.sqrt(rank) if use_rslora else rank) if rank else 0.0


def _repeated(values: tuple, count: int) -> tuple:
    return values * count if len(values) == 1 else values


def _normalised(value: Any) -> Any:
    """Any sequence as a tuple of Python numbers, which can be hashed; all else as it is."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        return value
    return tuple(each.item() if hasattr(each, "item") else each for each in value)


def _as_tuple(value: Any) -> tuple:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _as_rule(target: Target | Rule) -> Rule:
    return target if isinstance(target, Rule) else Rule(target)


def _completed(rule: Rule, config: LoraConfig) -> Rule:
    overrides = {f.name: getattr(rule, f.name) for f in fields(rule)}
    defaults = {name: getattr(config, name, None) for name in overrides}
    return Rule(**{name: _first(overrides[name], defaults[name]) for name in overrides})


def _first(value: Any, default: Any) -> Any:
    return default if value is None else value


def _given(value: Any) -> Any:
    if value is None:
        raise InputError("a rule needs a rank and an alpha: take it from LoraConfig.rules")
    return value


def _type_problems(config: LoraConfig) -> Iterable[str]:
    """What would make the rest of the checks stumble."""
    targets = {"targets": _as_tuple(config.targets), "exclude": config.excluded}
    for name, values in targets.items():
        for value in values:
            target = value.target if isinstance(value, Rule) and name == "targets" else value
            if not isinstance(target, str) and not callable(target):
                yield (
                    f"{name} has {value!r}: expected a regular expression, a preset "
                    f"({', '.join(PRESETS)}) or a function of path and leaf"
                )
    pairs = config.axes if isinstance(config.axes, tuple | list) else [config.axes]
    for pair in pairs:
        if not isinstance(pair, tuple | list) or [type(word) for word in pair] != [str, str]:
            yield f"axes has {pair!r}: expected pairs (pattern, roles), as in ('.*', 'in out')"


def _problems(config: LoraConfig) -> Iterable[str]:
    rules = config.rules
    if not rules:
        yield "targets is empty: give at least one, such as 'all-linear'"
    for rule in rules:
        yield from _rule_problems(rule)
    for target in _as_tuple(config.targets):
        yield from _idle_settings(_as_rule(target), config)
    if not isinstance(config.use_rslora, bool):
        yield f"use_rslora must be True or False, got {config.use_rslora!r}"
    patterns = [target for target in (*(r.target for r in rules), *config.excluded)]
    patterns += [pattern for pattern, _ in config.axes]
    yield from filter(None, map(_pattern_problem, patterns))
    for _, roles in config.axes:
        yield from filter(None, [_roles_problem(roles)])


def _idle_settings(rule: Rule, config: LoraConfig) -> Iterable[str]:
    """What a rule sets for leaves that have no factors; of a bias rank and alpha are the scale."""
    idle = _IDLE.get(rule.variant or config.variant, ())
    if given := [name for name in idle if getattr(rule, name) is not None]:
        yield f"{described(rule.target)} has no factors to set {', '.join(given)} of: drop them"


_FACTORS_ALONE = ("init", "init_std", "dropout")
_IDLE = {
    "full": ("rank", "alpha", *_FACTORS_ALONE),
    "rows": ("rank", "alpha", *_FACTORS_ALONE),
    "bias": _FACTORS_ALONE,
}


def _roles_problem(roles: str) -> str | None:
    try:
        parse_roles(roles)
    except InputError as error:
        return str(error)
    return None


def _rule_problems(rule: Rule) -> Iterable[str]:
    name = described(rule.target)
    ranks, alphas = _as_tuple(rule.rank), _as_tuple(rule.alpha)
    least = 0 if len(ranks) > 1 else 1
    if not all(_is_integer(rank) and rank >= least for rank in ranks) or not any(ranks):
        yield (
            f"rank of {name} must be an integer of at least 1, or a tuple of them along the "
            f"stack (0: not adapted), got {rule.rank!r}"
        )
    if not all(_is_number(alpha) and 0 < alpha < math.inf for alpha in alphas) or not alphas:
        yield f"alpha of {name} must be a positive finite number, got {rule.alpha!r}"
    if len(ranks) > 1 and len(alphas) > 1 and len(ranks) != len(alphas):
        yield f"{name} has {len(ranks)} ranks and {len(alphas)} alphas: give as many of both"
    if rule.variant not in VARIANTS:
        yield f"variant of {name} is {rule.variant!r}; there are {', '.join(VARIANTS)}"
    rows = rule.rows if isinstance(rule.rows, tuple) else ()
    if (rule.variant == "rows") != bool(rows) or not all(map(_is_integer, rows)):
        yield (
            f"{name}: variant 'rows' needs the rows to train, as in Rule(..., rows=(5, 7)), and no "
            f"other has them; got {rule.rows!r}"
        )
    if rule.init not in INITIALISERS:
        yield f"init of {name} is {rule.init!r}; there are {', '.join(INITIALISERS)}"
    if not _is_number(dropout := rule.dropout) or dropout is None or not 0 <= dropout < 1:
        yield f"dropout of {name} must be at least 0 and below 1, got {rule.dropout!r}"
    std = rule.init_std
    if std is not None and rule.init != "gaussian":
        yield f"init_std of {name} is {std!r}, but init is {rule.init!r}: only gaussian has one"
    if std is not None and not (_is_number(std) and 0 < std < math.inf):
        yield f"init_std of {name} must be positive and finite, got {std!r}"


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _pattern_problem(pattern: Target) -> str | None:
    try:
        re.compile(pattern) if isinstance(pattern, str) else None
    except re.error as error:
        return f"{pattern!r} is not a regular expression: {error}"
    return None
