"""Answers from a run, printed."""

import sys

from lora_jax.cli import runs
from lora_jax.cli.answers import Sampling, answers
from lora_jax.cli.base import adapted_language_model, load_base, read_adapter
from lora_jax.cli.compilation_cache import enable_compilation_cache
from lora_jax.cli.generate import Options
from lora_jax.cli.terminal import open_console
from lora_jax.errors import InputError
from lora_jax.models.generate import language_model

WAYS = {"with": ("with",), "without": ("without",), "both": ("without", "with")}


def generate_answers(options: Options) -> int:
    """Run `lora-jax generate`."""
    directory = runs.adapter_directory(options.run)
    model = runs.model_of(options.run, options.model)
    prompts = options.prompts or _typed_prompts()
    if not prompts:
        raise InputError('no prompt: give --prompts "Who are you?" or type one a line')
    console = open_console()
    enable_compilation_cache()
    base = load_base(model, runs.precision_of(options.run), console)
    adapter, plan = read_adapter(directory, base)
    forms = {
        "without": (language_model(base.config), base.params),
        "with": (adapted_language_model(base.config, plan), (base.params, adapter)),
    }
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    said = {
        way: answers(base, model, params, prompts, options.max_new_tokens, sampling)
        for way, (model, params) in forms.items()
        if way in WAYS[options.adapter]
    }
    for index, prompt in enumerate(prompts):
        console.print(f"> {prompt}", style="bold", markup=False, soft_wrap=True)
        for way, texts in said.items():
            label = f"{way} adapter: " if len(said) > 1 else ""
            console.print(f"{label}{texts[index]}", markup=False, soft_wrap=True)
    return 0


def _typed_prompts() -> tuple[str, ...]:
    lines = (line.strip() for line in sys.stdin)
    return tuple(line for line in lines if line)
