"""Options shared by the commands, as frozen dataclasses."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_jax.errors import InputError

LINEAR_LAYERS = r".*_proj/kernel"
"""Every linear layer of a decoder's blocks."""


@dataclass(frozen=True)
class ModelOptions:
    """The base model and how it computes."""

    model: str = "smollm2-135m"
    """Hugging Face directory, .gguf file, hub id (org/name), or an alias: smollm2-135m, tiny."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the base weights and of the computation; adapter and optimizer are float32."""
    remat: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more time."""


@dataclass(frozen=True)
class DataOptions:
    """Rows to learn from and rows to be judged by."""

    data: Path
    """JSON Lines file, one {"messages": [{"role": ..., "content": ...}, ...]} a line."""
    heldout: Path | None = None
    """As data: rows whose loss is taken before and after, never trained on."""
    max_length: int = 256
    """Tokens in a packed sequence, and the most that one row may have."""
    truncate: Literal["error", "drop", "end"] = "error"
    """Rows longer than max-length: refuse the file, leave them out, or cut their end off."""
    batch_size: int = 2
    """Sequences in a forward pass."""
    accumulate: int = 1
    """Forward passes an update; their losses are weighted by tokens."""
    epochs: int = 3
    """Times each row is seen."""
    seed: int = 0
    """Of the order of the rows and of the adapter's first values."""


@dataclass(frozen=True)
class LoraOptions:
    """Which weights get an adapter, and its size."""

    rank: int = 16
    """Inner size of A and B."""
    alpha: float = 32.0
    """The update is scaled by alpha/rank."""
    targets: tuple[str, ...] = (LINEAR_LAYERS,)
    """Regular expressions that match whole leaf paths; see: lora-jax inspect plan."""
    exclude: tuple[str, ...] = ()
    """Regular expressions over leaf paths that stay frozen."""
    rslora: bool = False
    """Scale by alpha/√rank instead (rsLoRA)."""
    init: Literal["kaiming_uniform", "gaussian"] = "kaiming_uniform"
    """How A starts; B starts at zero."""
    init_std: float | None = None
    """Standard deviation of gaussian; 1/rank if not given."""


@dataclass(frozen=True)
class OptimOptions:
    """AdamW under warm-up and cosine decay."""

    learning_rate: float = 5e-4
    """Peak learning rate."""
    warmup: float = 0.1
    """Share of the updates in which the learning rate rises."""
    final_lr: float = 0.0
    """What the learning rate falls towards, as a share of the peak."""
    weight_decay: float = 0.01
    """Decoupled, as in torch's AdamW."""
    clip_norm: float = 1.0
    """Largest global norm of the adapter's gradient."""


_RANGES = {
    "learning_rate": (0.0, math.inf),
    "warmup": (0.0, 1.0),
    "final_lr": (0.0, 1.0),
    "weight_decay": (0.0, math.inf),
    "clip_norm": (1e-12, math.inf),
    "epochs": (1, math.inf),
    "batch_size": (1, math.inf),
    "accumulate": (1, math.inf),
    "max_length": (2, math.inf),
    "seed": (0, 2**32 - 1),
}


def require_ranges(optim: OptimOptions, data: DataOptions) -> None:
    """Raise one InputError naming every number that is out of its range.

    >>> require_ranges(OptimOptions(warmup=10), DataOptions(Path("rows.jsonl")))
    Traceback (most recent call last):
    ...
    lora_jax.errors.InputError: warmup is 10, expected between 0 and 1
    """
    values = vars(optim) | vars(data)
    wrong = [
        f"{name} is {values[name]:g}, expected between {low:g} and {high:g}"
        for name, (low, high) in _RANGES.items()
        if not low <= values[name] <= high or math.isinf(values[name])
    ]
    if wrong:
        raise InputError("; ".join(wrong))
