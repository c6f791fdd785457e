"""Write a run's adapter in the format of another library.

- peft: a directory for PEFT; with --for-serving one that vLLM and SGLang take as well
- gguf: a .gguf file for llama.cpp
- mlx: a directory for mlx-lm
- loralib: a .pth, .pt or .bin for microsoft/LoRA; likewise lora_layer and minimind
- kohya: a .safetensors for sd-scripts; likewise diffusers
- torchtune: a .safetensors, .pt or .bin

What a format can't hold is refused by name; what had to be folded to fit is printed. To fold the
adapter into the base instead: lora-jax merge.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Options:
    """What to write, where to, and how."""

    source: Annotated[Path, tyro.conf.Positional]
    """A run of lora-jax train, a PEFT directory, or an adapter file of any format."""
    out: Annotated[Path, tyro.conf.Positional]
    """New file or directory, whichever the format has; the suffix says how a file is written."""
    format: str = "peft"
    """Of the result; an unknown one is answered with the list."""
    model: str | None = None
    """Base model, if lora-jax didn't write the source and note it there."""
    for_serving: bool = False
    """With peft: one rank and one scale for all layers, without whatever servers don't load."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Of A and B; by default float32."""
    alpha: float | None = None
    """lora_alpha of training, for sources that hold A and B alone."""
    rotary: Literal["halves", "neighbours"] | None = None
    """Which coordinates of q and k torchtune's model turns together; by default halves for Qwen's
    and Phi's families and neighbours for others. A note says which."""


def run(options: Options) -> int:
    """Write it; nothing that is there is overwritten."""
    from lora_jax.cli.adapter_bases import require_absent

    require_absent(options.out)
    from lora_jax.cli.converting import export_adapter

    return export_adapter(options)
