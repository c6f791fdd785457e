"""What decides a mixture of experts, as one frozen value that needs no JAX."""

from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints


@dataclass(frozen=True)
class ExpertsForm:
    """A feed-forward block of which each token meets a few experts.

    Args:
        count: experts of a layer.
        per_token: experts that a token meets, those of the largest probability.
        width: inside each expert.
        renormalised: the probabilities of a token's experts are divided by their sum.
        shared_width: inside the expert that every token meets; 0 where there is none.
        products: ``scan``, the experts one after another, each over all tokens, with zeros for
            those that it doesn't meet: the work of ``count`` experts, under any transformation;
            ``ragged``, tokens sorted by expert and `jax.lax.ragged_dot`: on accelerators the work
            of ``per_token`` experts, but JAX can't vmap it over adapters.
    """

    count: int
    per_token: int
    width: int
    renormalised: bool = False
    shared_width: int = 0
    products: Literal["scan", "ragged"] = "scan"


def expert_problems(form: ExpertsForm) -> list[str]:
    """Why these experts can't be.

    >>> expert_problems(ExpertsForm(count=2, per_token=3, width=8))
    ['experts.per_token=3 is more than experts.count=2']
    """
    known = get_args(get_type_hints(ExpertsForm)["products"])
    sizes = {name: getattr(form, name) for name in ("count", "per_token", "width")}
    checks = {
        **{f"experts.{name}={size} is below 1": size < 1 for name, size in sizes.items()},
        f"experts.per_token={form.per_token} is more than experts.count={form.count}": (
            form.per_token > form.count
        ),
        f"experts.shared_width={form.shared_width} is negative": form.shared_width < 0,
        f"experts.products={form.products!r} is none of {', '.join(known)}": (
            form.products not in known
        ),
    }
    return [problem for problem, holds in checks.items() if holds]
