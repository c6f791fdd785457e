"""MiniMind's adapter files: A and B of square linear layers, in float16, with a scale of 1.

Source: model/model_lora.py of https://github.com/jingyaogong/minimind
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from interop.adapter_file import FileAdapter, ModuleAdapter, checked, raise_all
from interop.adapter_folding import with_one_rank, with_scales, with_zeros
from interop.adapter_format import (
    Content,
    Format,
    Given,
    by_module,
    head_problems,
    in_dtype,
    save,
    unheld,
    without_repeats,
)
from interop.halves import to_halves
from interop.lora_pth import LAYOUTS, has, named, unwrapped
from lora_jax.errors import listed

# MiniMind's modules until April 2025, by what Llama's are called in Hugging Face.
_FIRST_MINIMIND = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
_TURNED = ("self_attn.q_proj", "self_attn.k_proj")


def read_minimind(content: Content, given: Given) -> FileAdapter:
    """Read a MiniMind adapter of either generation.

    Names of the first generation, whose model rotates neighbours, become Hugging Face's where
    ``given.head_dim`` is known: rows of q and k are then in its order.
    """
    content = unwrapped(content)
    pairs = by_module(content, LAYOUTS["minimind"].fields, "minimind")
    modules = {name: ModuleAdapter(at["a"], at["b"], 1.0) for name, at in pairs.items()}
    file = checked(FileAdapter("minimind", modules), content.path)
    first = [name for name in modules if _first_generation(name)]
    if not first or (given.base is not None and first[0] in given.base):
        return file
    if given.head_dim is None:
        note = "its names are MiniMind's of the first generation: give head_dim to have Llama's"
        return file._replace(notes=(note,))
    turned = {n: m.b for n, m in modules.items() if _first_generation(n) in _TURNED}
    raise_all(f"{content.path} can't be read", head_problems(turned, given.head_dim))
    renamed = _renamed(modules, given.head_dim)
    return file._replace(modules=without_repeats(renamed, content))


def write_minimind(path: Path, file: FileAdapter, given: Given) -> tuple[str, ...]:
    """Write what MiniMind's ``load_lora`` reads: all square linear layers, one rank, no scale."""
    oblong = [n for n, m in file.modules.items() if m.a.shape[-1] != m.b.shape[0]]
    problems = [*unheld(file, FORMATS["minimind"].holds, "minimind")]
    if oblong:
        problems.append(f"MiniMind adapts square layers alone, not {listed(map(repr, oblong))}")
    raise_all(f"can't write {path}", problems)
    modules, scaling = with_scales(file.modules, lambda _, module: 1.0)
    modules, filling = with_one_rank(modules)
    modules, zeros = with_zeros(modules, _other_squares(modules, given))
    save(path, in_dtype(named(modules, LAYOUTS["minimind"]), given))
    rank = next(iter(modules.values())).rank
    return (*scaling, *filling, *zeros, f"its readers have to be told rank={rank}")


def _other_squares(
    modules: Mapping[str, ModuleAdapter], given: Given
) -> dict[str, tuple[int, ...]]:
    """The base's other square layers, which MiniMind's model gives factors and reads them for."""
    return {
        name: module.shape
        for name, module in (given.base or {}).items()
        if module.kind == "linear" and len({*module.shape}) == 1 and name not in modules
    }


def _first_generation(name: str) -> str | None:
    """What Hugging Face calls a module of the first generation."""
    return next((llama for end, llama in _FIRST_MINIMIND.items() if name.endswith(end)), None)


def _renamed(
    modules: Mapping[str, ModuleAdapter], head_dim: int
) -> Iterator[tuple[str, ModuleAdapter]]:
    for name, module in modules.items():
        llama = _first_generation(name)
        layer = re.match(r"(layers\.\d+)\.", name)
        if llama is None or layer is None:
            yield name, module
            continue
        b = to_halves(module.b, head_dim) if llama in _TURNED else module.b
        yield f"model.{layer[1]}.{llama}", module._replace(b=b)


FORMATS = {
    "minimind": Format(
        "MiniMind .pth: A and B alone, scale 1",
        has(".lora.A.weight"),
        read_minimind,
        write_minimind,
    ),
}
