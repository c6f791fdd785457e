"""Show which weights of a model would get an adapter, and how each is used."""

from dataclasses import dataclass, field
from typing import Literal

from lora_jax.cli.options import LoraOptions, ModelOptions


@dataclass(frozen=True)
class Options:
    """The model and the targets."""

    model: ModelOptions = field(default_factory=ModelOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    form: Literal["table", "json"] = "table"
    """For a reader, or for a program: with --form json nothing but JSON is printed."""


def run(options: Options) -> int:
    """Print the plan, and the leaves that stay frozen."""
    import jax
    import jax.numpy as jnp

    import lora_jax as lora
    from lora_jax.cli.base import load_base
    from lora_jax.cli.preparing import lora_config
    from lora_jax.cli.terminal import open_console
    from lora_jax.models.decoder import Decoder
    from lora_jax.paths import named_leaves

    console = open_console(stderr=options.form == "json")
    base = load_base(options.model.model, options.model.precision, console)
    decoder = Decoder(base.config)
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)

    def model_fn(params, tokens):
        return decoder.apply({"params": params}, tokens)[0]

    plan = lora.plan(model_fn, base.params, tokens, config=lora_config(options.lora))
    if options.form == "json":
        print(lora.explain(plan, form="json"))
        return 0
    console.print(lora.explain(plan, width=console.width), markup=False, soft_wrap=True)
    frozen = [path for path in named_leaves(base.params) if path not in plan]
    console.print(f"frozen: {', '.join(frozen)}", soft_wrap=True)
    return 0
