"""Adapter files that hold A and B alone: loralib's and the tutorials'; MiniMind's layout.

============  ==========================================  ===============================
format        tensors of a module                         scale
============  ==========================================  ===============================
loralib       ``.lora_A`` (r, in), ``.lora_B`` (out, r);  alpha / r, alpha not stored
              biases under their own names
lora_layer    ``.lora.lora_A`` (in, r), ``.lora_B``       alpha / r, alpha not stored
              (r, out)
minimind      ``.lora.A.weight`` (r, in), ``.lora.B.      1
              weight`` (out, r), in float16
============  ==========================================  ===============================

Source: loralib 0.1.2 of https://github.com/microsoft/LoRA
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from interop.adapter_file import FileAdapter, ModuleAdapter, checked, raise_all
from interop.adapter_folding import common_alpha, with_scales
from interop.adapter_format import (
    Content,
    Format,
    Given,
    Holds,
    alpha_of,
    by_module,
    checked_alpha,
    in_dtype,
    kind_notes,
    kind_of,
    rank_in,
    save,
    unheld,
)
from interop.loralib_forms import Factors, from_conv, from_merged, to_conv, to_merged
from lora_jax.errors import InputError, listed


class Layout(NamedTuple):
    """How a file names and turns A and B."""

    a: str
    """What follows the module's name."""
    b: str
    in_first: bool
    """A is stored as (in, rank) and B as (rank, out), for x @ A @ B."""
    any_scale: bool
    """Whether its readers are told alpha; else the file means a scale of 1."""

    @property
    def fields(self) -> dict[str, str]:
        """The field that a name's end stands for."""
        return {self.a: "a", self.b: "b"}


LAYOUTS = {
    "loralib": Layout(".lora_A", ".lora_B", in_first=False, any_scale=True),
    "lora_layer": Layout(".lora.lora_A", ".lora.lora_B", in_first=True, any_scale=True),
    "minimind": Layout(".lora.A.weight", ".lora.B.weight", in_first=False, any_scale=False),
}
"""``loralib``: parameters of its layers, and of the tutorials' LoRALinear; ``lora_layer``: those
of a LoRALayer within it, input axis first; ``minimind``: two bias-free linear layers."""

_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+|(?<=\.)_orig_mod\.")

_MERGED_STATE = (
    "a state_dict() taken in eval() has BA merged into its weights, and adding it again counts it "
    "twice: only A, B and biases are read, from lora_state_dict(model)"
)


def read_loralib(content: Content, given: Given) -> FileAdapter:
    """Read what ``loralib.lora_state_dict`` gave, or the ``lora_`` parameters of a LoRALinear."""
    alpha = alpha_of(given, content, "loralib")
    content = unwrapped(content)
    biases = {name for name in content.tensors if name.rpartition(".")[2] == "bias"}
    factors = {name: t for name, t in content.tensors.items() if name not in biases}
    if weights := [name for name in factors if name.endswith(".weight")]:
        raise InputError(f"{content.path} holds {listed(map(repr, weights))}: {_MERGED_STATE}")
    pairs = by_module(content._replace(tensors=factors), LAYOUTS["loralib"].fields, "loralib")
    plain, notes = _plain_factors(pairs, given, content)
    modules = {
        name: ModuleAdapter(f.a, f.b, alpha / f.r, kind_of(name, given))  # pyright: ignore
        for name, f in plain.items()
    }
    whole = {_bias_of_module(name, given): content.tensors[name] for name in sorted(biases)}
    notes = (*notes, *kind_notes(modules, given))
    return checked(FileAdapter("loralib", modules, whole, notes=notes), content.path)


def write_loralib(path: Path, file: FileAdapter, given: Given) -> tuple[str, ...]:
    """Write what ``load_state_dict(..., strict=False)`` reads into a model of loralib's layers."""
    not_biases = [name for name in file.whole if name.rpartition(".")[2] != "bias"]
    problems = [*unheld(file, FORMATS["loralib"].holds, "loralib")]
    if not_biases:
        problems.append(f"loralib files hold biases alone, not {listed(map(repr, not_biases))}")
    raise_all(f"can't write {path}", problems)
    stored = _stored_factors(file.modules, given, path)
    alpha = checked_alpha(given) or common_alpha(file.modules, lambda name, _: stored[name].r)
    scaled, notes = with_scales(file.modules, lambda name, _: alpha / stored[name].r)
    stored = _stored_factors(scaled, given, path)
    layout = LAYOUTS["loralib"]
    tensors = {
        **{name + layout.a: f.a for name, f in stored.items()},
        **{name + layout.b: f.b for name, f in stored.items()},
        **{_bias_in_file(name, file): array for name, array in file.whole.items()},
    }
    save(path, in_dtype(tensors, given))
    return (*notes, _told_alpha(alpha))


def read_lora_layer(content: Content, given: Given) -> FileAdapter:
    """Read the parameters of a tutorial's LoRALayer, input axis first."""
    alpha = alpha_of(given, content, "lora_layer")
    content = unwrapped(content)
    pairs = by_module(content, LAYOUTS["lora_layer"].fields, "lora_layer")
    modules = {
        name: ModuleAdapter(at["a"].T, at["b"].T, alpha / rank_in(at["a"], -1))
        for name, at in pairs.items()
    }
    return checked(FileAdapter("lora_layer", modules), content.path)


def write_lora_layer(path: Path, file: FileAdapter, given: Given) -> tuple[str, ...]:
    """Write the parameters of a tutorial's LoRALayer, input axis first."""
    raise_all(f"can't write {path}", unheld(file, FORMATS["lora_layer"].holds, "lora_layer"))
    alpha = checked_alpha(given) or common_alpha(file.modules, lambda _, module: module.rank)
    modules, notes = with_scales(file.modules, lambda _, module: alpha / module.rank)
    save(path, in_dtype(named(modules, LAYOUTS["lora_layer"]), given))
    return (*notes, _told_alpha(alpha))


def unwrapped(content: Content) -> Content:
    """Without what DDP and torch.compile put before names."""
    names = {name: _WRAPPERS.sub("", name) for name in content.tensors}
    if len({*names.values()}) < len(names):
        raise InputError(f"{content.path} holds tensors both with and without a wrapper's prefix")
    return content._replace(tensors={names[n]: t for n, t in content.tensors.items()})


def named(modules: Mapping[str, ModuleAdapter], layout: Layout) -> dict[str, np.ndarray]:
    """A and B of every module, named and turned as the layout has them."""
    return {
        name + end: getattr(module, field).T if layout.in_first else getattr(module, field)
        for name, module in modules.items()
        for end, field in layout.fields.items()
    }


def _told_alpha(alpha: float) -> str:
    return f"its readers have to be told alpha={alpha:g}, which the file doesn't hold"


def _mask(name: str, given: Given) -> tuple[bool, ...] | None:
    """The enable_lora of a module, by the end of its name."""
    found = [mask for end, mask in given.enable_lora.items() if f".{name}".endswith(f".{end}")]
    return tuple(map(bool, found[0])) if found else None


def _unused_masks(names: Iterable[str], given: Given) -> list[str]:
    dotted = [f".{name}" for name in names]
    unused = [end for end in given.enable_lora if not any(n.endswith(f".{end}") for n in dotted)]
    return [f"enable_lora names no module of it: {listed(map(repr, unused))}"] if unused else []


def _plain_factors(
    pairs: Mapping[str, Mapping[str, np.ndarray]], given: Given, content: Content
) -> tuple[dict[str, Factors], tuple[str, ...]]:
    plain, problems = {}, _unused_masks(pairs, given)
    for name, at in pairs.items():
        try:
            plain[name] = _plain(name, at["a"], at["b"], given)
        except InputError as error:
            problems.append(f"{name!r}: {error}")
    raise_all(f"{content.path} can't be read as loralib's", problems)
    masked = [name for name in plain if _mask(name, given)]
    convs = [name for name in plain if kind_of(name, given) == "conv"]
    remarks = {
        f"{listed(map(repr, masked))}: MergedLinear, its blocks written out": masked,
        f"{listed(map(repr, convs))}: ConvLoRA, each piece of its kernel written out": convs,
    }
    return plain, tuple(note for note, holds in remarks.items() if holds)


def _plain(name: str, a: np.ndarray, b: np.ndarray, given: Given) -> Factors:
    if a.ndim != 2 or b.ndim != 2 or 0 in (*a.shape, *b.shape):
        raise InputError(f"A {a.shape} and B {b.shape} are no factors")
    if mask := _mask(name, given):
        return from_merged(a, b, mask)
    if kind_of(name, given) == "conv" and given.base is not None:
        return from_conv(a, b, given.base[name].shape)
    if a.shape[0] != b.shape[1]:
        raise InputError(
            f"A {a.shape} and B {b.shape} have different ranks: of a MergedLinear give its "
            "enable_lora (--merged-linear)"
        )
    return Factors(a, b, a.shape[0])


def _stored_factors(
    modules: Mapping[str, ModuleAdapter], given: Given, path: Path
) -> dict[str, Factors]:
    stored, problems = {}, _unused_masks(modules, given)
    for name, module in modules.items():
        mask = _mask(name, given)
        try:
            if mask:
                stored[name] = to_merged(module.a, module.b, mask)
            elif module.kind == "conv":
                stored[name] = to_conv(module.a, module.b)
            else:
                stored[name] = Factors(module.a, module.b, module.rank)
        except InputError as error:
            problems.append(f"{name!r}: {error}")
    raise_all(f"can't write {path}", problems)
    return stored


def _bias_of_module(name: str, given: Given) -> str:
    """loralib keeps a convolution, and its bias, one module further down."""
    outer = name.removesuffix(".conv.bias")
    is_conv = name != outer and given.base is not None and outer in given.base
    return f"{outer}.bias" if is_conv else name


def _bias_in_file(name: str, file: FileAdapter) -> str:
    module = file.modules.get(name.removesuffix(".bias"))
    is_conv = module is not None and module.kind == "conv"
    return f"{name.removesuffix('.bias')}.conv.bias" if is_conv else name


def has(end: str) -> Callable[[Content], bool]:
    """Whether an opened file has tensors whose names end so."""
    return lambda content: any(name.endswith(end) for name in content.tensors)


FORMATS = {
    "loralib": Format(
        "microsoft/LoRA and LoRALinear parameters: A and B alone, alpha is told",
        lambda content: has(".lora_A")(content) and not has(".lora.lora_A")(content),
        read_loralib,
        write_loralib,
        Holds(frozenset(("linear", "embedding", "conv")), whole=True),
        asks=("alpha", "enable_lora"),
    ),
    "lora_layer": Format(
        "LoRALayer parameters, input axis first: A and B alone, alpha is told",
        has(".lora.lora_A"),
        read_lora_layer,
        write_lora_layer,
        asks=("alpha",),
    ),
}
