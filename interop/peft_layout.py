"""Where every tensor of a PEFT adapter stands in the arrays of ours: one table for both ways.

A stacked leaf is split into one set of tensors a layer, each cut to its layer's own rank::

    layers/self_attn/q_proj/kernel          base_model.model.model.layers.{i}.self_attn.q_proj
      a (layers, in, rank)             <->    .lora_A.weight (rank, in)
      b (layers, rank, out)                   .lora_B.weight (out, rank)
      m (layers, out)                         .lora_magnitude_vector (out,)
    layers/self_attn/q_proj/bias
      bias (layers, out)                      .lora_B.bias (out,)
    conv/kernel                             base_model.model.conv
      a (window, in, rank)             <->    .lora_A.weight (rank, in, window)
      b (rank, out)                           .lora_B.weight (out, rank, 1, 1)
    layers/mlp/experts/down                 base_model.model.model.layers.{i}.mlp.experts
      a (layers, experts, in, rank)    <->    .lora_A.weight (experts · rank, in)
      b (layers, experts, rank, out)          .lora_B.weight (out, rank · experts)
    embed_tokens/embedding                  base_model.model.model.embed_tokens
      a (vocab, rank)                  <->    .lora_embedding_A (rank, vocab)
      b (rank, features)                      .lora_embedding_B (features, rank)
      rows (tokens, features)                 .token_adapter.trainable_tokens_delta

Source: the key names of https://github.com/huggingface/peft, release 0.21.2.
"""

import math
from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np

from interop.keymaps import Index, Rule, indices, tensor_name
from interop.peft_matching import Setting
from interop.peft_modules import PARAMETERS, PREFIX, Base, roles_in_torch
from lora_jax.site import Plan, Role, Site


class Place(NamedTuple):
    """One tensor of the file, and the part of an entry's array that holds it."""

    name: str
    field: str
    index: Index
    part: tuple[slice, ...]
    """Of the array at that index: what the tensor holds of each axis."""
    order: tuple[int, ...]
    """Which of these axes come after one another in the tensor."""
    shape: tuple[int, ...]
    """Of the tensor, which may have several of these axes as one."""
    is_copy: bool = False
    """The file repeats a tensor under this name, for a module that is tied to its own."""


def taken(array: np.ndarray, place: Place) -> np.ndarray:
    """The tensor that the place has in an entry's array."""
    return _view(array, place).reshape(place.shape)


def put(array: np.ndarray, place: Place, tensor: np.ndarray) -> None:
    """Write the tensor to its place in an entry's array: the inverse of `taken`."""
    view = _view(array, place)
    view[...] = tensor.reshape(view.shape)


def _view(array: np.ndarray, place: Place) -> np.ndarray:
    return array[(*place.index, *place.part)].transpose(place.order)


def is_pair(site: Site) -> bool:
    """Whether the site has low-rank factors, in PEFT's terms is a target."""
    return site.variant in ("lora", "dora")


def setting_of(site: Site, index: Index) -> Setting:
    """Rank and scale at one index of a site's stack."""
    layer = index[0] if index else 0
    rank = site.ranks[layer] if site.ranks else site.rank
    scale = site.scale[layer] if isinstance(site.scale, tuple) else site.scale
    return Setting(rank, scale)


def settings_of(site: Site, base: Base) -> dict[str, Setting]:
    """Rank and scale on each target of a site; those of rank 0 are left out."""
    found = {
        base.target(site.path, index): setting_of(site, index)
        for index in indices(base.rules[site.path], site.shape)
    }
    return {target: setting for target, setting in found.items() if setting.rank}


def adapted_settings(plan: Plan, base: Base) -> dict[str, Setting]:
    """Rank and scale on each target that has a pair."""
    pairs = filter(is_pair, plan.sites)
    return {k: setting for site in pairs for k, setting in settings_of(site, base).items()}


def places(
    site: Site, base: Base, adapted: Collection[str], swapped: Collection[str] = ()
) -> list[Place]:
    """Every tensor of a site, layer after layer.

    Args:
      site: a site that PEFT can hold.
      base: names and, for tied modules, leaves.
      adapted: every target with a pair, since modules inside one have other names.
      swapped: parameters whose A and B stand on each other's side, as PEFT before 0.19.1 had them.
    """
    ats = (
        _At(site, base, index, adapted, swapped)
        for index in indices(base.rules[site.path], site.shape)
    )
    return [place for at in ats for place in _PLACES[site.variant](at)]


def optional_copies(site: Site, base: Base) -> list[Place]:
    """What the file may repeat of a site: of rows, those of tied modules whose tables it has."""
    if site.variant != "rows":
        return []
    [own] = places(site, base, ())
    tied = (base.target(site.path, ()), *base.tied_modules(site.path))
    end = own.name.removeprefix(PREFIX + tied[0])
    return [own._replace(name=PREFIX + module + end, is_copy=True) for module in tied[1:]]


def tensor_names(site: Site, base: Base) -> list[str]:
    """The base's own tensors of a site's leaf, one a layer."""
    return [
        tensor_name(rule, index)
        for rule in base.parts[site.path]
        for index in indices(rule, site.shape)
    ]


def _first(*sizes: int) -> tuple[slice, ...]:
    return tuple(map(slice, sizes))


class _At(NamedTuple):
    """One index of a site's stack, among everything that decides its names."""

    site: Site
    base: Base
    index: Index
    adapted: Collection[str]
    swapped: Collection[str]

    @property
    def target(self) -> str:
        return self.base.target(self.site.path, self.index)

    @property
    def key(self) -> str:
        return self.base.key(self.target, self.adapted)

    def order(self, role: Role) -> list[int]:
        """Of the leaf's axes of that role, in their order there, which come after one another in
        torch."""
        rule, own = self.base.rules[self.site.path], self.site.axes(role)
        groups = rule.axes(len(self.site.shape) - rule.stack)
        roles = roles_in_torch(rule, len(groups))
        axes = [
            axis for group, its in zip(groups, roles, strict=True) if its == role for axis in group
        ]
        return [own.index(axis + rule.stack) for axis in axes]

    def sizes(self, role: Role) -> tuple[int, ...]:
        return self.site.dims(role)


def _pair(at: _At) -> list[Place]:
    if not setting_of(at.site, at.index).rank:
        return []
    return _PAIRS[at.base.rules[at.site.path].kind](at)


def _linear_pair(at: _At, window: tuple[int, ...] = ()) -> list[Place]:
    """A and B; of a convolution A has the window, and B ones in its place."""
    rank = setting_of(at.site, at.index).rank
    ins, outs = at.order("in"), at.order("out")
    a, b = _first(*at.sizes("in"), rank), _first(rank, *at.sizes("out"))
    fan_in = math.prod(at.sizes("in")) // math.prod(window)
    a_order, b_order = (len(ins), *ins), (*(1 + axis for axis in outs), 0)
    a_shape = (rank, fan_in, *window)
    b_shape = (at.site.fan_out, rank, *(1,) * len(window))
    return [
        Place(f"{at.key}.lora_A.weight", "a", at.index, a, a_order, a_shape),
        Place(f"{at.key}.lora_B.weight", "b", at.index, b, b_order, b_shape),
    ]


def _conv_pair(at: _At) -> list[Place]:
    ins, sizes = at.order("in"), at.sizes("in")
    return _linear_pair(at, tuple(sizes[axis] for axis in ins[1:]))


def _parameter_pair(at: _At) -> list[Place]:
    """Experts stand in the rank axis: outside the rank in A, inside it in B."""
    rule = at.base.rules[at.site.path]
    experts = at.sizes("stack")[rule.stack :]
    if not experts:
        return _linear_pair(at)
    rank = setting_of(at.site, at.index).rank
    [count], [fan_in], [fan_out] = experts, at.sizes("in"), at.sizes("out")
    a, b = _first(count, fan_in, rank), _first(count, rank, fan_out)
    names = f"{at.key}.lora_A.weight", f"{at.key}.lora_B.weight"
    if at.target in at.swapped:
        return [
            Place(names[0], "b", at.index, b, (0, 1, 2), (count * rank, fan_out)),
            Place(names[1], "a", at.index, a, (1, 2, 0), (fan_in, rank * count)),
        ]
    return [
        Place(names[0], "a", at.index, a, (0, 2, 1), (count * rank, fan_in)),
        Place(names[1], "b", at.index, b, (2, 1, 0), (fan_out, rank * count)),
    ]


def _embedding_pair(at: _At) -> list[Place]:
    rank = setting_of(at.site, at.index).rank
    words, features = at.site.fan_in, at.site.fan_out
    a, b = _first(words, rank), _first(rank, features)
    own = [
        Place(f"{at.key}.lora_embedding_A", "a", at.index, a, (1, 0), (rank, words)),
        Place(f"{at.key}.lora_embedding_B", "b", at.index, b, (1, 0), (features, rank)),
    ]
    tied = [PREFIX + module for module in at.base.tied_modules(at.site.path)]
    return own + [  # As a linear layer the table is transposed, and A and B change places.
        copy
        for module in tied
        for copy in (
            Place(f"{module}.lora_A.weight", "b", at.index, b, (0, 1), (rank, features), True),
            Place(f"{module}.lora_B.weight", "a", at.index, a, (0, 1), (words, rank), True),
        )
    ]


def _triple(at: _At) -> list[Place]:
    if not (pair := _pair(at)):
        return []
    window = (1,) * (len(pair[0].shape) - 2)
    is_conv = at.base.rules[at.site.path].kind == "conv"
    shape = (1, at.site.fan_out, *window) if is_conv else (at.site.fan_out,)
    name, part = f"{at.key}.lora_magnitude_vector", _first(*at.sizes("out"))
    return [*pair, Place(name, "m", at.index, part, tuple(at.order("out")), shape)]


def _full(at: _At) -> list[Place]:
    found = [
        whole_place(rule, at.site.shape, at.index, at.base.base_key(name, at.adapted))
        for rule in at.base.parts[at.site.path]
        for name in [tensor_name(rule, at.index)]
    ]
    parameter = found[0].name.rpartition(".")[2]
    tied = [f"{PREFIX}{module}.{parameter}" for module in at.base.tied_modules(at.site.path)]
    return found + [found[0]._replace(name=name, is_copy=True) for name in tied]


def whole_place(rule: Rule, shape: tuple[int, ...], index: Index, name: str) -> Place:
    """A tensor of the base itself, which may be one part of the leaf's last axis."""
    inner = list(shape[rule.stack :])
    part = list(_first(*inner))
    number, count = rule.part
    if count > 1:
        inner[-1] //= count
        part[-1] = slice(number * inner[-1], (number + 1) * inner[-1])
    groups = rule.axes(len(inner))
    in_torch = tuple(math.prod(inner[axis] for axis in group) for group in groups)
    return Place(name, "value", index, tuple(part), sum(groups, ()), in_torch)


def _rows(at: _At) -> list[Place]:
    shape = at.site.entry_shapes["rows"]
    name = f"{at.key}.token_adapter.trainable_tokens_delta"
    return [Place(name, "rows", at.index, _first(*shape), (0, 1), shape)]


def _bias(at: _At) -> list[Place]:
    module = tensor_name(at.base.rules[at.site.path], at.index).rpartition(".")[0]
    if module not in at.adapted:
        return []
    shape = at.site.shape[len(at.index) :]
    name = f"{at.base.key(module, at.adapted)}.lora_B.bias"
    order = tuple(range(len(shape)))
    return [Place(name, "bias", at.index, _first(*shape), order, (math.prod(shape),))]


_PAIRS: dict[str, Callable[[_At], list[Place]]] = {
    "linear": _linear_pair,
    "linear_in_out": _linear_pair,
    "conv": _conv_pair,
    "embedding": _embedding_pair,
    **dict.fromkeys(PARAMETERS, _parameter_pair),
}
_PLACES: dict[str, Callable[[_At], list[Place]]] = {
    "lora": _pair,
    "dora": _triple,
    "full": _full,
    "rows": _rows,
    "bias": _bias,
}
