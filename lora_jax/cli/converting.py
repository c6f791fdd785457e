"""Adapters from other libraries' formats and into them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from lora_jax.cli.adapter_bases import (
    AdapterBase,
    given_of,
    load_adapter_base,
    model_of,
    read_for,
)
from lora_jax.cli.export_adapter import Options as ExportOptions
from lora_jax.cli.import_adapter import Options as ImportOptions
from lora_jax.cli.terminal import open_console
from lora_jax.errors import InputError, raise_listed

_PEFT, _GGUF = "peft", "gguf"


def import_adapter(options: ImportOptions) -> int:
    """Run `lora-jax import`."""
    console = open_console()
    _require_source(options.source)
    merged = _enabled_parts(options.merged_linear)
    base = load_adapter_base(model_of(options.source, options.model))
    given = given_of(base, alpha=options.alpha, rotary=options.rotary, enable_lora=merged)
    adapter, plan, notes = read_for(base, options.source, given, options.format)
    _write_peft(options.out, base, adapter, plan)
    _report(console, notes, plan, f"written to {options.out} (PEFT), for {base.name}")
    return 0


def export_adapter(options: ExportOptions) -> int:
    """Run `lora-jax export`."""
    console = open_console()
    _require_source(options.source)
    _require_format(options)
    base = load_adapter_base(model_of(options.source, options.model))
    given = given_of(base, alpha=options.alpha)
    adapter, plan, notes = read_for(base, options.source, given, None)
    folded = _write(options, base, adapter, plan)
    _report(console, (*notes, *folded), plan, f"written to {options.out} ({options.format})")
    return 0


def _write(options: ExportOptions, base: AdapterBase, adapter: Any, plan: Any) -> tuple[str, ...]:
    """Write in the format that is asked for; what was folded to fit."""
    from interop import adapter_formats, gguf_adapter_writing
    from interop.adapter_plan import from_plan

    if options.format == _PEFT:
        return _write_peft(options.out, base, adapter, plan, for_serving=options.for_serving)
    file = from_plan(adapter, plan, base.file_keymap, params=base.params)
    if options.format == _GGUF and options.dtype != "bfloat16":
        dtype = options.dtype or "float32"
        return gguf_adapter_writing.write(options.out, file, base.config, dtype=dtype)
    given = given_of(base, rotary=options.rotary, dtype=options.dtype)
    return adapter_formats.write(options.out, file, options.format, given)


def _write_peft(
    out: Path, base: AdapterBase, adapter: Any, plan: Any, *, for_serving: bool = False
) -> tuple[str, ...]:
    """A PEFT directory that remembers its base; what was folded for serving."""
    from interop import peft

    return peft.write(
        out,
        adapter,
        plan,
        keymap=base.keymap,
        params=base.params,
        base_model_name=base.name,
        base=base.about,
        for_serving=for_serving,
    )


def _require_source(source: Path) -> None:
    from interop.any_adapter import peft_directory

    if not source.exists():
        raise InputError(f"{source}: no such file or directory")
    if source.is_dir() and peft_directory(source) is None and not any(source.iterdir()):
        raise InputError(f"{source} is empty: name an adapter file, a PEFT directory or a run")


def _require_format(options: ExportOptions) -> None:
    """Everything about the format that can be said before the base is loaded."""
    from interop.adapter_formats import FORMATS

    known = [_PEFT, _GGUF, *FORMATS]
    if options.format not in known:
        raise InputError(f"no adapter format {options.format!r}: there are {', '.join(known)}")
    problems = {
        f"--for-serving goes with --format peft, not with {options.format}": (
            options.for_serving and options.format != _PEFT
        ),
        f"--rotary goes with --format torchtune, not with {options.format}": (
            options.rotary is not None and options.format != "torchtune"
        ),
        "--dtype is float32 in PEFT directories": (
            options.format == _PEFT and options.dtype not in (None, "float32")
        ),
        f"{options.out}: the name of a gguf file ends in .gguf": (
            options.format == _GGUF and options.out.suffix != ".gguf"
        ),
        "--dtype bfloat16 is nothing that gguf files hold": (
            options.format == _GGUF and options.dtype == "bfloat16"
        ),
    }
    if found := [problem for problem, holds in problems.items() if holds]:
        raise InputError("; ".join(found))


def _enabled_parts(words: Iterable[str]) -> dict[str, tuple[bool, ...]]:
    """Of ``c_attn=101``: which of the parts of a merged layer have factors."""
    pairs = [word.partition("=") for word in words]
    if wrong := [name + sign + flags for name, sign, flags in pairs
                 if not (name and flags and set(flags) <= {"0", "1"})]:  # fmt: skip
        raise InputError(f"--merged-linear {' '.join(wrong)}: expected such as c_attn=101")
    names = [name for name, _, _ in pairs]
    raise_listed("--merged-linear names twice", [n for n in {*names} if names.count(n) > 1])
    return {name: tuple(flag == "1" for flag in flags) for name, _, flags in pairs}


def _report(console: Console, notes: Iterable[str], plan: Any, written: str) -> None:
    for note in notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    sites = sorted({(site.rank, site.variant) for site in plan.sites})
    kinds = ", ".join(f"{variant} of rank {rank}" for rank, variant in sites)
    count = f"{len(plan.sites)} weights ({kinds})"
    console.print(f"{count} {written}", markup=False, soft_wrap=True)
