"""Where every tensor of a PEFT adapter stands in the arrays of ours: one table for both ways.

A stacked leaf is split into one set of tensors a layer, each cut to its layer's own rank::

    layers/self_attn/q_proj/kernel          base_model.model.model.layers.{i}.self_attn.q_proj
      a (layers, in, rank)             <->    .lora_A.weight (rank, in)
      b (layers, rank, out)                   .lora_B.weight (out, rank)
      m (layers, out)                         .lora_magnitude_vector (out,)
    embed_tokens/embedding                  base_model.model.model.embed_tokens
      a (vocab, rank)                  <->    .lora_embedding_A (rank, vocab)
      b (rank, features)                      .lora_embedding_B (features, rank)
      rows (tokens, features)                 .token_adapter.trainable_tokens_delta

Source: the key names of https://github.com/huggingface/peft, release 0.21.2.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from interop.keymaps import Index, Keymap, indices, module_name, tensor_name
from interop.peft_matching import Setting
from lora_jax.site import Plan, Site

PREFIX = "base_model.model."


class Place(NamedTuple):
    """One tensor of the file, and the part of an entry's array that holds it."""

    name: str
    field: str
    index: Index
    shape: tuple[int, ...]
    """Of the tensor; the first so many rows and columns at the array's index are its values."""
    transposed: bool = False
    is_copy: bool = False
    """The file repeats a tensor under this name, for a module that is tied to its own."""


class Base:
    """The base model by the names of both sides."""

    def __init__(self, keymap: Keymap, leaves: Mapping[str, Any] | None = None):
        """``leaves`` are the parameters (arrays or shapes) by path; ``None`` if not known."""
        self.known = leaves is not None
        self.leaves = leaves or {}
        self.keymap = keymap.over(self.leaves)
        self.rules = {rule.path: rule for rule in self.keymap.rules}

    @cached_property
    def tensors(self) -> dict[str, tuple[str, Index]]:
        """Every parameter of the torch model, with the leaf that holds it and its index there."""
        rules = [rule for rule in self.keymap.rules if rule.path in self.leaves]
        return {
            tensor_name(rule, index): (rule.path, index)
            for rule in rules
            for index in indices(rule, self.leaves[rule.path].shape)
        }

    @cached_property
    def modules(self) -> dict[str, tuple[str, Index]]:
        """Every torch module with a weight, with the leaf (which may be absent) and its index."""
        stacked = [r.path for r in self.keymap.rules if r.stack and r.path in self.leaves]
        depth = max((self.leaves[path].shape[0] for path in stacked), default=0)
        return {
            saved_module(tensor_name(rule, index)): (rule.path, index)
            for rule in self.keymap.rules
            if rule.name.endswith(".weight")
            for index in indices(rule, getattr(self.leaves.get(rule.path), "shape", (depth,)))
        }

    def tied_modules(self, path: str) -> list[str]:
        """The modules without a leaf of their own, whose weight is the leaf at ``path``."""
        absent = {r.name for r in self.keymap.rules if r.path not in self.leaves}
        names = [copy for copy, of in self.keymap.copies.items() if of == self.rules[path].name]
        return [name.removesuffix(".weight") for name in names if name in absent]

    def kind(self, path: str) -> str | None:
        """``embedding`` or ``linear``, or ``None`` where PEFT can't adapt the leaf."""
        kind = self.rules[path].kind
        return kind if kind in ("linear", "embedding") else None


def is_pair(site: Site) -> bool:
    """Whether the site has low-rank factors, in PEFT's terms is a target."""
    return site.variant in ("lora", "dora")


def settings_of(site: Site, base: Base) -> dict[str, Setting]:
    """Rank and scale on each torch module of a site; modules of rank 0 are left out."""
    found = {
        module_name(site.path, base.keymap, index): _setting(site, index)
        for index in indices(base.rules[site.path], site.shape)
    }
    return {module: setting for module, setting in found.items() if setting.rank}


def adapted_settings(plan: Plan, base: Base) -> dict[str, Setting]:
    """Rank and scale on each module that has a pair."""
    pairs = filter(is_pair, plan.sites)
    return {k: setting for site in pairs for k, setting in settings_of(site, base).items()}


def places(site: Site, base: Base, adapted: Iterable[str]) -> list[Place]:
    """Every tensor of a site, layer after layer.

    Args:
      site: a site that PEFT can hold.
      base: names and, for tied modules, leaves.
      adapted: the modules with a pair, whose biases have names of their own.
    """
    places_at = _PLACES[site.variant]
    found = indices(base.rules[site.path], site.shape)
    return [place for index in found for place in places_at(site, base, index, adapted)]


def part(array: np.ndarray, place: Place) -> np.ndarray:
    """The view of an entry's array that is the tensor: read it to write, assign it to read."""
    shape = place.shape[::-1] if place.transposed else place.shape
    inside = array[(*place.index, *map(slice, shape))]
    return inside.T if place.transposed else inside


def saved_module(tensor: str) -> str:
    """The module that holds a tensor."""
    return tensor.rpartition(".")[0]


def tensor_names(site: Site, base: Base) -> list[str]:
    """The base's own tensors of a site's leaf, one a layer."""
    rule = base.rules[site.path]
    return [tensor_name(rule, index) for index in indices(rule, site.shape)]


def _setting(site: Site, index: Index) -> Setting:
    layer = index[0] if index else 0
    rank = site.ranks[layer] if site.ranks else site.rank
    scale = site.scale[layer] if isinstance(site.scale, tuple) else site.scale
    return Setting(rank, scale)


def _pair(site: Site, base: Base, index: Index, adapted: Iterable[str]) -> list[Place]:
    rank = _setting(site, index).rank
    name = PREFIX + module_name(site.path, base.keymap, index)
    a, b = (rank, site.fan_in), (site.fan_out, rank)
    if not rank:
        return []
    if base.kind(site.path) == "linear":
        return [
            Place(f"{name}.lora_A.weight", "a", index, a, transposed=True),
            Place(f"{name}.lora_B.weight", "b", index, b, transposed=True),
        ]
    own = [
        Place(f"{name}.lora_embedding_A", "a", index, a, transposed=True),
        Place(f"{name}.lora_embedding_B", "b", index, b, transposed=True),
    ]
    tied = [PREFIX + module for module in base.tied_modules(site.path)]
    return own + [  # As a linear layer the table is transposed, and A and B change places.
        copy
        for module in tied
        for copy in (
            Place(f"{module}.lora_A.weight", "b", index, b[::-1], is_copy=True),
            Place(f"{module}.lora_B.weight", "a", index, a[::-1], is_copy=True),
        )
    ]


def _triple(site: Site, base: Base, index: Index, adapted: Iterable[str]) -> list[Place]:
    name = f"{PREFIX}{module_name(site.path, base.keymap, index)}.lora_magnitude_vector"
    pair = _pair(site, base, index, adapted)
    return [*pair, Place(name, "m", index, (site.fan_out,))] if pair else []


def _full(site: Site, base: Base, index: Index, adapted: Iterable[str]) -> list[Place]:
    rule = base.rules[site.path]
    module, _, parameter = tensor_name(rule, index).rpartition(".")
    inside = ".base_layer" if module in adapted else ""
    inner, transposed = site.shape[rule.stack :], bool(rule.order)
    shape = inner[::-1] if transposed else inner
    tied = base.tied_modules(site.path)
    return [
        Place(f"{PREFIX}{module}{inside}.{parameter}", "value", index, shape, transposed),
        *(
            Place(f"{PREFIX}{copy}.{parameter}", "value", index, shape, is_copy=True)
            for copy in tied
        ),
    ]


def _rows(site: Site, base: Base, index: Index, adapted: Iterable[str]) -> list[Place]:
    module = module_name(site.path, base.keymap, index)
    name = f"{PREFIX}{module}.token_adapter.trainable_tokens_delta"
    return [Place(name, "rows", index, site.entry_shapes["rows"])]


_PLACES: dict[str, Callable[[Site, Base, Index, Iterable[str]], list[Place]]] = {
    "lora": _pair,
    "dora": _triple,
    "full": _full,
    "rows": _rows,
}
