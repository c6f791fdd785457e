"""Adapter files by torch module <-> (adapter, plan): stacks are split and joined here.

A torch module's factors stand in the arrays of its leaf at its layer, each cut to its own rank::

    ModuleAdapter of model.layers.{i}.self_attn.q_proj      layers/self_attn/q_proj/kernel
      a (rank, in)                                     <->    a[i, :, :rank]
      b (out, rank)                                    <->    b[i, :rank, :]
      magnitude (out,)                                 <->    m[i]
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from interop.adapter_file import FileAdapter, ModuleAdapter, RowAdapter, checked, raise_all
from interop.adapter_format import BaseModule
from interop.keymaps import Index, Keymap, indices, tensor_name, tensor_shape, tensor_view
from interop.module_places import Spot, Tree, factors, roles
from interop.module_problems import (
    Placed,
    double_claims,
    incomplete,
    leaf_problems,
    misfits,
    settings_by_layer,
    site_problems,
    unknown_names,
)
from lora_jax.adapter import Adapter, Entry, check, entry_of
from lora_jax.paths import named_leaves
from lora_jax.site import Plan, Site


def to_plan(file: FileAdapter, params: Any, keymap: Keymap) -> tuple[Adapter, Plan]:
    """The adapter of a file for the model whose parameter tree is ``params``.

    Args:
      file: what a format's reader gave.
      params: the base parameter tree, arrays or shapes.
      keymap: which torch module holds which leaf.

    Returns:
      The adapter, float32, and its plan, for `lora_jax.adapt` and `lora_jax.merge`. Layers that
      the file doesn't adapt have rank 0 in it.

    Raises:
      InputError: every module and parameter that the model doesn't have or has in another shape
        or kind, and everything that a plan can't represent.

    >>> from interop.keymaps import LLAMA
    >>> params = {"lm_head": {"kernel": jnp.ones((4, 6))}}
    >>> pair = ModuleAdapter(np.ones((2, 4)), np.ones((6, 2)), 1.5)
    >>> adapter, plan = to_plan(FileAdapter("mine", {"lm_head": pair}), params, LLAMA)
    >>> adapter["lm_head/kernel"].a.shape, plan["lm_head/kernel"].scale
    ((4, 2), 1.5)
    """
    leaves = named_leaves(params)
    tree = Tree(keymap, leaves)
    raise_all("the adapter does not fit the model", unknown_names(file, tree))
    checked(file, "the adapter")
    raise_all("the adapter does not fit the model", misfits(file, tree))
    pairs, whole = _pairs_by_leaf(file, tree), _whole_by_leaf(file, tree)
    rows = {tree.spots[f"{name}.weight"].rule.path: found for name, found in file.rows.items()}
    problems = [
        *(problem for path in pairs for problem in leaf_problems(path, pairs[path], tree)),
        *incomplete(whole, tree),
        *double_claims({"adapted": pairs, "trained whole": whole, "trained in rows": rows}),
    ]
    raise_all("a plan can't hold the adapter", problems)
    found = {
        **{path: _pair(path, pairs[path], tree) for path in pairs},
        **{path: _full(path, whole[path], tree) for path in whole},
        **{path: _some_rows(path, rows[path], tree) for path in rows},
    }
    in_order = {path: found[path] for path in leaves if path in found}
    sites = tuple(site for site, _ in in_order.values())
    size = sum(math.prod(leaf.shape) for leaf in leaves.values())
    return {path: entry for path, (_, entry) in in_order.items()}, Plan(sites, size)


def from_plan(adapter: Adapter, plan: Plan, keymap: Keymap, *, params: Any = None) -> FileAdapter:
    """The adapter by torch module, float32: the inverse of `to_plan`.

    Args:
      adapter: the entries by path.
      plan: the plan that the adapter was made from.
      keymap: which torch module holds which leaf.
      params: the base's parameter tree, arrays or shapes. Needed where an embedding table is
        trained, which a head may share.

    Raises:
      InputError: naming every site that no torch module holds, that has other axis roles, or
        whose values are not finite or not zero beyond its layers' ranks.
    """
    check(adapter, plan)
    known = params is not None
    tree = Tree(keymap, named_leaves(params) if known else dict(plan))
    problems = site_problems(adapter, plan, tree, known=known)
    raise_all("the adapter can't be written by torch module", problems)
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for site in plan.sites:
        field, of_site = _FROM_SITE[site.variant]
        found[field] |= of_site(site, adapter[site.path], tree)
    shared = any(tree.sharers(rule) for path in plan for rule in tree.rules[path])
    return checked(FileAdapter("lora_jax", **{"modules": {}, **found}, shares_tables=shared),
                   "the adapter")  # fmt: skip


def base_modules(params: Any, keymap: Keymap) -> dict[str, BaseModule]:
    """The base's modules by torch name, for the readers of formats that need to know them.

    >>> from interop.keymaps import LLAMA
    >>> base_modules({"lm_head": {"kernel": jnp.ones((4, 6))}}, LLAMA)
    {'lm_head': BaseModule(kind='linear', shape=(6, 4))}
    """
    tree = Tree(keymap, named_leaves(params))
    return {
        module: BaseModule(rule.kind, tensor_shape(rule, tuple(tree.leaves[rule.path].shape)))
        for module in tree.modules
        for rule in [tree.spots[f"{module}.weight"].rule]
    }


def _pairs_by_leaf(file: FileAdapter, tree: Tree) -> dict[str, dict[Index, list[Placed]]]:
    """By leaf and stack index, the modules that stand there, in the order of their parts."""
    placed = [Placed(name, tree.spots[f"{name}.weight"], m) for name, m in file.modules.items()]
    found = defaultdict(lambda: defaultdict(list))
    for each in sorted(placed, key=lambda each: each.spot.rule.part):
        found[each.spot.rule.path][each.spot.index].append(each)
    return {path: dict(by_index) for path, by_index in found.items()}


def _whole_by_leaf(file: FileAdapter, tree: Tree) -> dict[str, dict[str, np.ndarray]]:
    found = defaultdict(dict)
    for name, array in file.whole.items():
        found[tree.spots[name].rule.path][name] = array
    return dict(found)


def _pair(path: str, found: Mapping[Index, Sequence[Placed]], tree: Tree) -> tuple[Site, Entry]:
    first = next(iter(found.values()))[0]
    leaf, rule = tree.leaves[path], first.spot.rule
    settings = settings_by_layer(found, indices(rule, leaf.shape)).values()
    ranks, scales = zip(*(setting for (setting,) in settings), strict=True)
    used = {scale for rank, scale in zip(ranks, scales, strict=True) if rank}
    site = Site(
        path,
        tuple(leaf.shape),
        np.dtype(leaf.dtype).name,
        roles(rule, len(leaf.shape)),
        max(ranks),
        used.pop() if len(used) == 1 else scales,
        ranks=ranks if len(set(ranks)) > 1 else (),
        variant="lora" if first.module.magnitude is None else "dora",
    )
    arrays = {name: np.zeros(shape, np.float32) for name, shape in site.entry_shapes.items()}
    for at in found.values():
        _fill(arrays, at, site)
    return site, entry_of(site, {name: jnp.asarray(array) for name, array in arrays.items()})


def _fill(arrays: Mapping[str, np.ndarray], at: Sequence[Placed], site: Site) -> None:
    """Modules of one fused leaf take one range of its ranks after the other."""
    start = 0
    for placed in at:
        end = start + placed.module.rank
        for name, view in factors(arrays, placed.spot, site, range(start, end)).items():
            view[...] = getattr(placed.module, name)
        start = end


def _full(path: str, found: Mapping[str, np.ndarray], tree: Tree) -> tuple[Site, Entry]:
    leaf = tree.leaves[path]
    value = np.empty(leaf.shape, np.float32)
    for name, array in found.items():
        rule, index = tree.spots[name]
        view = tensor_view(rule, value, index)
        view[...] = array.reshape(view.shape)
    dtype = np.dtype(leaf.dtype).name
    site = Site(path, tuple(leaf.shape), dtype, (), 0, 1.0, variant="full")
    return site, entry_of(site, {"value": jnp.asarray(value)})


def _some_rows(path: str, found: RowAdapter, tree: Tree) -> tuple[Site, Entry]:
    shape, dtype = tuple(tree.leaves[path].shape), np.dtype(tree.leaves[path].dtype).name
    tokens = tuple(found.indices)
    roles_of_table = ("in", "out")
    site = Site(path, shape, dtype, roles_of_table, len(tokens), 1.0, variant="rows", rows=tokens)
    return site, entry_of(site, {"rows": jnp.asarray(found.rows, jnp.float32)})


def _modules_of(site: Site, entry: Any, tree: Tree) -> dict[str, ModuleAdapter]:
    arrays = {name: np.asarray(getattr(entry, name), np.float32) for name in site.entry_shapes}
    found = {}
    for rule in tree.rules[site.path]:
        for index in indices(rule, site.shape):
            layer = index[0] if index else 0
            rank = site.ranks[layer] if site.ranks else site.rank
            scale = site.scale[layer] if isinstance(site.scale, tuple) else site.scale
            views = factors(arrays, Spot(rule, index), site, range(rank))
            name = tensor_name(rule, index).removesuffix(".weight")
            found[name] = ModuleAdapter(**views, scale=scale, kind=rule.kind)  # pyright: ignore
    return {name: module for name, module in found.items() if module.rank}


def _parameters_of(site: Site, entry: Any, tree: Tree) -> dict[str, np.ndarray]:
    value = np.asarray(entry.value, np.float32)
    return {
        tensor_name(rule, index): tensor_view(rule, value, index).reshape(
            tensor_shape(rule, site.shape)
        )
        for rule in tree.rules[site.path]
        for index in indices(rule, site.shape)
    }


def _rows_of(site: Site, entry: Any, tree: Tree) -> dict[str, RowAdapter]:
    module = tensor_name(tree.rules[site.path][0]).removesuffix(".weight")
    return {module: RowAdapter(site.rows, np.asarray(entry.rows, np.float32))}


# By variant: the field of a FileAdapter that holds the site, and what it holds.
_FROM_SITE: dict[str, tuple[str, Callable[[Site, Any, Tree], dict[str, Any]]]] = {
    "lora": ("modules", _modules_of),
    "dora": ("modules", _modules_of),
    "full": ("whole", _parameters_of),
    "rows": ("rows", _rows_of),
}
