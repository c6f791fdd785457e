"""Show which weights of a model would get an adapter, and how each is used.

--model may also be a .json file: the config.json of a decoder, or an object of shapes by name, as
a torch state dict has them. Then nothing is loaded; of shapes alone the adapted ones are matrices
(out, in), known by their names.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_jax.cli.options import LoraOptions, ModelOptions

if TYPE_CHECKING:
    from rich.console import Console

    import lora_jax as lora
    from lora_jax.models.config import DecoderConfig


@dataclass(frozen=True)
class Options:
    """The model and the targets."""

    preset: tuple[str, ...] = ()
    """Recipes for targets, rank and alpha, listed above; flags win over them."""
    model: ModelOptions = field(default_factory=ModelOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    form: Literal["table", "json"] = "table"
    """For a reader, or for a program: with --form json nothing but JSON is printed."""


def run(options: Options) -> int:
    """Print the plan, and the leaves that stay frozen."""
    import lora_jax as lora
    from lora_jax.cli.terminal import open_console
    from lora_jax.paths import named_leaves

    console = open_console(stderr=options.form == "json")
    params, plan = _planned(options, console)
    if options.form == "json":
        print(lora.explain(plan, form="json"))
        return 0
    console.print(lora.explain(plan, width=console.width), markup=False, soft_wrap=True)
    frozen = [path for path in named_leaves(params) if path not in plan]
    console.print(f"frozen: {', '.join(frozen)}", soft_wrap=True)
    return 0


def _planned(options: Options, console: "Console") -> tuple[Any, "lora.Plan"]:
    """The parameters, or their shapes, and the plan."""
    from lora_jax.cli.base import load_base
    from lora_jax.errors import InputError
    from lora_jax.files import read_json

    model, path = options.model, Path(options.model.model)
    if path.suffix != ".json":
        base = load_base(model.model, model.precision, console)
        return base.params, _traced(base.config, base.params, options.lora)
    from interop.hf_config import from_attributes
    from lora_jax.models.decoder import param_shapes

    said = read_json(path)
    if all(isinstance(value, list) for value in said.values()):
        return _by_shapes(path, said, options.lora)
    try:
        config = from_attributes(said)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    params = param_shapes(config)
    return params, _traced(config, params, options.lora)


def _traced(config: "DecoderConfig", params: Any, options: LoraOptions) -> "lora.Plan":
    import jax
    import jax.numpy as jnp

    import lora_jax as lora
    from lora_jax.cli.preparing import lora_config
    from lora_jax.models.decoder import Decoder

    decoder = Decoder(config)
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)

    def model_fn(params, tokens):
        return decoder.apply({"params": params}, tokens)[0]

    return lora.plan(model_fn, params, tokens, config=lora_config(options))


def _by_shapes(path: Path, said: dict[str, Any], options: LoraOptions) -> tuple[Any, "lora.Plan"]:
    import jax

    import lora_jax as lora
    from lora_jax.cli.preparing import lora_config
    from lora_jax.errors import InputError

    wrong = [
        name
        for name, shape in said.items()
        if not all(isinstance(size, int) and size > 0 for size in shape)
    ]
    if wrong or not said:
        raise InputError(f"{path}: no shapes in {', '.join(wrong) or 'an empty object'}")
    shapes = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in said.items()}
    return shapes, lora.plan_from_axes(shapes, lora_config(options), {".*": "out in"})
