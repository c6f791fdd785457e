"""``lora-jax``: a table of commands, each imported only when it is called."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from lora_jax.errors import InputError


class Command(NamedTuple):
    """Where a command lives: ``module.Options`` are its flags, ``module.run`` does it."""

    module: str
    summary: str


COMMANDS = {
    "train": Command("train", "fine-tune a model on chat rows and write a PEFT adapter"),
    "sweep": Command("sweep", "train adapters of several settings at once over one base"),
    "generate": Command("generate", "answer prompts, with and without the adapter of a run"),
    "verify": Command("verify", "compare a run with torch + PEFT, layer by layer"),
    "merge": Command("merge", "fold an adapter into its base, as a Hugging Face directory"),
    "import": Command("import_adapter", "make a PEFT directory of an adapter of any format"),
    "export": Command("export_adapter", "write an adapter for llama.cpp, mlx-lm, vLLM and others"),
    "diff": Command("diff", "compare two adapters of any formats, module by module"),
    "inspect data": Command(
        "inspect_data", "show rows as the model reads them, trained tokens marked"
    ),
    "inspect plan": Command("inspect_plan", "show which weights a target pattern adapts, and how"),
    "inspect": Command("inspect_adapter", "show what is in an adapter, whatever its format"),
    "bench flops": Command("bench_flops", "count the training step's FLOPs beside the theory"),
    "bench step": Command("bench_step", "time the training step beside torch + PEFT"),
    "bench convert": Command("bench_convert", "time state dict <-> parameters beside memcpy"),
    "bench trace": Command("bench_trace", "time tracing beside LoRA written by hand"),
}

USAGE_ERROR, INTERRUPTED, UNREAD = 2, 130, 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
      The exit status: 2 for bad input and for files that can't be read or written, 130 after
      Ctrl-C, 141 where the reader of the output has gone.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = next((n for n in COMMANDS if words[: len(n.split())] == n.split()), "")
    try:
        status = _run(name, words)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return UNREAD
    except (InputError, OSError) as error:
        print(f"lora-jax {name}".rstrip() + f": {_reason(error)}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _reason(error: InputError | OSError) -> str:
    """What the system says of a file, without its number."""
    if isinstance(error, InputError) or not error.strerror:
        return str(error)
    return ": ".join(map(str, filter(None, (error.filename, error.strerror))))


def _run(name: str, words: list[str]) -> int:
    if words[:1] == ["--version"]:
        return _print_version()
    if not name:
        return _print_help(words)
    from lora_jax.cli.parsing import parse

    command = import_module(f"lora_jax.cli.{COMMANDS[name].module}")
    own = words[len(name.split()) :]
    return command.run(parse(command.Options, own, f"lora-jax {name}", command.__doc__))


def _print_help(words: list[str]) -> int:
    asked = not words or words[0] in ("-h", "--help", "help")
    lines = [
        "usage: lora-jax COMMAND [OPTIONS]",
        "",
        "LoRA for JAX, with exact interop to PyTorch.",
        "",
    ]
    lines += [f"  {name:<14}{command.summary}" for name, command in COMMANDS.items()]
    lines += ["", "lora-jax COMMAND --help shows a command's options."]
    if not asked:
        lines.insert(0, f"lora-jax: no command {' '.join(words[:2])!r}")
    print("\n".join(lines), file=sys.stdout if asked else sys.stderr)
    return 0 if asked else USAGE_ERROR


def _print_version() -> int:
    from importlib.metadata import version

    print(f"lora-jax {version('lora-jax')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
