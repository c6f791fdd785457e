"""What a training run is about, as values."""

from collections.abc import Callable
from typing import Any, NamedTuple

from lora_jax.cli.base import Base
from lora_jax.cli.datasets import Sequences
from lora_jax.data.batches import Batch
from lora_jax.site import Plan
from lora_jax.train.losses import LossSum

LossFn = Callable[[Any, Any, Batch], LossSum]
"""``loss_fn(adapter, params, batch)``."""


class Task(NamedTuple):
    """What is trained, on what: everything that is decided before anything is written."""

    base: Base
    rows: Sequences
    heldout: Sequences | None
    questions: tuple[str, ...]
    plan: Plan
    loss_fn: LossFn


class Judgement(NamedTuple):
    """How good an adapter is: its answers, and its loss on held-out rows if there are any."""

    answers: list[str]
    loss: float | None
