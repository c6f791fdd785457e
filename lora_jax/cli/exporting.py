"""A run as Hugging Face weights."""

from typing import Any

import jax
import numpy as np
from rich.console import Console

import lora_jax as lora
from lora_jax.cli import runs
from lora_jax.cli.base import Base, load_base, read_adapter
from lora_jax.cli.merge import Options
from lora_jax.cli.terminal import open_console


def write_merged(options: Options) -> int:
    """Run `lora-jax merge`."""
    console = open_console()
    model = runs.model_of(options.run, options.model)
    base = load_base(model, runs.precision_of(options.run), console)
    params = base.params if options.base_only else _merged(options, base, console)
    _write(options, base, params)
    what = "the base" if options.base_only else "base and adapter, merged,"
    console.print(f"{what} written to {options.out} (a Hugging Face directory)", soft_wrap=True)
    return 0


def _merged(options: Options, base: Base, console: Console) -> Any:
    adapter, plan = read_adapter(runs.adapter_directory(options.run), base)
    merged = lora.merge(base.params, adapter, plan)
    lost = max(lora.rounding_loss(base.params, merged, adapter, plan).values())
    console.print(
        f"largest entry of an update lost to rounding: {lost:.1e} ({base.config.dtype} weights)"
    )
    return merged


def _write(options: Options, base: Base, params: Any) -> None:
    from interop import hf

    hf.write(
        options.out,
        base.config,
        jax.tree.map(np.asarray, params),
        tokenizer=base.chat.tokenizer,
        chat_template=base.chat.template,
        special_tokens=base.special_tokens,
        eos_ids=base.eos_ids,
    )
