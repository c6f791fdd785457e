"""Options shared by the commands, as frozen dataclasses."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lora_jax.errors import InputError

LINEAR_LAYERS = r".*_proj/kernel"
"""Every linear layer of a decoder's blocks."""


@dataclass(frozen=True)
class ModelOptions:
    """The base model and how it computes."""

    model: str = "smollm2-135m"
    """Hugging Face directory, .gguf file, hub id (org/name), or an alias: smollm2-135m, tiny."""
    precision: Literal["float32", "bfloat16", "float16", "mixed_bfloat16", "mixed_float16"] = (
        "float32"
    )
    """Of base and computation; mixed: the base in float32, as adapter and optimizer always are."""
    remat: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more time."""


@dataclass(frozen=True)
class DataOptions:
    """Rows to learn from and rows to be judged by."""

    data: Path
    """JSON Lines, JSON or Parquet file of messages, conversations, instruction and output,
    prompt and completion, or text."""
    heldout: Path | None = None
    """As data: rows whose loss is taken before and after, never trained on."""
    max_length: int = 256
    """Tokens in a packed sequence, and the most that one row may have."""
    truncate: Literal["error", "drop", "end", "split"] = "error"
    """Rows longer than max-length: refuse the file, leave them out, cut their end off, or split
    plain text."""
    packing: Literal["packed", "buckets", "padded"] = "packed"
    """Several rows in a sequence; one, in sequences of a few lengths; one, all of one length."""
    assistant_turns: Literal["all", "last"] = "all"
    """Turns of a conversation that are learnt; of text it is every token."""
    ignore_fields: tuple[str, ...] = ()
    """Fields of rows to leave out of account; any other that nothing reads is an error."""
    skip_bad_lines: int = 0
    """How many rows of a file may be unusable; they are left out and listed."""
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
    variant: Literal["lora", "dora"] = "lora"
    """dora trains the norm of each output's weights as well."""
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
    dropout: float = 0.0
    """Share of the entries of A's input that training drops."""


@dataclass(frozen=True)
class OptimOptions:
    """AdamW under a learning-rate schedule."""

    learning_rate: float = 5e-4
    """Peak learning rate."""
    schedule: Literal[
        "cosine", "linear", "constant", "hf_cosine", "hf_linear", "hf_constant", "minimind"
    ] = "cosine"
    """After the warm-up; hf_* start at 0, as Hugging Face's Trainer does."""
    warmup: float = 0.1
    """Updates in which the learning rate rises, or, below 1, their share of all."""
    final_lr: float = 0.0
    """What the learning rate falls towards, as a share of the peak."""
    weight_decay: float = 0.01
    """Decoupled, as in torch's AdamW."""
    clip_norm: float = 1.0
    """Largest global norm of the adapter's gradient."""
    b_ratio: float = 1.0
    """B's learning rate over A's (LoRA+)."""
    freeze: tuple[Literal["a", "b"], ...] = ()
    """Factors that don't train; a is LoRA-FA."""


@dataclass(frozen=True)
class RunOptions:
    """When a run looks at itself, what it keeps, and how it goes on."""

    eval_every: int = 0
    """Updates between evaluations on the held-out rows; 0 for start and end alone."""
    sample_every: int = 0
    """Updates between answers to the prompts on the way, in samples.jsonl; 0 for never."""
    save_every: int = 50
    """Updates between checkpoints; 0 for one at the end or when the run is stopped."""
    keep: int = 2
    """Checkpoints to keep, the newest, beside the best."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """Where a checkpoint can't be written (the disk is full, say): end the run, or go on with the
    checkpoints before it."""
    keep_best: bool = False
    """Write the adapter of the lowest held-out loss, not the last one."""
    patience: int = 0
    """Evaluations in a row without a lower held-out loss after which to stop; 0 for never."""
    max_faults: int = 3
    """Updates in a row with a loss or gradient that is not finite after which to stop."""
    resume: bool = False
    """Go on from the newest checkpoint in --out; what decides the run must be the same."""
    force: bool = False
    """Resume although something differs."""
    log_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where metrics go beside metrics.jsonl."""


@dataclass(frozen=True)
class DeviceOptions:
    """Which devices compute, and how they share the work."""

    placement: Literal["single", "pmap", "mesh"] = "single"
    """One device; a replica on every device; or a mesh over which base and rows are split."""
    mesh_data: int | None = None
    """Of a mesh: copies of the weights that see different rows; by default what is left."""
    mesh_fsdp: int = 1
    """Of a mesh: parts into which weights are split, each of which sees different rows."""
    mesh_tensor: int = 1
    """Of a mesh: parts into which each product is split."""
    distributed: bool = False
    """Several processes: read the cluster's environment, or the three options below."""
    coordinator: str | None = None
    """host:port of process 0."""
    num_processes: int | None = None
    """Processes in the whole run."""
    process_id: int | None = None
    """This process, from 0."""


_RANGES = {
    "learning_rate": (0.0, math.inf),
    "warmup": (0.0, math.inf),
    "final_lr": (0.0, 1.0),
    "weight_decay": (0.0, math.inf),
    "clip_norm": (1e-12, math.inf),
    "epochs": (1, math.inf),
    "batch_size": (1, math.inf),
    "accumulate": (1, math.inf),
    "max_length": (2, math.inf),
    "skip_bad_lines": (0, math.inf),
    "seed": (0, 2**32 - 1),
    "b_ratio": (0.0, math.inf),
    "eval_every": (0, math.inf),
    "sample_every": (0, math.inf),
    "save_every": (0, math.inf),
    "keep": (1, math.inf),
    "patience": (0, math.inf),
    "max_faults": (1, math.inf),
}


def require_ranges(*groups: Any) -> None:
    """Raise one InputError naming every number that is out of its range.

    >>> require_ranges(OptimOptions(final_lr=10), RunOptions())
    Traceback (most recent call last):
    ...
    lora_jax.errors.InputError: final_lr is 10, expected between 0 and 1
    """
    values = {name: value for group in groups for name, value in vars(group).items()}
    wrong = [
        f"{name} is {values[name]:g}, expected between {low:g} and {high:g}"
        for name, (low, high) in _RANGES.items()
        if name in values and not (low <= values[name] <= high and math.isfinite(values[name]))
    ]
    if wrong:
        raise InputError("; ".join(wrong))
