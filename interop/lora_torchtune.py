"""torchtune's adapter files: its own module names, rows of q and k in the order of its models.

=========================  ===========================  ================================
torchtune                  Hugging Face                 shape
=========================  ===========================  ================================
``.lora_a.weight``         A                            (r, in)
``.lora_b.weight``         B                            (out, r); q, k: see below
``.magnitude``             DoRA's magnitude             (out,); q, k: as rows of B
``layers.N.attn.q_proj``   ``model.layers.N.self_attn.q_proj``
``layers.N.mlp.w1``        ``model.layers.N.mlp.gate_proj``; w2 down_proj, w3 up_proj
``output``                 ``lm_head``
=========================  ===========================  ================================

Its models of Qwen's and Phi's families rotate halves as Hugging Face's do, so their rows stay in
place. All of them adapt every layer alike, and of the MLP all three or none: what an adapter has
in some of these alone gets zeros in the others.

Source: torchtune/models/convert_weights.py of https://github.com/pytorch/torchtune
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from interop.adapter_file import FileAdapter, ModuleAdapter, checked, raise_all
from interop.adapter_folding import common_alpha, with_one_rank, with_scales, with_zeros
from interop.adapter_format import (
    Content,
    Format,
    Given,
    Holds,
    alpha_of,
    by_module,
    checked_alpha,
    head_problems,
    in_dtype,
    rank_in,
    save,
    unheld,
)
from interop.halves import to_halves, to_neighbours
from interop.lora_pth import has
from lora_jax.errors import listed

_NAMES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
_HEAD = {"output": "lm_head"}
_MLP = frozenset(name for name in _NAMES.values() if name.startswith("mlp."))
_TURNED = ("self_attn.q_proj", "self_attn.k_proj")
_FIELDS = {".lora_a.weight": "a", ".lora_b.weight": "b", ".magnitude": "magnitude"}
_MAGNITUDES = (
    "magnitudes of q and k are reordered with their rows, which torchtune's own export to PEFT "
    "leaves out"
)


def read_torchtune(content: Content, given: Given) -> FileAdapter:
    """Read an adapter checkpoint of torchtune, alpha from the caller or the config beside it."""
    found = by_module(content, _FIELDS, "torchtune")
    beside = content.config.get("lora_alpha")
    told = given._replace(alpha=beside if given.alpha is None else given.alpha)
    alpha = alpha_of(told, content, "torchtune")
    names = {name: _hugging_face(name) for name in found}
    problems = _unknown(names, "torchtune") + _turning_problems(names, found, given)
    raise_all(f"{content.path} can't be read", problems)
    modules = {
        new: ModuleAdapter(
            at["a"], at["b"], alpha / rank_in(at["a"]), magnitude=at.get("magnitude")
        )
        for name, new in names.items()
        if new and (at := found[name])
    }
    file = checked(FileAdapter("torchtune", modules, notes=_notes(modules, given)), content.path)
    turned = {name: _turned(module, name, given, to_halves) for name, module in modules.items()}
    return file._replace(modules=turned)


def write_torchtune(path: Path, file: FileAdapter, given: Given) -> tuple[str, ...]:
    """Write what torchtune's checkpointer loads into a model of one rank and one alpha."""
    names = {name: _torchtune(name) for name in file.modules}
    problems = [*unheld(file, FORMATS["torchtune"].holds, "torchtune"), *_unknown(names, "Llama")]
    arrays = {name: {"a": m.a, "b": m.b} for name, m in file.modules.items()}
    problems += _turning_problems({name: name for name in names}, arrays, given)
    others = _others(file.modules, given)
    if others and any(module.magnitude is not None for module in file.modules.values()):
        problems.append(f"torchtune's models would have DoRA in {listed(map(repr, others))} too")
    raise_all(f"can't write {path}", problems)
    modules, filling = with_one_rank(file.modules)
    modules, zeros = with_zeros(modules, others)
    alpha = checked_alpha(given) or common_alpha(modules, lambda _, module: module.rank)
    modules, scaling = with_scales(modules, lambda _, module: alpha / module.rank)
    tensors = {
        f"{_torchtune(name)}{end}": array
        for name, module in modules.items()
        for end, array in _arrays(_turned(module, name, given, to_neighbours)).items()
    }
    save(path, in_dtype(tensors, given))
    rank = next(iter(modules.values())).rank
    told = f"its readers have to be told lora_rank={rank} and lora_alpha={alpha:g}"
    return (*filling, *zeros, *scaling, told, *_notes(modules, given))


def _others(modules: Mapping[str, ModuleAdapter], given: Given) -> dict[str, tuple[int, ...]]:
    """The base's modules that torchtune's model adapts when it adapts these."""
    adapted = {_within(name) for name in modules} - {""}
    adapted |= _MLP if adapted & _MLP else set()
    base = (given.base or {}).items()
    return {n: m.shape for n, m in base if _within(n) in adapted and n not in modules}


def _within(name: str) -> str:
    """What a module is called in its layer; nothing if it is in none."""
    match = re.fullmatch(r"model\.layers\.\d+\.(.+)", name)
    return match[1] if match else ""


def _arrays(module: ModuleAdapter) -> dict[str, np.ndarray]:
    found = {end: getattr(module, field) for end, field in _FIELDS.items()}
    return {end: array for end, array in found.items() if array is not None}


def _hugging_face(name: str) -> str | None:
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    inner = _NAMES.get(match[2]) if match else None
    return f"model.layers.{match[1]}.{inner}" if match and inner else _HEAD.get(name)


def _torchtune(name: str) -> str | None:
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    inner = {llama: own for own, llama in _NAMES.items()}.get(match[2]) if match else None
    head = {llama: own for own, llama in _HEAD.items()}.get(name)
    return f"layers.{match[1]}.{inner}" if match and inner else head


def _unknown(names: Mapping[str, str | None], whose: str) -> list[str]:
    unknown = [name for name, new in names.items() if new is None]
    return [f"{listed(map(repr, unknown))} are no modules of {whose}'s"] if unknown else []


def _turning_problems(
    names: Mapping[str, str | None], found: Mapping[str, Mapping[str, np.ndarray]], given: Given
) -> list[str]:
    turned = [name for name, new in names.items() if new and new.endswith(_TURNED)]
    if _rotary(given) == "halves" or not turned or given.any_order:
        return []
    if given.head_dim is None:
        return [
            f"rows of {listed(map(repr, turned))} are in the order of neighbours: give head_dim "
            "(--model), or rotary='halves' (--rotary) for a model of torchtune's that rotates as "
            "Hugging Face's (Qwen's and Phi's)"
        ]
    return head_problems({name: found[name]["b"] for name in turned}, given.head_dim)


def _rotary(given: Given) -> str:
    """What is given, else what torchtune's model of the base's family rotates."""
    family = given.config.family if given.config else ""
    return given.rotary or ("halves" if family.startswith(("qwen", "phi")) else "neighbours")


def _turned(
    module: ModuleAdapter,
    name: str,
    given: Given,
    order: Callable[[np.ndarray, int], np.ndarray],
) -> ModuleAdapter:
    if _rotary(given) == "halves" or not name.endswith(_TURNED) or not given.head_dim:
        return module
    magnitude = module.magnitude
    return module._replace(
        b=order(module.b, given.head_dim),
        magnitude=magnitude if magnitude is None else order(magnitude, given.head_dim),
    )


def _notes(modules: Mapping[str, ModuleAdapter], given: Given) -> tuple[str, ...]:
    turned = {name: m for name, m in modules.items() if name.endswith(_TURNED)}
    if not turned:
        return ()
    if given.any_order and not given.head_dim:
        return ("rows of q and k are in the order of torchtune's model",)
    rotary = _rotary(given)
    reason = "as given" if given.rotary else _reason(given)
    order = f"torchtune's model is taken to rotate {rotary} of q and k, {reason}"
    has_magnitude = any(module.magnitude is not None for module in turned.values())
    return (order, _MAGNITUDES) if has_magnitude and rotary == "neighbours" else (order,)


def _reason(given: Given) -> str:
    return f"as its {given.config.family} does" if given.config else "as most of its models do"


FORMATS = {
    "torchtune": Format(
        "torchtune: adapter checkpoints, alpha is told",
        has(".lora_a.weight"),
        read_torchtune,
        write_torchtune,
        Holds(dora=True),
        asks=("alpha", "rotary"),
    ),
}
