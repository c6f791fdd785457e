"""LoRA for JAX as a pure function of parameter trees.

plan    = lora.plan(model_fn, params, batch, config=config)   which weights, and how used
adapter = lora.init(key, params, plan)                        everything that trains
adapted = lora.adapt(model_fn, plan)                          adapted(params, adapter, batch)
merged  = lora.merge(params, adapter, plan)                   a new tree, for serving
print(lora.explain(plan))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_jax.adapter import Bias, DoraTriple, Full, LoraPair, Rows, cast, count
    from lora_jax.adapting import adapt
    from lora_jax.config import LoraConfig, Rule
    from lora_jax.errors import InputError
    from lora_jax.explanation import explain
    from lora_jax.initialisers import init
    from lora_jax.merging import merge, rounding_loss
    from lora_jax.planning import plan, plan_from_axes
    from lora_jax.site import Plan, Site, Use
    from lora_jax.train.many import train_many
    from lora_jax.train.members import Member
    from lora_jax.train.partition import labels, partition

_HOME = {
    "Bias": "adapter",
    "DoraTriple": "adapter",
    "Full": "adapter",
    "InputError": "errors",
    "LoraConfig": "config",
    "LoraPair": "adapter",
    "Member": "train.members",
    "Plan": "site",
    "Rows": "adapter",
    "Rule": "config",
    "Site": "site",
    "Use": "site",
    "adapt": "adapting",
    "cast": "adapter",
    "count": "adapter",
    "explain": "explanation",
    "init": "initialisers",
    "labels": "train.partition",
    "merge": "merging",
    "partition": "train.partition",
    "plan": "planning",
    "plan_from_axes": "planning",
    "rounding_loss": "merging",
    "train_many": "train.many",
}

__all__ = [
    "Bias", "DoraTriple", "Full", "InputError", "LoraConfig", "LoraPair", "Member", "Plan", "Rows",
    "Rule", "Site", "Use", "adapt", "cast", "count", "explain", "init", "labels", "merge",
    "partition", "plan", "plan_from_axes", "rounding_loss", "train_many",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that the command line starts at once."""
    if name not in _HOME:
        raise AttributeError(f"module 'lora_jax' has no attribute {name!r}")
    value = getattr(import_module(f"lora_jax.{_HOME[name]}"), name)
    globals()[name] = value
    return value
