"""The settings of a sweep: every combination of the values given, each with a name."""

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
        return f"lr{self.learning_rate:g}-rank{self.rank}-alpha{self.alpha:g}-seed{self.seed}"


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
    problems = [problem for name, each in values.items() for problem in _repeated(name, each)]
    if problems:
        raise InputError("; ".join(problems))
    settings = [Setting(*combination) for combination in product(*values.values())]
    for setting in settings:
        require_ranges(*_groups(options, setting).values())
    return settings


def options_of(options: Options, setting: Setting) -> train.Options:
    """One setting as options of ``lora-jax train``, which trains the same adapter.

    That is where its seed is the sweep's; elsewhere the rows come in another order.
    """
    groups = _groups(options, setting)
    return train.Options(out=options.out / setting.name, model=options.model, **groups)


def _groups(options: Options, setting: Setting) -> dict:
    return {
        "data": replace(options.data, seed=setting.seed),
        "lora": replace(options.lora, rank=setting.rank, alpha=setting.alpha),
        "optim": replace(options.optim, learning_rate=setting.learning_rate),
    }


def _repeated(name: str, values: Sequence[float]) -> Iterator[str]:
    """Names of directories have six digits of a number."""
    for text, count in Counter(f"{value:g}" for value in values).items():
        if count > 1:
            yield f"{name} has {text} {count} times, to six digits: give each value once"
