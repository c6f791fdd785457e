"""Make a PEFT directory of an adapter of any format, checked against its base.

Formats: loralib, lora_layer (tutorials' A and B), minimind, kohya, diffusers, mlx, torchtune,
gguf of llama.cpp, and PEFT itself. The result is what lora-jax train writes: generate, verify and
merge take it with --model.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Options:
    """What to import, where to, and for which base."""

    source: Annotated[Path, tyro.conf.Positional]
    """An adapter file, or a directory of PEFT or mlx-lm."""
    out: Annotated[Path, tyro.conf.Positional]
    """New PEFT directory."""
    model: str | None = None
    """Base model: Hugging Face directory, .gguf file, hub id or alias. Needed unless lora-jax wrote
    the source and noted it."""
    format: str | None = None
    """Of the source, where its content doesn't tell: an error lists them."""
    alpha: float | None = None
    """lora_alpha of training, for files that hold A and B alone."""
    rotary: Literal["halves", "neighbours"] | None = None
    """Which coordinates of q and k torchtune's model turns together; by default halves for Qwen's
    and Phi's families and neighbours for others. A note says which."""
    merged_linear: tuple[str, ...] = ()
    """loralib's MergedLinear: module=enabled parts, such as c_attn=101."""


def run(options: Options) -> int:
    """Write the directory; it appears whole or not at all."""
    from lora_jax.cli.adapter_bases import require_absent

    require_absent(options.out)
    from lora_jax.cli.converting import import_adapter

    return import_adapter(options)
