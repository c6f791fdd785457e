"""Recipes of tutorials and papers for ``--preset``: a table of options, each with its source.

Three kinds, which can be given together, the later before the earlier: whole recipes, a rank for a
task and a size of model, and single choices (which weights, which scale). A scale of 1, as some
have it, is an alpha that equals the rank.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lora_jax.errors import InputError
from lora_jax.paths import nearest

Groups = dict[str, dict[str, Any]]
"""Options by group, as a config file has them."""


class Recipe(NamedTuple):
    """What a name of ``--preset`` stands for."""

    about: str
    options: Mapping[str, Mapping[str, Any]]
    source: str
    alpha_per_rank: float | None = None
    """Where alpha goes with the rank that the presets before it give."""


QUERY_VALUE = [r".*[./][qv]_proj[./](kernel|weight)"]
ATTENTION = [r".*[./][qkvo]_proj[./](kernel|weight)"]
ALL_LINEAR = [r".*[./](q|k|v|o|gate|up|down)_proj[./](kernel|weight)"]

_PAPER = "Hu et al., https://arxiv.org/abs/2106.09685"
_LORALIB = "https://github.com/microsoft/LoRA"
_TUTORIAL = "tutorial, PEFT with a Trainer"

_WHOLE = {
    "minimind": Recipe(
        "square layers, rank 16, scale 1",
        {
            "lora": {
                "rank": 16,
                "alpha": 16,
                "targets": ["square"],
                "init": "gaussian",
                "init_std": 0.02,
            },
            "optim": {"learning_rate": 5e-4, "schedule": "minimind", "warmup": 0},
            "data": {"epochs": 5, "batch_size": 2, "max_length": 512},
        },
        "https://github.com/jingyaogong/minimind, model/model_lora.py and its notebook",
    ),
    "opt-350m": Recipe(
        "q and v, rank 8, alpha 32",
        {"lora": {"rank": 8, "alpha": 32, "dropout": 0.1, "targets": QUERY_VALUE}},
        "PEFT's README of 2023",
    ),
    "simple": Recipe(
        "q and v, rank 8, alpha 16",
        {"lora": {"rank": 8, "alpha": 16, "targets": QUERY_VALUE}},
        "tutorial, LoRALinear in torch",
    ),
    "trainer": Recipe(
        "q, k, v and o, rank 16, alpha 32, learning rate 1e-4",
        {
            "lora": {"rank": 16, "alpha": 32, "dropout": 0.1, "targets": ATTENTION},
            "optim": {"learning_rate": 1e-4, "schedule": "hf_linear", "warmup": 0.1},
            "data": {"epochs": 3, "batch_size": 4, "accumulate": 4, "max_length": 512},
        },
        _TUTORIAL,
    ),
    "e2e": Recipe(
        "GPT-2 M on E2E: q and v, rank 4, alpha 32, learning rate 2e-4",
        {
            "lora": {"rank": 4, "alpha": 32, "dropout": 0.1, "targets": QUERY_VALUE},
            "optim": {"learning_rate": 2e-4, "schedule": "hf_linear", "warmup": 500},
            "data": {"epochs": 5, "batch_size": 8, "max_length": 512},
        },
        f"{_LORALIB}, examples/NLG",
    ),
    "glue": Recipe(
        "RoBERTa on GLUE: q and v, rank 8, alpha 16, learning rate 5e-4",
        {
            "lora": {"rank": 8, "alpha": 16, "targets": QUERY_VALUE},
            "optim": {
                "learning_rate": 5e-4,
                "schedule": "hf_linear",
                "warmup": 0.06,
                "weight_decay": 0.1,
            },
            "data": {"epochs": 30, "batch_size": 16, "max_length": 512},
        },
        f"{_LORALIB}, examples/NLU",
    ),
}

_RANKS = {
    "classification": {"small": 8, "medium": 16, "large": 32},
    "generation": {"small": 16, "medium": 32, "large": 64},
    "reasoning": {"small": 32, "medium": 64, "large": 128},
}

_BY_TASK = {
    f"{task}-{size}": Recipe(
        f"{task} with a {size} model: rank {rank}, alpha {2 * rank}",
        {"lora": {"rank": rank, "alpha": 2 * rank}},
        _TUTORIAL,
    )
    for task, sizes in _RANKS.items()
    for size, rank in sizes.items()
}

_CHOICES = {
    "query-value": Recipe(
        "q and v, the paper's best two", {"lora": {"targets": QUERY_VALUE}}, f"{_PAPER}, 7.1"
    ),
    "attention": Recipe("q, k, v and o", {"lora": {"targets": ATTENTION}}, _TUTORIAL),
    "all": Recipe("attention and MLP", {"lora": {"targets": ALL_LINEAR}}, _TUTORIAL),
    "conservative": Recipe("alpha = rank", {}, _TUTORIAL, 1.0),
    "standard": Recipe("alpha = 2 rank", {}, _TUTORIAL, 2.0),
    "aggressive": Recipe("alpha = 4 rank", {}, _TUTORIAL, 4.0),
}

RECIPES: dict[str, Recipe] = {**_WHOLE, **_BY_TASK, **_CHOICES}
"""Every preset by its name."""


def options_of(names: Iterable[str]) -> Groups:
    """The options of some presets, a later one before an earlier.

    Raises:
      InputError: unknown names, all of them, each with the nearest; or an alpha by rank before
        any rank.

    >>> options_of(["generation-small", "aggressive"])
    {'lora': {'rank': 16, 'alpha': 64.0}}
    """
    names = list(names)
    if unknown := [name for name in names if name not in RECIPES]:
        hints = (f"{name!r} (nearest: {nearest(name, RECIPES, 1) or '-'})" for name in unknown)
        raise InputError(f"no preset {', '.join(hints)}; there are {', '.join(RECIPES)}")
    found: Groups = {}
    for name in names:
        recipe = RECIPES[name]
        for group, options in recipe.options.items():
            found[group] = {**found.get(group, {}), **options}
        if recipe.alpha_per_rank is not None:
            found["lora"] = _with_alpha(found.get("lora", {}), name, recipe.alpha_per_rank)
    return found


def described() -> str:
    """A line for each preset, for people.

    >>> print(described().splitlines()[0])
    - minimind: square layers, rank 16, scale 1
    """
    return "\n".join(f"- {name}: {recipe.about}" for name, recipe in RECIPES.items())


def _with_alpha(options: Mapping[str, Any], name: str, per_rank: float) -> dict[str, Any]:
    if "rank" not in options:
        raise InputError(
            f"preset {name} sets alpha by the rank of a preset before it, as in "
            f"--preset generation-small {name}"
        )
    return {**options, "alpha": per_rank * options["rank"]}
