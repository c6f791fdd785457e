"""A PEFT directory by torch module, without its model: NumPy alone.

Which modules there are and their ranks come from the tensors, scales from the config by PEFT's
own matching. `interop.peft` reads a directory for a model, and is strict; this is for looking at
one, so what makes it unusable there is a note here as long as it can be looked at at all.
"""

import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from interop import torch_io
from interop.adapter_file import FileAdapter, ModuleAdapter, RowAdapter, is_floating
from interop.peft_config import REBASED_INITS, initialiser, is_finite, is_rank, read_config
from interop.peft_copies import without_copy
from interop.peft_file_copies import (
    base_notes,
    parameter_of,
    tied_heads,
    trained_in_rows,
    trained_whole,
)
from interop.peft_file_experts import WRAPPED, experts_of, file_settings, untold_scales
from interop.peft_folders import CONFIG, PICKLED_WEIGHTS, WEIGHTS, located
from interop.peft_matching import PeftConfig, Setting, adapted_modules
from lora_jax.errors import InputError, listed, raise_listed
from lora_jax.manifest import MANIFEST, checked_base, read_small_json

_PREFIX = "base_model.model."
_FIELDS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "table_a",
    "lora_embedding_B": "table_b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_B.bias": "bias",
    "token_adapter.trainable_tokens_delta": "rows",
}
"""What stands after a module's name, and what it is; PEFT also reads names with the adapter's own
name, ``default``, in them."""
_DEFAULT = re.compile(r"\.default(?=(?:\.weight|\.bias)?$)")
_END = re.compile(rf"(.+)\.({'|'.join(map(re.escape, _FIELDS))})", re.DOTALL)
_TRAINED, _ORIGINAL = "trained whole", "of the base"
_Whole = dict[str, np.ndarray]
_Fields = dict[str, dict[str, np.ndarray]]


class PeftFile(NamedTuple):
    """A directory as it was found."""

    adapter: FileAdapter
    config: Mapping[str, Any]
    """adapter_config.json as it is."""
    base: Mapping[str, Any]
    """What the manifest says about the base; empty where there is none."""


def read(directory: str | os.PathLike) -> PeftFile:
    """Read a directory that PEFT or `interop.peft` wrote, to be looked at.

    Raises:
      InputError: a file that is absent, damaged, a link out of the directory, or differs from the
        manifest; a config without usable rank and alpha; factors that don't belong together, all
        named.
    """
    directory = located(Path(directory))
    files = (WEIGHTS, PICKLED_WEIGHTS)
    weights = next((name for name in files if (directory / name).is_file()), WEIGHTS)
    listed_files = (directory / MANIFEST).is_file()
    base = checked_base(directory, (CONFIG, weights)) if listed_files else {}
    raw = read_small_json(directory / CONFIG)
    config, problems = _config(directory / CONFIG, raw)
    tensors = torch_io.read(directory / weights)
    raise_listed(f"{directory}: tensors that stand under two names", _repeated(tensors))
    fields, whole, original = _by_module(tensors)
    raise_listed(f"{directory}: modules without both A and B", _incomplete(fields))
    pairs = {name: found for name, found in fields.items() if "rows" not in found}
    trained = trained_whole(None if problems else config, whole, fields)
    of_base = {**{name: whole[name] for name in whole if name not in trained}, **original}
    whole = {name: whole[name] for name in whole if name in trained}
    experts = {*experts_of(config, pairs)}
    settings = file_settings(config, pairs, experts)
    modules = {
        name: _module(found, settings[name], name in experts) for name, found in pairs.items()
    }
    raise_listed(f"{directory}: factors that don't belong together", _misfits(modules))
    stored = {name: found["rows"] for name, found in fields.items() if "rows" in found}
    rows = {name: _rows(name, stored[name], config) for name in trained_in_rows(config, stored)}
    found = [
        *base_notes(of_base, original, fields),
        *_notes(config, modules, settings, experts),
        *untold_scales(config, experts),
    ]
    notes = (*problems, *found, *_rebased(raw))
    tied = config.ensure_weight_tying
    return PeftFile(FileAdapter("peft", modules, whole, rows, tied, notes, of_base), raw, base)


def is_directory_of_peft(path: Path) -> bool:
    """Whether there is a config that says so; mlx-lm's has the same name and other keys."""
    config = path / CONFIG
    return config.is_file() and "peft_type" in read_small_json(config)


def _config(path: Path, raw: Mapping[str, Any]) -> tuple[PeftConfig, list[str]]:
    """The config, and why the adapter can't be used as it is, if it can't."""
    try:
        return read_config(path), []
    except InputError as error:
        config = _least_config(raw)
        if config is None:
            raise
        reason = str(error).removeprefix(f"{path} can't be used: ")
        return config, [f"it can't be used here: {reason}"]


def _least_config(raw: Mapping[str, Any]) -> PeftConfig | None:
    """What decides ranks and scales, where at least that is usable."""
    rank, alpha = raw.get("r", 8), raw.get("lora_alpha", 8)
    if raw.get("peft_type") != "LORA" or not (is_rank(rank) and is_finite(alpha)):
        return None
    return PeftConfig(rank, alpha, [], use_rslora=raw.get("use_rslora") is True)


def _by_module(tensors: Mapping[str, np.ndarray]) -> tuple[_Fields, _Whole, _Whole]:
    """Each module's tensors by field; whole parameters; those that are the base's in any case."""
    fields: _Fields = defaultdict(dict)
    whole: dict[str, _Whole] = {_TRAINED: {}, _ORIGINAL: {}}
    for name, tensor in tensors.items():
        owner, field = _meant(name)
        if field in whole:
            whole[field][owner] = tensor
        else:
            fields[owner][field] = tensor
    return fields, whole[_TRAINED], whole[_ORIGINAL]


def _meant(name: str) -> tuple[str, str]:
    """The module and the field of it that a name stands for; or a whole parameter, and whose."""
    name = name.removeprefix(_PREFIX)
    if match := _END.fullmatch(_DEFAULT.sub("", name)):
        return match[1], _FIELDS[match[2]]
    parameter, is_original = parameter_of(name)
    return parameter, _ORIGINAL if is_original else _TRAINED


def _repeated(tensors: Mapping[str, np.ndarray]) -> Iterator[str]:
    """Names that mean what another one does, as with and without the adapter's own name.

    PEFT itself stores an embedding's magnitude twice when it stores the embedding, and biases of
    modules that are trained whole when it trains all.
    """
    first: dict[tuple[str, str], str] = {}
    for name, tensor in tensors.items():
        known = first.setdefault(_meant(name), name)
        twice = without_copy(name) == without_copy(known)
        if known != name and not (twice and np.array_equal(tensors[known], tensor)):
            yield f"{known} and {name}"


def _incomplete(fields: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for name, found in fields.items():
        if not any(found.keys() >= need for need in ({"a", "b"}, {"table_a", "table_b"}, {"rows"})):
            yield name


def _module(found: Mapping[str, np.ndarray], setting: Setting, experts: bool) -> ModuleAdapter:
    if "table_a" in found:
        a, b, kind = found["table_a"], found["table_b"], "embedding"
    else:
        a, b = found["a"], found["b"]
        kind = "conv" if a.ndim > 2 else "linear"
    count = a.shape[0] // setting.rank if a.ndim else 0
    if (
        experts
        and kind == "linear"
        and count > 1
        and (a.shape[0] == count * setting.rank and b.shape[1:] == a.shape[:1])
    ):
        # A has an expert's rows side by side, B has a rank's columns side by side.
        a = a.reshape(count, setting.rank, a.shape[1])
        b = np.moveaxis(b.reshape(b.shape[0], setting.rank, count), -1, 0)
        kind = "experts"
    b = b.reshape(b.shape[:2]) if kind == "conv" and b.size == np.prod(b.shape[:2]) else b
    magnitude = found.get("magnitude")
    flat = None if magnitude is None else magnitude.reshape(-1)
    return ModuleAdapter(a, b, setting.scale, kind, flat, found.get("bias"))


def _misfits(modules: Mapping[str, ModuleAdapter]) -> Iterator[str]:
    for name, (a, b, _, kind, *_) in modules.items():
        dims = {"linear": (2, 2), "embedding": (2, 2), "experts": (3, 3)}.get(kind, (a.ndim, 2))
        if (a.ndim, b.ndim) != dims or a.shape[kind == "experts"] != b.shape[-1] or 0 in a.shape:
            yield f"{name} has A {a.shape} and B {b.shape}"
        elif not (is_floating(a) and is_floating(b)):
            yield f"{name} has A of {a.dtype} and B of {b.dtype}"


def _rows(name: str, rows: np.ndarray, config: PeftConfig) -> RowAdapter:
    wanted = config.trainable_token_indices or ()
    if isinstance(wanted, Mapping):
        wanted = next((tokens for end, tokens in wanted.items() if name.endswith(end)), ())
    return RowAdapter(tuple(wanted), rows)


def _notes(
    config: PeftConfig,
    modules: Mapping[str, ModuleAdapter],
    settings: Mapping[str, Setting],
    experts: Collection[str],
) -> Iterator[str]:
    """What a reader of the adapter should know about how config and tensors go together."""
    bounded = config.init_lora_weights in REBASED_INITS  # By the weight that they start from.
    other = [
        f"{name} has {module.rank}, the config {settings[name].rank}"
        for name, module in modules.items()
        if module.rank != settings[name].rank and not (bounded and module.rank == _sides(module)[0])
    ]
    if other:
        yield f"ranks that differ from the config's, which PEFT refuses: {listed(other)}"
    plain = [name.replace(WRAPPED, "") for name in modules if name not in experts]
    targets = adapted_modules(config, plain) if config.target_modules else plain
    tied = tied_heads(modules) if config.ensure_weight_tying else set()
    if extra := [name for name in plain if name not in targets and name not in tied]:
        yield f"factors of modules that are no targets, which PEFT drops: {listed(extra)}"
    patterns = [key for key in ("rank_pattern", "alpha_pattern") if getattr(config, key)]
    if patterns:
        yield (
            f"{' and '.join(patterns)}: vLLM and SGLang take the one rank and alpha instead; "
            "export --format peft --for-serving folds them in"
        )
    if config.use_rslora:
        yield "use_rslora: the scale is alpha/√rank; servers that don't know it take alpha/rank"


def _sides(module: ModuleAdapter) -> list[int]:
    """Input and output features, the smaller first."""
    return sorted((module.a.shape[-1], module.b.shape[0]))


def _rebased(raw: Mapping[str, Any]) -> Iterator[str]:
    """Initialisers that take their first update off the base, which PEFT does again on loading."""
    init = initialiser(raw.get("init_lora_weights"))
    if isinstance(init, str) and init.startswith(("pissa", "olora")):
        yield f"{init}, not converted: its updates are of a base without their first values"
