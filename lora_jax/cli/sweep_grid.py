"""The settings of a sweep: every combination of the values given, each with a name."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from lora_jax.cli import train
from lora_jax.cli.options import require_ranges
from lora_jax.cli.sweep import Options
from lora_jax.errors import InputError


class Setting(NamedTuple):
    """What tells one adapter of a sweep from another."""

    learning_rate: float
    rank: int
    alpha: float
    seed: int

    @property
    def name(self) -> str:
        """Its directory.

        >>> Setting(3e-4, 8, 16.0, 0).name
        'lr0.0003-rank8-alpha16-seed0'
        """
        rate, rank, alpha, seed = map(_in_name, self)
        return f"lr{rate}-rank{rank}-alpha{alpha}-seed{seed}"


def settings_of(options: Options) -> list[Setting]:
    """Every combination, the last value varying fastest.

    Raises:
      InputError: naming every value that is given twice or is out of range.
    """
    values = {
        "learning_rates": options.learning_rates or (options.optim.learning_rate,),
        "ranks": options.ranks or (options.lora.rank,),
        "alphas": options.alphas or (options.lora.alpha,),
        "seeds": options.seeds or (options.data.seed,),
    }
    problems = [problem for name, each in values.items() for problem in _problems(name, each)]
    if problems:
        raise InputError("; ".join(problems))
    require_ranges(options.data, options.optim)
    return [Setting(*combination) for combination in product(*values.values())]


def options_of(options: Options, setting: Setting) -> train.Options:
    """One setting as options of ``lora-jax train``, which trains the same adapter.

    That is where its seed is the sweep's; elsewhere the rows come in another order.
    """
    return train.Options(
        data=replace(options.data, seed=setting.seed),
        out=options.out / setting.name,
        model=options.model,
        lora=replace(options.lora, rank=setting.rank, alpha=setting.alpha),
        optim=replace(options.optim, learning_rate=setting.learning_rate),
    )


_RANGES = {
    "learning_rates": (0.0, math.inf),
    "ranks": (1, math.inf),
    "alphas": (1e-12, math.inf),
    "seeds": (0, 2**32 - 1),
}


def _problems(name: str, values: Sequence[float]) -> Iterator[str]:
    low, high = _RANGES[name]
    for value in values:
        if not (low <= value <= high and math.isfinite(value)):
            yield f"{name} has {value}, expected between {low:g} and {high:g}"
    for text, count in Counter(map(_in_name, values)).items():
        if count > 1:
            yield f"{name} has {text} {count} times (to six digits): give each value once"


def _in_name(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"
