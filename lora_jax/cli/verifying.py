"""A run beside torch + PEFT, printed."""

from importlib.util import find_spec

from lora_jax.cli import runs
from lora_jax.cli.answers import prompt_ids
from lora_jax.cli.base import load_base, require_same_base
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

    directory = runs.adapter_directory(options.run)
    console = open_console()
    enable_compilation_cache()
    base = load_base(runs.model_of(options.run, options.model), "float32", console)
    require_same_base(directory, base)
    asked = options.prompts or tuple(dict.fromkeys((*runs.prompts_of(options.run), *EVERYDAY)))
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
        )
    console.print(render(report))
    return 0 if report.agrees else DISAGREES


def _require_torch() -> None:
    missing = [name for name in ("torch", "transformers", "peft") if find_spec(name) is None]
    if missing:
        raise InputError(
            f"{', '.join(missing)} not installed: verify compares with it, so install "
            "lora-jax[torch]"
        )
