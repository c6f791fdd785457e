"""A run beside torch + PEFT, printed."""

from importlib.util import find_spec
from typing import Any

from lora_jax.cli import runs
from lora_jax.cli.answers import prompt_ids
from lora_jax.cli.base import Base, load_base, require_same_base
from lora_jax.cli.compilation_cache import enable_compilation_cache
from lora_jax.cli.terminal import open_console
from lora_jax.cli.verify import DISAGREES, Options
from lora_jax.cli.verify_report import render
from lora_jax.errors import InputError

EVERYDAY = (
    "Who are you?",
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about the sea.",
    "How do I boil an egg?",
)


def verify_run(options: Options) -> int:
    """Run `lora-jax verify`."""
    _require_torch()
    from interop import equivalence
    from interop.comparison_plot import plot_training
    from interop.decoder_training import PEFT

    directory = runs.adapter_directory(options.run)
    console = open_console()
    enable_compilation_cache()
    base = load_base(runs.model_of(options.run, options.model), "float32", console)
    require_same_base(directory, base)
    asked = options.prompts or tuple(dict.fromkeys((*runs.prompts_of(options.run), *EVERYDAY)))
    training = _training(options, base) if options.steps else None
    criteria = equivalence.Criteria(
        max_logit_difference=options.max_logit_difference, min_effect=options.min_effect
    )
    with console.status("starting") as status:
        report = equivalence.verify(
            base,
            directory,
            [prompt_ids(base, prompt) for prompt in asked],
            max_new_tokens=options.max_new_tokens,
            criteria=criteria,
            progress=status.update,
            gradients=options.gradients,
            training=training,
            base_directory=base.directory,
        )
    console.print(render(report))
    if options.plot and report.training:
        title = f"{options.steps} updates from {options.run} on, {base.name} in float32"
        plot_training(options.plot, {PEFT: report.training}, title=title)
        console.print(f"picture   {options.plot}", soft_wrap=True)
    return 0 if report.agrees else DISAGREES


def _training(options: Options, base: Base) -> Any:
    """The first batches of the rows, and the same learning rate throughout."""
    from interop.decoder_training import Training, row_batches
    from interop.torch_training import Recipe

    if options.max_length > (longest := base.config.max_positions):
        raise InputError(f"--max-length is {options.max_length}, {base.name} has {longest}")
    batches = row_batches(
        base.chat,
        base.config.vocab_size,
        runs.data_of(options.run, options.data),
        steps=options.steps,
        batch_size=options.batch_size,
        max_length=options.max_length,
    )
    return Training(batches, Recipe(lambda count: options.learning_rate))


def _require_torch() -> None:
    missing = [name for name in ("torch", "transformers", "peft") if find_spec(name) is None]
    if missing:
        raise InputError(
            f"{', '.join(missing)} not installed: verify compares with it, so install "
            "lora-jax[torch]"
        )
