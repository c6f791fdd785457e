"""Entries from the tensors of a PEFT adapter, and everything about them that doesn't fit."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from interop import torch_io
from interop.adapter_file import is_floating
from interop.peft_claims import Claims
from interop.peft_config import REBASED_INITS
from interop.peft_copies import base_places, saved_again
from interop.peft_layout import Place, optional_copies, places, put, taken
from interop.peft_matching import PeftConfig
from interop.peft_modules import PREFIX, Base
from interop.peft_rebasing import against_the_original, rebasing_problems
from interop.peft_sites import claims_of, sites_of
from interop.peft_versions import swapped_parameters, undecided
from lora_jax.adapter import entry_of
from lora_jax.errors import InputError, listed
from lora_jax.site import Site


def sites_and_entries(
    config: PeftConfig, tensors: torch_io.Tensors, base: Base, source: Any
) -> tuple[tuple[Site, ...], dict[str, Any]]:
    """The sites of an adapter in the order of the parameter tree, and their entries, float32.

    Raises:
      InputError: naming ``source`` and every module and tensor that doesn't fit.
    """
    claims, problems = claims_of(config, base)
    rebased = config.init_lora_weights in REBASED_INITS
    problems += undecided(config, claims.settings, base)
    problems += rebasing_problems(config, claims, base) if rebased else []
    sites = sites_of(claims, config.use_dora, base)
    wanted = _wanted(config, tensors, claims, sites, base)
    adapted = {place.name for own in wanted.values() for place in own}
    of_base = base_places(tensors.keys() - adapted, base)
    found = [*of_base.values(), *(place for own in wanted.values() for place in own)]
    tensor_problems = [*_tensor_problems(tensors, {place.name: place.shape for place in found})]
    if not tensor_problems:
        kept = _without_rebased(of_base, base) if rebased else of_base
        tensor_problems += _base_problems(tensors, kept, base)
    problems += _untied(tensors, wanted, base) if config.ensure_weight_tying else []
    raise_all(f"{source} does not fit the model", [*problems, *tensor_problems])
    arrays = {site.path: _arrays(site, wanted[site.path], tensors) for site in sites}
    raise_all(f"{source} does not fit the model", _copy_problems(tensors, wanted, arrays))
    if rebased:
        sites, arrays = against_the_original(config, sites, arrays, base)
    return sites, {site.path: _entry(site, arrays[site.path]) for site in sites}


def _wanted(
    config: PeftConfig,
    tensors: torch_io.Tensors,
    claims: Claims,
    sites: Sequence[Site],
    base: Base,
) -> dict[str, list[Place]]:
    """The tensors of each site."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    swapped = swapped_parameters(config, shapes, claims.settings, base)
    again = saved_again(tensors)
    own = {
        site.path: [
            *places(site, base, claims.settings, swapped),
            *(copy for copy in optional_copies(site, base) if copy.name in tensors),
        ]
        for site in sites
    }
    return {
        path: [
            *found,
            *(p._replace(name=n, is_copy=True) for p in found for n in again.get(p.name, ())),
        ]
        for path, found in own.items()
    }


def _without_rebased(of_base: Mapping[str, Place], base: Base) -> dict[str, Place]:
    """Without linear layers' weights, of which PEFT stores what their first update has left."""
    return {
        name: place
        for name, place in of_base.items()
        if base.kind(place.field) == "embedding" or not name.endswith(".base_layer.weight")
    }


def _base_problems(
    tensors: torch_io.Tensors, of_base: Mapping[str, Place], base: Base
) -> Iterator[str]:
    for name, place in of_base.items():
        leaf = base.leaves[place.field]
        if isinstance(leaf, jax.ShapeDtypeStruct):
            yield f"{name} holds weights of the base: give params, not shapes, to compare them"
            continue
        values = taken(np.asarray(leaf), place)
        if not np.array_equal(tensors[name].astype(values.dtype), values):
            yield (
                f"{name} differs from the base's {place.field!r}: the adapter belongs to another "
                "base"
            )


def _untied(
    tensors: torch_io.Tensors, wanted: Mapping[str, Sequence[Place]], base: Base
) -> Iterator[str]:
    """Tables that PEFT was to tie and didn't, as it knows GPT-2's ``wte`` by no name for one."""
    for path, found in wanted.items():
        copies = [place.name for place in found if place.is_copy]
        if copies and not any(name in tensors for name in copies):
            tied = ", ".join(base.tied_modules(path))
            yield (
                f"{path!r} is also the weight of {tied}, which this adapter leaves as it was: to "
                f"have PEFT tie them name {tied} in place of the table, with "
                "ensure_weight_tying=True, or untie the base's weights"
            )


def _copy_problems(
    tensors: torch_io.Tensors,
    wanted: Mapping[str, Sequence[Place]],
    arrays: Mapping[str, Mapping[str, np.ndarray]],
) -> Iterator[str]:
    for path, found in wanted.items():
        own = {(p.field, p.index): p.name for p in found if not p.is_copy}
        for copy in (place for place in found if place.is_copy):
            expected = taken(arrays[path][copy.field], copy)
            if not np.array_equal(expected, _float32(tensors[copy.name])):
                original = own[copy.field, copy.index]
                yield f"{copy.name} differs from {original}, to which it is tied"


def _tensor_problems(
    tensors: torch_io.Tensors, expected: Mapping[str, tuple[int, ...]]
) -> Iterator[str]:
    known = {name: tensor for name, tensor in tensors.items() if name in expected}
    floating = {name: tensor for name, tensor in known.items() if is_floating(tensor)}
    found = {
        "missing": expected.keys() - tensors.keys(),
        "unexpected": tensors.keys() - expected.keys(),
        "wrong shape": [
            f"{name} is {tensor.shape}, expected {expected[name]}"
            for name, tensor in known.items()
            if tensor.shape != expected[name]
        ],
        "not floating point": [
            f"{name} is {known[name].dtype}" for name in known.keys() - floating.keys()
        ],
        "not finite": [
            name for name, tensor in floating.items() if not np.isfinite(_float32(tensor)).all()
        ],
    }
    for kind, names in found.items():
        if names:
            yield f"{kind}: {listed(sorted(names))}"
    yield from _hints(found["unexpected"], found["missing"], tensors, expected)


def _hints(
    unexpected: Collection[str],
    missing: Collection[str],
    tensors: torch_io.Tensors,
    expected: Mapping[str, tuple[int, ...]],
) -> Iterator[str]:
    """What names and shapes that don't fit look like."""
    spellings = {
        f"without the prefix {PREFIX!r} of PEFT": lambda n: PREFIX + n,
        "with '_orig_mod.' of a compiled model in them": lambda n: n.replace("_orig_mod.", ""),
        "with '_fsdp_wrapped_module.' in them": lambda n: n.replace("_fsdp_wrapped_module.", ""),
        "with the adapter's name in them": lambda n: _ADAPTER_NAME.sub(r"\1\2", n),
    }
    for looks, respelt in spellings.items():
        if any(respelt(name) in missing for name in islice(unexpected, _LOOKED_AT)):
            yield f"the unexpected are names of missing ones {looks}: rename them"
    for name, tensor in tensors.items():
        if name.endswith("lora_A.weight") and _is_in_groups(tensor.shape, expected.get(name, ())):
            yield (
                f"{name} reads every channel, as PEFT has it for a convolution in groups, whose "
                "kernel can't hold such an update: leave this layer out"
            )


def _is_in_groups(found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether A has several times the channels, and is else what was expected of a convolution."""
    if len(found) != len(expected) or len(expected) < 3:
        return False
    rest = (found[:1], found[2:]) == (expected[:1], expected[2:])
    return rest and found[1] > expected[1] and not found[1] % expected[1]


_LOOKED_AT = 1000
_ADAPTER_NAME = re.compile(r"(lora_\w+)\.[^.]+(\.weight|\.bias|)$")


def _arrays(site: Site, found: Sequence[Place], tensors: torch_io.Tensors) -> dict[str, np.ndarray]:
    """Each tensor in its part of the entry's arrays; what no tensor fills is zero."""
    arrays = {name: np.zeros(shape, np.float32) for name, shape in site.entry_shapes.items()}
    for place in found:
        if not place.is_copy:
            put(arrays[place.field], place, _float32(tensors[place.name]))
    return arrays


def _entry(site: Site, arrays: Mapping[str, np.ndarray]) -> Any:
    return entry_of(site, {name: jnp.asarray(array) for name, array in arrays.items()})


def _float32(tensor: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.asarray(tensor, np.float32)


def raise_all(subject: str, problems: Iterable[str]) -> None:
    """Raise one InputError with every problem, unless there are none."""
    if problems := list(problems):
        raise InputError(f"{subject}: " + "; ".join(problems))
