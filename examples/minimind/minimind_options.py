"""What the run is told: the notebook's arguments, and the model and the schooling they mean."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from interop.hf_config import from_attributes
from lora_jax.models.config import DecoderConfig

from minimind_modes import MODES
from minimind_training import Schooling

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Options:
    """The notebook's arguments, under its names, and what it leaves open."""

    config: Path | None = None
    """YAML file with any of these; flags win over it."""
    mode: Literal["default", "faithful"] = "default"
    """The right training, or the notebook's with its defects."""
    epochs: int = 5
    batch_size: int = 2
    learning_rate: float = 5e-4
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the products; weights and the adapter are float32."""
    accumulation_steps: int = 1
    grad_clip: float = 1.0
    log_interval: int = 1
    dim: int = 512
    n_layers: int = 2
    n_heads: int = 8
    n_kv_heads: int = 2
    vocab_size: int = 6400
    max_seq_len: int = 512
    use_moe: bool = False
    aux_loss_alpha: float = 0.1
    """Factor of the experts' balance in the loss."""
    rank: int = 16
    targets: tuple[str, ...] = ("square",)
    """A preset or regular expressions over leaf paths."""
    pretrain_data: Path = HERE / "data" / "pretrain.jsonl"
    sft_data: Path = HERE / "data" / "sft.jsonl"
    lora_data: Path = HERE / "data" / "lora.jsonl"
    rows: int | None = 2
    """How many of each file, from the first on; all if it is null."""
    tokenizer: Path | None = None
    """Directory of a tokenizer of MiniMind's; one is trained on the rows if it is null."""
    seed: int = 0
    save_dir: Path = Path("runs/minimind")
    save_weight: str = "minimind_lora"
    save_interval: int = 1
    """Updates between two saves of the adapter; 0 for none."""


def model_config(options: Options) -> DecoderConfig:
    said = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len", "use_moe")
    sizes = {name: getattr(options, name) for name in said}
    config = from_attributes({"model_type": "minimind", **sizes})
    return replace(config, dtype=options.dtype)


def schooling_of(options: Options) -> Schooling:
    alpha = options.aux_loss_alpha if options.use_moe else 0.0
    rate, clip = options.learning_rate, options.grad_clip
    return Schooling(MODES[options.mode], rate, options.accumulation_steps, clip, alpha)
