"""Tensors of a PEFT file without its model that are no parameters of the adapter: copies.

==============================  ======================================================
name                            is
==============================  ======================================================
head.modules_to_save.weight     the trained head.weight once more
head.original_module.weight     head.weight of the base
head.base_layer.weight          the same, beside factors
head.weight                     the same, unless the config says that it is trained
==============================  ======================================================
"""

import zlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from interop.adapter_file import ModuleAdapter
from interop.peft_copies import without_copy, without_wrappers
from interop.peft_matching import PeftConfig, saved_tensors
from lora_jax.errors import listed

_ORIGINAL = ".original_module."
_FACTORS = ".lora_"  # of whatever is not read as a factor


def parameter_of(name: str) -> tuple[str, bool]:
    """The parameter that a name stands for, and whether it is the base's in any case.

    >>> parameter_of("head.original_module.weight"), parameter_of("head.modules_to_save.weight")
    (('head.weight', True), ('head.weight', False))
    """
    return without_copy(without_wrappers(name)), _ORIGINAL in name


def trained_whole(
    config: PeftConfig | None, whole: Mapping[str, np.ndarray], adapted: Collection[str]
) -> set[str]:
    """Those of the parameters in a file that are trained, which the config tells.

    Args:
      config: ``None`` where there is none that can be followed: all but adapted weights are taken
        for trained then.
      whole: what stands in the file under a parameter's name.
      adapted: the modules that have factors.
    """
    if config is None:
        return {name for name in whole if name.removesuffix(".weight") not in adapted}
    biases = {name for name in whole if name.endswith(".bias")}
    of_adapted = {name for name in biases if name.removesuffix(".bias") in adapted}
    found = saved_tensors(config, [*whole]) | {name for name in whole if _FACTORS in name}
    found |= {"none": set(), "lora_only": of_adapted, "all": biases}[config.bias]
    if not config.ensure_weight_tying:
        return found
    values = {_digest(whole[name]) for name in found}
    return {name for name, array in whole.items() if _digest(array) in values}


def base_notes(
    of_base: Collection[str], original: Collection[str], adapted: Collection[str]
) -> Iterator[str]:
    """Which weights of the base stand in a file, and by what they are told to be that."""
    own = [name for name in of_base if name in original or name.removesuffix(".weight") in adapted]
    if own:
        yield f"the base's own weights beside its adapter: {listed(own)}"
    if rest := [name for name in of_base if name not in own]:
        yield f"weights that its config doesn't train, taken for the base's own: {listed(rest)}"


def trained_in_rows(config: PeftConfig, rows: Mapping[str, np.ndarray]) -> list[str]:
    """The tables whose rows stand in a file, without heads that are tied to one of them."""
    named = config.trainable_token_indices
    if isinstance(named, Mapping):
        return [name for name in rows if name.endswith((*named,))]
    inside_out = sorted(rows, key=lambda name: -name.count("."))
    first = {_digest(rows[name]): name for name in reversed(inside_out)}
    return [name for name in rows if name in first.values()]


def tied_heads(modules: Mapping[str, ModuleAdapter]) -> set[str]:
    """Linear layers whose B is a table's A, as of a head that is tied to it."""
    tables = {_digest(m.a.T) for m in modules.values() if m.kind == "embedding"}
    return {name for name, m in modules.items() if m.kind == "linear" and _digest(m.b) in tables}


def _digest(array: np.ndarray) -> tuple[Any, ...]:
    return array.shape, array.dtype.str, zlib.crc32(np.ascontiguousarray(array).tobytes())
