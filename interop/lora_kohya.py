"""kohya's adapter files: module names flattened with underscores, alpha beside A and B.

======================  ==================================================================
``.lora_down.weight``   A (r, in) or (r, in, \\*kernel)
``.lora_up.weight``     B (out, r) or (out, r, 1, 1)
``.lora_mid.weight``    (r, r, \\*kernel) of LyCORIS' Tucker form, with a ``lora_down`` of 1 x 1
``.alpha``              the scale is alpha / r; r where it is missing or 0
``.dora_scale``         DoRA's magnitude, (out, 1, ...)
======================  ==================================================================

Source: networks/lora.py of https://github.com/kohya-ss/sd-scripts and lycoris/modules/locon.py of
https://github.com/KohakuBlueleaf/LyCORIS
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from interop.adapter_file import FileAdapter, ModuleAdapter, checked, raise_all
from interop.adapter_folding import alpha, common_alpha
from interop.adapter_format import (
    Content,
    Format,
    Given,
    Holds,
    by_module,
    in_dtype,
    rank_in,
    save,
    unheld,
    without_repeats,
)
from lora_jax.errors import InputError, listed

# What a name begins with, and the components of a pipeline that it may mean; "" is none.
_COMPONENTS = {
    "lora_unet_": ("unet", "transformer", ""),
    "lora_transformer_": ("transformer", ""),
    "lora_te_": ("text_encoder", ""),
    "lora_te1_": ("text_encoder", ""),
    "lora_te2_": ("text_encoder_2", ""),
    "lora_te3_": ("text_encoder_3", ""),
}
_PREFIXES = {
    "unet": "lora_unet_",
    "transformer": "lora_unet_",
    "text_encoder": "lora_te_",
    "text_encoder_2": "lora_te2_",
    "text_encoder_3": "lora_te3_",
}
_FIELDS = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".alpha": "alpha",
    ".dora_scale": "dora_scale",
}
_OTHER_METHODS = {"hada_": "LoHa", "lokr_": "LoKr", "oft_": "OFT", "on_input": "(IA)^3"}
_OTHER_METHOD = re.compile("|".join(rf"\.{part}" for part in _OTHER_METHODS))


def read_kohya(content: Content, given: Given) -> FileAdapter:
    """Read a file of sd-scripts or of LyCORIS' LoCon.

    Flattened names become module names where ``given.base`` has one, and one only, that flattens
    to them; without a base they stay as they are.
    """
    raise_all(f"{content.path} is no LoRA", _other_methods(content.tensors))
    found = by_module(content, _FIELDS, "kohya", needed=("down", "up"))
    names = _resolved(found, given, content)
    without_repeats(((name, flat) for flat, name in names.items()), content)
    modules, problems = {}, []
    for flat, at in found.items():
        try:
            modules[names[flat]] = _module(at, names[flat], given)
        except InputError as error:
            problems.append(f"{flat!r} {error}")
    raise_all(f"{content.path} is no kohya adapter", problems)
    return checked(FileAdapter("kohya", modules, notes=_notes(found, given)), content.path)


def write_kohya(path: Path, file: FileAdapter, given: Given) -> tuple[str, ...]:
    """Write what sd-scripts and the readers of its files load."""
    names = _flattened(file.modules)
    zero = [name for name, module in file.modules.items() if not module.scale]
    problems = [*unheld(file, FORMATS["kohya"].holds, "kohya"), *_collisions(names)]
    if zero:
        problems.append(f"{listed(map(repr, zero))} has a scale of 0, which means 1 in the file")
    raise_all(f"can't write {path}", problems)
    tensors, alphas = {}, {}
    for name, module in file.modules.items():
        ones = (1,) * (module.a.ndim - 2)
        flat = names[name]
        tensors[f"{flat}.lora_down.weight"] = module.a
        tensors[f"{flat}.lora_up.weight"] = module.b.reshape(*module.b.shape, *ones)
        if module.magnitude is not None:
            tensors[f"{flat}.dora_scale"] = module.magnitude.reshape(-1, 1, *ones)
        alphas[f"{flat}.alpha"] = _alpha(module)
    header = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(module.rank for module in file.modules.values())),
        "ss_network_alpha": f"{common_alpha(file.modules, lambda _, module: module.rank):g}",
    }
    save(path, in_dtype(tensors, given) | alphas, header)
    return ()


def _other_methods(names: Iterable[str]) -> Iterator[str]:
    for part, method in _OTHER_METHODS.items():
        if found := [name for name in names if f".{part}" in name]:
            yield f"{listed(map(repr, found))} belong to {method}"


def _module(at: Mapping[str, np.ndarray], name: str, given: Given) -> ModuleAdapter:
    down, up = at["down"], at["up"]
    if down.ndim < 2 or up.ndim != down.ndim or not {*up.shape[2:]} <= {1} or 0 in down.shape:
        raise InputError(f"has lora_down {down.shape} and lora_up {up.shape}, which don't fit")
    b = up.reshape(up.shape[:2])
    a = _tucker(at["mid"], down) if "mid" in at else down
    base = given.base.get(name) if given.base is not None else None
    if base is not None and base.kind == "linear" and set(a.shape[2:]) <= {1}:
        a = a.reshape(a.shape[:2])
    if base is not None and base.kind == "conv" and a.ndim == 2:
        a = a.reshape(*a.shape, *(1,) * (len(base.shape) - 2))
    magnitude = _magnitude(at["dora_scale"], b) if "dora_scale" in at else None
    found = _alpha_in(at["alpha"]) if "alpha" in at else 0.0
    kind = "conv" if a.ndim > 2 else "linear"
    rank = rank_in(a)
    return ModuleAdapter(a, b, (found or rank) / rank, kind, magnitude)


def _tucker(mid: np.ndarray, down: np.ndarray) -> np.ndarray:
    """A of a kernel from its core and the 1 x 1 factor before it."""
    if mid.ndim < 3 or mid.shape[1:2] != down.shape[:1] or not {*down.shape[2:]} <= {1}:
        raise InputError(f"has lora_mid {mid.shape} and lora_down {down.shape}, which don't fit")
    narrow = down.reshape(down.shape[:2]).astype(np.float32)
    return np.moveaxis(np.tensordot(mid.astype(np.float32), narrow, (1, 0)), -1, 1)


def _magnitude(found: np.ndarray, b: np.ndarray) -> np.ndarray:
    if found.size != b.shape[0] or found.shape[:1] != b.shape[:1]:
        raise InputError(
            f"has a dora_scale of {found.shape}, which is no magnitude of {b.shape[0]} outputs: "
            "that of inputs is not implemented"
        )
    return found.reshape(-1)


def _alpha_in(found: np.ndarray) -> float:
    alpha_found = float(found.astype(np.float64).sum())
    if found.size != 1 or not math.isfinite(alpha_found):
        raise InputError(f"has alpha {alpha_found} {found.shape}, expected one finite number")
    return alpha_found


def _alpha(module: ModuleAdapter) -> np.ndarray:
    """In float32, as others write it, where that is the alpha; else in float64."""
    exact = alpha(module.scale, module.rank)
    narrow = np.float32(exact)
    return np.asarray(narrow if float(narrow) == exact else np.float64(exact))


def _resolved(names: Iterable[str], given: Given, content: Content) -> dict[str, str]:
    if given.base is None:
        return {name: name for name in names}
    by_flat = defaultdict(list)
    for module in given.base:
        by_flat[module.replace(".", "_")].append(module)
    found = {name: _candidates(name, by_flat) for name in names}
    unknown = [name for name, modules in found.items() if not modules]
    problems = [
        f"{name!r} may be {' or '.join(map(repr, modules))}"
        for name, modules in found.items()
        if len(modules) > 1
    ]
    if unknown:
        problems.append(f"the model has no module for {listed(map(repr, unknown))}")
    raise_all(f"{content.path} does not fit the model", problems)
    return {name: modules[0] for name, modules in found.items()}


def _candidates(name: str, by_flat: Mapping[str, list[str]]) -> list[str]:
    prefix = next((prefix for prefix in _COMPONENTS if name.startswith(prefix)), "")
    rest = name.removeprefix(prefix)
    flats = [f"{c}_{rest}" if c else rest for c in _COMPONENTS.get(prefix, ("",))]
    return [module for flat in flats for module in by_flat.get(flat, ())]


def _flattened(names: Iterable[str]) -> dict[str, str]:
    components = {name.partition(".")[0] for name in names}
    prefixes = dict(_PREFIXES)
    if "text_encoder_2" in components:
        prefixes["text_encoder"] = "lora_te1_"
    return {name: _flat(name, prefixes) for name in names}


def _flat(name: str, prefixes: Mapping[str, str]) -> str:
    component, _, rest = name.partition(".")
    if not rest and name.startswith(tuple(_COMPONENTS)):
        return name
    inside = component in prefixes
    return (prefixes[component] if inside else "lora_unet_") + (rest if inside else name).replace(
        ".", "_"
    )


def _collisions(names: Mapping[str, str]) -> Iterator[str]:
    by_flat = defaultdict(list)
    for name, flat in names.items():
        by_flat[flat].append(name)
    for flat, found in by_flat.items():
        if len(found) > 1:
            yield f"{listed(map(repr, found))} would all be called {flat!r}"


def _notes(found: Mapping[str, Mapping[str, np.ndarray]], given: Given) -> tuple[str, ...]:
    silent = [name for name, at in found.items() if not np.any(at.get("alpha", 0))]
    tucker = [name for name, at in found.items() if "mid" in at]
    remarks = {
        f"no alpha, or 0, in {listed(map(repr, silent))}: the scale is 1": silent,
        f"{listed(map(repr, tucker))}: Tucker form, its core multiplied into A": tucker,
        "names are flattened: give the base's modules to have their own": given.base is None,
    }
    return tuple(note for note, holds in remarks.items() if holds)


def _is_kohya(content: Content) -> bool:
    ends = (".lora_down.weight", ".lora_up.weight")
    return any(name.endswith(ends) or _OTHER_METHOD.search(name) for name in content.tensors)


FORMATS = {
    "kohya": Format(
        "kohya's sd-scripts and LyCORIS' LoCon: .safetensors with flattened names",
        _is_kohya,
        read_kohya,
        write_kohya,
        Holds(frozenset(("linear", "conv")), dora=True),
    ),
}
