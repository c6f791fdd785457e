"""diffusers' adapter files: a pipeline's components before names, PEFT's ends after them.

=====================================================  =======================================
today                                                  before
=====================================================  =======================================
``unet.….to_q.lora_A.weight``                          ``unet.….processor.to_q_lora.down.weight``
``text_encoder.….q_proj.lora_B.weight``                ``….q_proj.lora_linear_layer.up.weight``
``lora_adapter_metadata`` in the header: PEFT's        ``.alpha`` tensors, or nothing
config of each component, in JSON
=====================================================  =======================================

Source: src/diffusers/utils/state_dict_utils.py and loaders/lora_base.py of
https://github.com/huggingface/diffusers
"""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from interop import peft_config
from interop.adapter_file import FileAdapter, ModuleAdapter, checked, raise_all
from interop.adapter_folding import alpha, with_scales
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
from interop.peft_matching import PeftConfig, Setting, adapted_modules
from lora_jax.errors import InputError, listed

METADATA = "lora_adapter_metadata"
COMPONENTS = re.compile(r"(unet|transformer(_2)?|text_encoder(_[23])?)\.")

_FIELDS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_B.bias": "bias",
    ".lora.down.weight": "a",
    ".lora.up.weight": "b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora.alpha": "alpha",
    ".alpha": "alpha",
}
# Old parts of names and today's, of text encoders and of the others.
_EVERYWHERE = {".processor.": ".", ".lora_linear_layer.": ".lora."}
_TODAY = {
    True: {
        **_EVERYWHERE,
        **{f".to_{part}_lora.": f".{part}_proj.lora." for part in ("q", "k", "v", "out")},
    },
    False: {
        **_EVERYWHERE,
        **{f".to_{part}_lora.": f".to_{part}.lora." for part in "qkv"},
        ".to_out_lora.": ".to_out.0.lora.",
    },
}
_OF_OLD = re.compile("|".join(map(re.escape, {**_TODAY[True], **_TODAY[False]})))
# The file's own modules are the adapted ones, whatever the config selects in its model.
_WHOLE = dict.fromkeys(
    ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
)
_ALPHA_TOLERANCE = 2**-8
"""Alphas are stored in the dtype of A and B: bfloat16 has 8 bits."""
_NO_ALPHA = "neither alphas nor a config: the scale is 1 where it was alpha / rank in training"


def read_diffusers(content: Content, given: Given) -> FileAdapter:
    """Read a pipeline's LoRA weights; modules have the component before their names."""
    names = {name: _today(name) for name in content.tensors}
    tensors = without_repeats(((names[n], t) for n, t in content.tensors.items()), content)
    renamed = content._replace(tensors=tensors)
    found = by_module(renamed, _FIELDS, "diffusers")
    raise_all(f"{content.path} is no diffusers adapter", _outside(found))
    scales, notes = _scales(found, content)
    modules, problems = {}, []
    for name, at in found.items():
        try:
            modules[name] = _module(at, scales[name])
        except InputError as error:
            problems.append(f"{name!r} {error}")
    raise_all(f"{content.path} is no diffusers adapter", problems)
    return checked(FileAdapter("diffusers", modules, notes=notes), content.path)


def write_diffusers(path: Path, file: FileAdapter, given: Given) -> tuple[str, ...]:
    """Write what ``load_lora_weights`` reads, with PEFT's config of each component."""
    problems = [*unheld(file, FORMATS["diffusers"].holds, "diffusers"), *_outside(file.modules)]
    # PEFT has no alpha of 0 or below.
    folded, notes = with_scales(file.modules, lambda _, m: m.scale if m.scale > 0 else 1.0)
    by_component = defaultdict(dict)
    for name, module in sorted(folded.items()):
        component, _, rest = name.partition(".")
        by_component[component][rest] = module
    for component, modules in by_component.items():
        if len({module.magnitude is None for module in modules.values()}) > 1:
            problems.append(f"{component!r} has DoRA in some of its modules alone")
    raise_all(f"can't write {path}", problems)
    config = {
        f"{component}.{key}": value
        for component, modules in by_component.items()
        for key, value in _config(modules).items()
    }
    metadata = {"format": "pt", METADATA: json.dumps(config, indent=2, sort_keys=True)}
    save(path, in_dtype(_tensors(folded), given), metadata)
    return notes


def _outside(names: Iterable[str]) -> Iterator[str]:
    if outside := [name for name in names if not COMPONENTS.match(name)]:
        yield f"{listed(map(repr, outside))} are in no component such as 'unet.' or 'text_encoder.'"


def _today(name: str) -> str:
    name = name.removeprefix("base_model.model.")
    if not _OF_OLD.search(name):
        return name
    for old, new in _TODAY[name.startswith("text_encoder")].items():
        name = name.replace(old, new)
    return name


def _module(at: Mapping[str, np.ndarray], scale: float) -> ModuleAdapter:
    a, b = at["a"], at["b"]
    if a.ndim < 2 or b.ndim != a.ndim or not {*b.shape[2:]} <= {1}:
        raise InputError(f"has A {a.shape} and B {b.shape}, which don't fit")
    magnitude = at.get("magnitude")
    return ModuleAdapter(
        a,
        b.reshape(b.shape[:2]),
        scale,
        "conv" if a.ndim > 2 else "linear",
        magnitude if magnitude is None else magnitude.reshape(-1),
        at.get("bias"),
    )


def _scales(
    found: Mapping[str, Mapping[str, np.ndarray]], content: Content
) -> tuple[dict[str, float], tuple[str, ...]]:
    configs = _configs(content)
    by_component = defaultdict(list)
    for name in found:
        by_component[name.partition(".")[0]].append(name)
    scales, notes = {}, []
    for component, names in by_component.items():
        with_alpha = [name for name in names if "alpha" in found[name]]
        if config := configs.get(component):
            scales |= _scales_of_config(component, names, found, config, content)
            continue
        scales |= {name: _scale_of_alpha(name, found[name]) for name in names}
        if len(with_alpha) < len(names):
            without = [name for name in names if name not in with_alpha]
            notes.append(f"{listed(map(repr, without))}: {_NO_ALPHA}")
    absent = [name for name in configs if name not in by_component]
    if absent:
        notes.append(f"{METADATA} has a config of {listed(absent)}, of which there is no tensor")
    return scales, tuple(notes)


def _scale_of_alpha(name: str, at: Mapping[str, np.ndarray]) -> float:
    if "alpha" not in at:
        return 1.0
    if at["alpha"].size != 1:
        raise InputError(f"alpha of {name!r} has shape {at['alpha'].shape}, expected one number")
    return float(at["alpha"].reshape(-1)[0]) / rank_in(at["a"])


def _configs(content: Content) -> dict[str, dict[str, Any]]:
    text = content.metadata.get(METADATA)
    if text is None:
        return {}
    try:
        flat = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{content.path}: {METADATA} is not JSON: {error}") from error
    if not isinstance(flat, dict):
        raise InputError(f"{content.path}: {METADATA} holds {type(flat).__name__}, not an object")
    by_component = defaultdict(dict)
    for name, value in flat.items():
        component, _, key = name.partition(".")
        by_component[component][key] = value
    return by_component


def _scales_of_config(
    component: str,
    names: list[str],
    found: Mapping[str, Mapping[str, np.ndarray]],
    config: Mapping[str, Any],
    content: Content,
) -> dict[str, float]:
    modules = [name.partition(".")[2] for name in names]
    whole = {"peft_type": "LORA", **config, **_WHOLE, "target_modules": modules}
    problems = [*peft_config.problems(whole), *_unheld_of(config)]
    raise_all(f"{content.path}: {METADATA} of {component!r}", problems)
    known = peft_config.config_of(whole)
    settings = {
        f"{component}.{name}": setting for name, setting in adapted_modules(known, modules).items()
    }
    wrong = [
        line for name, at in settings.items() for line in _disagreements(name, found[name], at)
    ]
    wrong += _dora_disagreements(component, known, {name: found[name] for name in names})
    raise_all(f"{content.path} and its config disagree", wrong)
    return {name: setting.scale for name, setting in settings.items()}


def _unheld_of(config: Mapping[str, Any]) -> Iterator[str]:
    """What changes an adapter's function and these files don't hold."""
    if config.get("target_parameters"):
        yield "target_parameters are set: diffusers' files hold adapters of modules alone"
    init = peft_config.initialiser(config.get("init_lora_weights"))
    if init in peft_config.REBASED_INITS:
        yield (
            f"init_lora_weights is {init!r}, which changes the base: have PEFT convert it to a "
            "plain LoRA (save_pretrained with path_initial_model_for_weight_conversion)"
        )


def _disagreements(name: str, at: Mapping[str, np.ndarray], setting: Setting) -> Iterator[str]:
    rank = rank_in(at["a"])
    if rank != setting.rank:
        yield f"{name} has rank {rank}, its config says {setting.rank}"
        return
    if "alpha" in at and not math.isclose(
        scale := _scale_of_alpha(name, at), setting.scale, rel_tol=_ALPHA_TOLERANCE
    ):
        yield f"{name} has scale {scale:g} by its alpha, its config says {setting.scale:g}"


def _dora_disagreements(
    component: str, config: PeftConfig, found: Mapping[str, Mapping[str, np.ndarray]]
) -> Iterator[str]:
    other = [name for name, at in found.items() if ("magnitude" in at) != config.use_dora]
    if other:
        has = "no magnitudes" if config.use_dora else "magnitudes"
        yield f"use_dora of {component} is {config.use_dora}, {listed(map(repr, other))} have {has}"


def _config(modules: Mapping[str, ModuleAdapter]) -> dict[str, Any]:
    """PEFT's config of a component, with an anchored pattern where a module differs."""
    ranks = {name: module.rank for name, module in modules.items()}
    alphas = {name: alpha(module.scale, module.rank) for name, module in modules.items()}
    rank, common = (Counter(found.values()).most_common(1)[0][0] for found in (ranks, alphas))
    first = next(iter(modules.values()))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": common,
        "rank_pattern": {f"^{re.escape(n)}": r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(n)}": a for n, a in alphas.items() if a != common},
        "target_modules": sorted(modules),
        "use_dora": first.magnitude is not None,
        "lora_bias": any(module.bias is not None for module in modules.values()),
        "use_rslora": False,
        "bias": "none",
        "lora_dropout": 0.0,
    }


def _tensors(modules: Mapping[str, ModuleAdapter]) -> dict[str, np.ndarray]:
    tensors = {}
    for name, module in modules.items():
        ones = (1,) * (module.a.ndim - 2)
        tensors[f"{name}.lora_A.weight"] = module.a
        tensors[f"{name}.lora_B.weight"] = module.b.reshape(*module.b.shape, *ones)
        if module.magnitude is not None:
            shape = (1, -1, *ones) if ones else (-1,)
            tensors[f"{name}.lora_magnitude_vector"] = module.magnitude.reshape(shape)
    return tensors


def _is_diffusers(content: Content) -> bool:
    known = (".lora_A.weight", ".lora.down.weight", "_lora.down.weight", "_layer.down.weight")
    return any(COMPONENTS.match(name) and name.endswith(known) for name in content.tensors)


FORMATS = {
    "diffusers": Format(
        "diffusers: pytorch_lora_weights.safetensors of a pipeline's components",
        _is_diffusers,
        read_diffusers,
        write_diffusers,
        Holds(frozenset(("linear", "conv")), dora=True),
    ),
}
