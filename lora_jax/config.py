"""What the user asks for: which weights are adapted, at which rank and scale."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from lora_jax.errors import InputError
from lora_jax.site import INITIALISERS, ROLES, Role


@dataclass(frozen=True)
class Rule:
    """A target pattern and what it overrides; ``None`` keeps the config's own value.

    >>> Rule(r".*/mlp/.*", rank=4).rank
    4
    """

    pattern: str
    rank: int | None = None
    alpha: float | None = None
    init: str | None = None
    init_std: float | None = None
    dropout: float | None = None


@dataclass(frozen=True)
class LoraConfig:
    """Which weights get an adapter, and its hyper-parameters.

    Args:
      rank: size of the inner axis of A and B.
      alpha: numerator of the scale.
      targets: regular expressions that match whole leaf paths, or `Rule` values; tried in
        order, the first that matches decides.
      exclude: regular expressions; a leaf that one of them matches is never adapted.
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
    >>> config.rule_for("layers/k_proj/kernel").rank, config.rule_for("norm/scale")
    (4, None)
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str | tuple[str | Rule, ...] = ()
    exclude: str | tuple[str, ...] = ()
    use_rslora: bool = False
    init: str = "kaiming_uniform"
    init_std: float | None = None
    dropout: float = 0.0
    axes: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        problems = list(_problems(self))
        if problems:
            raise InputError("LoraConfig: " + "; ".join(problems))

    @property
    def rules(self) -> tuple[Rule, ...]:
        """``targets`` as rules, each completed by the config's own values."""
        targets = (self.targets,) if isinstance(self.targets, str) else self.targets
        return tuple(_completed(_as_rule(target), self) for target in targets)

    @property
    def exclude_patterns(self) -> tuple[str, ...]:
        """``exclude`` as a tuple."""
        return (self.exclude,) if isinstance(self.exclude, str) else self.exclude

    def rule_for(self, path: str) -> Rule | None:
        """The first rule that matches ``path``; ``None`` if the leaf stays frozen."""
        if any(re.fullmatch(pattern, path) for pattern in self.exclude_patterns):
            return None
        return next((rule for rule in self.rules if re.fullmatch(rule.pattern, path)), None)

    def roles_for(self, path: str) -> tuple[Role, ...] | None:
        """The axis roles that the user declared for ``path``, if any."""
        matches = (roles for pattern, roles in self.axes if re.fullmatch(pattern, path))
        found = next(matches, None)
        return None if found is None else parse_roles(found)


def scale_of(rule: Rule, use_rslora: bool) -> float:
    """alpha/rank, or alpha/√rank under rsLoRA.

    >>> scale_of(Rule(".*", rank=16, alpha=32), use_rslora=False)
    2.0
    """
    rank, alpha = _given(rule.rank), _given(rule.alpha)
    return alpha / (math.sqrt(rank) if use_rslora else rank)


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


def _as_rule(target: str | Rule) -> Rule:
    return Rule(target) if isinstance(target, str) else target


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


def _problems(config: LoraConfig) -> Iterable[str]:
    rules = config.rules
    if not rules:
        yield "targets is empty: give at least one regular expression over leaf paths"
    for rule in rules:
        yield from _rule_problems(rule)
    patterns = [rule.pattern for rule in rules] + [*config.exclude_patterns]
    patterns += [pattern for pattern, _ in config.axes]
    yield from filter(None, map(_pattern_problem, patterns))
    for _, roles in config.axes:
        parse_roles(roles)


def _rule_problems(rule: Rule) -> Iterable[str]:
    if not isinstance(rule.rank, int) or isinstance(rule.rank, bool) or rule.rank < 1:
        yield f"rank of {rule.pattern!r} must be an integer of at least 1, got {rule.rank!r}"
    if not isinstance(rule.alpha, int | float) or not 0 < rule.alpha < math.inf:
        yield f"alpha of {rule.pattern!r} must be a positive finite number, got {rule.alpha!r}"
    if rule.init not in INITIALISERS:
        yield f"init of {rule.pattern!r} is {rule.init!r}; there are {', '.join(INITIALISERS)}"
    if rule.dropout is None or not 0 <= rule.dropout < 1:
        yield f"dropout of {rule.pattern!r} must be at least 0 and below 1, got {rule.dropout!r}"
    if rule.init_std is not None and not 0 < rule.init_std < math.inf:
        yield f"init_std of {rule.pattern!r} must be positive and finite, got {rule.init_std!r}"


def _pattern_problem(pattern: str) -> str | None:
    try:
        re.compile(pattern)
    except re.error as error:
        return f"{pattern!r} is not a regular expression: {error}"
    return None
