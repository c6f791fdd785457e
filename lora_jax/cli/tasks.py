"""What a training run is about, as values."""

from collections.abc import Callable
from typing import Any, NamedTuple

from lora_jax.cli.base import Base
from lora_jax.cli.datasets import Sequences
from lora_jax.data.batches import Batch
from lora_jax.site import Plan
from lora_jax.train.losses import LossSum


class Example(NamedTuple):
    """A batch, and the key of its dropout where there is any; a leading axis of micro-batches."""

    batch: Batch
    dropout_key: Any = None
    """(2,) uint32."""


LossFn = Callable[[Any, Any, Example], LossSum]
"""``loss_fn(adapter, params, example)``."""


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
