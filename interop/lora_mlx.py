"""mlx-lm's adapter directories: adapters.safetensors and adapter_config.json.

====================  ================================  ====================================
module                in the file                       note
====================  ================================  ====================================
Linear                ``.lora_a`` (in, r),              ``.m`` (out,) with DoRA
                      ``.lora_b`` (r, out)
Embedding             ``.lora_a`` (vocabulary, r),      a tied head follows it
                      ``.lora_b`` (r, features)
SwitchLinear          ``.lora_a`` (experts, r, in),     ``switch_mlp.*`` are the modules
                      ``.lora_b`` (experts, out, r)     ``experts.{e}.*`` in torch
====================  ================================  ====================================

The scale is stored, and one for all modules as the rank is. ``fine_tune_type: full`` holds
parameters that are trained whole, under their own names. GPT-2's modules are called ``model.*``
there and ``transformer.*`` in torch, where its linear layers have their weights transposed.

Source: mlx_lm/tuner/lora.py, dora.py and utils.py, and mlx_lm/models/gpt2.py of
https://github.com/ml-explore/mlx-lm
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from interop.adapter_file import FileAdapter, ModuleAdapter, checked, raise_all
from interop.adapter_folding import common_scale, with_one_rank, with_scales
from interop.adapter_format import (
    Content,
    Format,
    Given,
    Holds,
    by_module,
    in_dtype,
    kind_notes,
    kind_of,
    rank_in,
    save_directory,
    unheld,
    without_repeats,
)
from lora_jax.errors import listed
from lora_jax.manifest import to_json

_FIELDS = {".lora_a": "a", ".lora_b": "b", ".m": "m"}
_WEIGHTS = "adapters.safetensors"
_ALL_LAYERS = -1
_TYPES = ("lora", "dora", "full")
# mlx-lm's names of the stacked linears, where the experts' own differ from them.
_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_GPT2 = re.compile(r"^(model|transformer)\.(?=(h\.\d+|wte|wpe|ln_f)\b)")
_GPT2_LINEAR = re.compile(r"(model|transformer)\.h\.\d+\.(attn|mlp)\.c_\w+\.weight")


def read_mlx(content: Content, given: Given) -> FileAdapter:
    """Read a directory that ``mlx_lm.lora`` wrote."""
    config = content.config
    raise_all(f"{content.path} is no mlx adapter", _config_problems(config))
    tensors = without_repeats(_renamed(content.tensors, "transformer."), content)
    if config.get("fine_tune_type") == "full":
        whole = FileAdapter("mlx", {}, tensors, shares_tables=True)
        return checked(whole, content.path)
    found = by_module(content._replace(tensors=tensors), _FIELDS, "mlx")
    settings = config["lora_parameters"]
    raise_all(f"{content.path} is no mlx adapter", _tensor_problems(found, config, given))
    scale = float(settings["scale"])
    each = (pair for name, at in found.items() for pair in _modules(name, at, scale, given))
    modules = without_repeats(each, content)
    notes = kind_notes(modules, given)
    return checked(FileAdapter("mlx", modules, shares_tables=True, notes=notes), content.path)


def write_mlx(path: Path, file: FileAdapter, given: Given) -> tuple[str, ...]:
    """Write a directory that mlx-lm's ``load_adapters`` reads; it is absent or empty before."""
    raise_all(f"can't write {path}", [*_file_problems(file), *_expert_problems(file, given)])
    if not file.modules:
        config = {"fine_tune_type": "full", "num_layers": _ALL_LAYERS}
        whole = dict(_renamed(file.whole, "model."))
        save_directory(path, _WEIGHTS, in_dtype(whole, given), to_json(config))
        return ()
    modules, filling = with_one_rank(file.modules)
    scale = common_scale(modules)
    modules, scaling = with_scales(modules, lambda _, module: scale)
    tensors: dict[str, np.ndarray] = {}
    for name, stacked in _stacked(modules, _expert_counts(given.base or modules)).items():
        tensors |= _tensors(_GPT2.sub("model.", name), stacked)
    first = next(iter(modules.values()))
    keys = _keys({name.rpartition(".")[0] for name in tensors})
    config = {
        "fine_tune_type": "lora" if first.magnitude is None else "dora",
        "num_layers": _ALL_LAYERS,
        "lora_parameters": {"rank": first.rank, "scale": scale, "dropout": 0.0, "keys": keys},
    }
    save_directory(path, _WEIGHTS, in_dtype(tensors, given), to_json(config))
    return (*filling, *scaling)


def _renamed(tensors: Mapping[str, np.ndarray], root: str) -> Iterator[tuple[str, np.ndarray]]:
    """With GPT-2's names below ``root``, and the weights of its linear layers transposed."""
    for name, tensor in tensors.items():
        yield _GPT2.sub(root, name), tensor.T if _GPT2_LINEAR.fullmatch(name) else tensor


def _config_problems(config: Mapping[str, Any]) -> Iterator[str]:
    kind = config.get("fine_tune_type", "lora")
    if kind not in _TYPES:
        yield f"fine_tune_type is {kind!r}, expected one of {', '.join(_TYPES)}"
        return
    settings = config.get("lora_parameters")
    if kind == "full":
        return
    if not isinstance(settings, Mapping):
        yield "its config has no lora_parameters"
        return
    scale = settings.get("scale")
    if not (isinstance(scale, Real) and scale is not True and math.isfinite(scale)):
        yield f"lora_parameters have scale {scale!r}, expected a finite number"


def _tensor_problems(
    found: Mapping[str, Mapping[str, np.ndarray]], config: Mapping[str, Any], given: Given
) -> Iterator[str]:
    with_m = [name for name, at in found.items() if "m" in at]
    without = [name for name, at in found.items() if "m" not in at]
    is_dora = config.get("fine_tune_type") == "dora"
    if is_dora and without:
        yield f"fine_tune_type is dora, and {listed(map(repr, without))} have no '.m'"
    if with_m and not is_dora:
        yield f"fine_tune_type isn't dora, and {listed(map(repr, with_m))} have '.m'"
    if tables := [name for name in with_m if kind_of(name, given) == "embedding"]:
        yield (
            f"{listed(map(repr, tables))} are tables with DoRA, which has a magnitude for each "
            "token there and one for each feature here"
        )
    rank = config["lora_parameters"].get("rank")
    wrong = [name for name, at in found.items() if rank not in (None, _rank_in(at["b"]))]
    if wrong:
        yield f"{listed(map(repr, wrong))} don't have the config's rank {rank!r}"
    for name, at in found.items():
        a, b = at["a"].shape, at["b"].shape
        stacked = len(b) == 3 and b[0] and (a[:1] == b[:1] if len(a) == 3 else len(a) == 2)
        if not stacked and (len(a), len(b)) != (2, 2):
            yield f"{name!r} has lora_a {a} and lora_b {b}, which don't fit"
        if stacked and len(a) == 2 and (a[0] != b[0] * b[2]):
            yield f"{name!r} has lora_a {a} and lora_b {b}, which don't fit"


def _rank_in(b: np.ndarray) -> int:
    return rank_in(b, 2 if b.ndim == 3 else 0)


def _modules(
    name: str, at: Mapping[str, np.ndarray], scale: float, given: Given
) -> Iterator[tuple[str, ModuleAdapter]]:
    a, b = at["a"], at["b"]
    if b.ndim == 2:
        kind = kind_of(name, given)
        yield name, ModuleAdapter(a.T, b.T, scale, kind, at.get("m"))  # pyright: ignore
        return
    a = a.reshape(b.shape[0], -1, a.shape[-1])
    if "switch_mlp." not in f"{name}.":
        yield name, ModuleAdapter(a, b, scale, "experts")
        return
    for expert in range(b.shape[0]):
        yield _expert_name(name, expert), ModuleAdapter(a[expert], b[expert], scale)


def _expert_name(stacked: str, expert: int) -> str:
    block, _, linear = stacked.partition("switch_mlp.")
    own = _MIXTRAL.get(linear, linear) if "block_sparse_moe" in block else linear
    return f"{block}experts.{expert}.{own}"


def _stacked(
    modules: Mapping[str, ModuleAdapter], counts: Mapping[str, int]
) -> dict[str, ModuleAdapter]:
    """With the linears of experts put together, as SwitchLinear has them."""
    found, experts = {}, defaultdict(dict)
    for name, module in modules.items():
        if (place := _place(name)) is None:
            found[name] = module
            continue
        stacked, number = place
        experts[stacked][number] = module
    return found | {name: _stack(at, counts[name]) for name, at in experts.items()}


def _place(name: str) -> tuple[str, int] | None:
    """The SwitchLinear that has an expert's linear, and the expert's number."""
    match = re.fullmatch(r"(.*\.)experts\.(\d+)\.(\w+)", name)
    if match is None:
        return None
    block, number, own = match.groups()
    of_mixtral = {w: linear for linear, w in _MIXTRAL.items()}
    linear = of_mixtral.get(own, own) if "block_sparse_moe" in block else own
    return f"{block}switch_mlp.{linear}", int(number)


def _expert_counts(names: Iterable[str]) -> dict[str, int]:
    """How many experts each SwitchLinear has, if the highest of them is among the names."""
    counts: dict[str, int] = defaultdict(int)
    for stacked, number in filter(None, map(_place, names)):
        counts[stacked] = max(counts[stacked], number + 1)
    return counts


def _expert_problems(file: FileAdapter, given: Given) -> Iterator[str]:
    """Experts that the base doesn't have; without a base, those that the file leaves out."""
    places = {place: name for name in file.modules if (place := _place(name))}
    if given.base is not None:
        counts = _expert_counts(given.base)
        beyond = [name for (stacked, e), name in places.items() if e >= counts.get(stacked, 0)]
        if beyond:
            yield f"the base has no experts {listed(map(repr, beyond))}"
        return
    counts = _expert_counts(file.modules)
    most = max(counts.values(), default=0)
    for stacked in counts:
        if left_out := [str(e) for e in range(most) if (stacked, e) not in places]:
            yield (
                f"{stacked!r} lacks experts {listed(left_out)} of {most} at least: give the base, "
                "which says how many there are"
            )


def _stack(experts: Mapping[int, ModuleAdapter], count: int) -> ModuleAdapter:
    """Experts without factors have zeros, which change nothing."""
    one = next(iter(experts.values()))
    empty = one._replace(a=np.zeros_like(one.a), b=np.zeros_like(one.b))
    each = [experts.get(e, empty) for e in range(count)]
    a, b = np.stack([m.a for m in each]), np.stack([m.b for m in each])
    return one._replace(a=a, b=b, kind="experts")


def _tensors(name: str, module: ModuleAdapter) -> dict[str, np.ndarray]:
    if module.kind == "experts":
        return {f"{name}.lora_a": module.a, f"{name}.lora_b": module.b}
    pair = {f"{name}.lora_a": module.a.T, f"{name}.lora_b": module.b.T}
    return pair if module.magnitude is None else {**pair, f"{name}.m": module.magnitude}


def _keys(names: Iterable[str]) -> list[str]:
    """The names that mlx-lm looks for, in each of its layers and in the whole model.

    Names within a layer where all layers have the same, else full ones.
    """
    by_layer, others = defaultdict(set), set()
    for name in names:
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if match:
            by_layer[int(match[1])].add(match[2])
        else:
            others.add(name)
    within = by_layer.get(0, set())
    uniform = all(by_layer.get(layer) == within for layer in range(max(by_layer, default=-1) + 1))
    return sorted(within | others) if uniform else sorted(names)


def _file_problems(file: FileAdapter) -> Iterator[str]:
    yield from unheld(file, FORMATS["mlx"].holds, "mlx")
    modules = file.modules.items()
    with_m = [name for name, module in modules if module.magnitude is not None]
    if with_m and len(with_m) < len(modules):
        yield f"mlx files have DoRA in all modules, not in {listed(map(repr, with_m))} alone"
    tables = [name for name in with_m if file.modules[name].kind == "embedding"]
    if tables:
        yield f"mlx has another DoRA of tables: {listed(map(repr, tables))}"
    if experts := [name for name in with_m if re.search(r"\.experts\.\d+\.", name)]:
        yield f"mlx has no DoRA of experts: {listed(map(repr, experts))}"
    if file.whole and file.modules:
        yield f"mlx files can't hold {listed(map(repr, file.whole))} whole beside factors"
    shapes = defaultdict(set)
    for name, module in modules:
        shapes[re.sub(r"\.experts\.\d+\.", ".experts.{}.", name)].add(
            (module.a.shape[1:], module.b.shape[0])
        )
    for name, found in shapes.items():
        if len(found) > 1:
            yield f"experts of {name!r} have different shapes: {sorted(found)}"


def _is_mlx(content: Content) -> bool:
    full = content.config.get("fine_tune_type") == "full"
    return full or any(name.endswith(".lora_a") for name in content.tensors)


FORMATS = {
    "mlx": Format(
        "mlx-lm: a directory with adapters.safetensors, scale stored",
        _is_mlx,
        read_mlx,
        write_mlx,
        Holds(frozenset(("linear", "embedding", "experts")), True, whole=True, shared_tables=True),
    ),
}
