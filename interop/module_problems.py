"""Everything that keeps a file's modules from standing in a tree, and a plan from being named."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from interop.adapter_file import FileAdapter, ModuleAdapter, RowAdapter
from interop.keymaps import Index, Rule, indices, tensor_shape
from interop.module_places import Spot, Tree, factor_shapes, kind_of, roles
from lora_jax.adapter import Adapter
from lora_jax.errors import listed
from lora_jax.paths import nearest
from lora_jax.site import Plan, Site

_PAIRS = ("lora", "dora")
_ALONE = ("full", "rows")


class Placed(NamedTuple):
    """A module of the file and where it stands."""

    name: str
    spot: Spot
    module: ModuleAdapter


def unknown_names(file: FileAdapter, tree: Tree) -> Iterator[str]:
    """The modules and parameters of a file that the tree doesn't have."""
    for word, names, known in (
        ("modules", [name for name in file.modules if tree.spot(name) is None], tree.modules),
        ("parameters", [name for name in file.whole if name not in tree.spots], tree.spots),
    ):
        if names:
            near = ", ".join(nearest(names[0], [*known])) or "none"
            yield f"the model has no {word} {listed(map(repr, names))} (nearest to it: {near})"


def misfits(file: FileAdapter, tree: Tree) -> Iterator[str]:
    """What of a file has another shape or kind than its place in the tree."""
    for name, module in file.modules.items():
        if spot := tree.spot(name):
            yield from _module_misfits(name, module, spot, tree)
    for name, found in file.rows.items():
        yield from _row_misfits(name, found, tree)
    for name in file.whole:
        rule = tree.spots[name].rule
        expected = tensor_shape(rule, tuple(tree.leaves[rule.path].shape))
        if (found := file.whole[name].shape) != expected:
            yield f"parameter {name!r} is {found}, the model's is {expected}"
    yield from _sharing_problems(file, tree)


def settings_by_layer(
    found: Mapping[Index, Sequence[Placed]], wanted: Iterable[Index]
) -> dict[int, set[tuple[int, float]]]:
    """The ranks and scales along the first stack axis: one of each, if a plan can hold them."""
    settings = defaultdict(set)
    for index in wanted:
        at = found.get(index, ())
        scale = at[0].module.scale if at else 0.0
        settings[index[0] if index else 0].add((sum(p.module.rank for p in at), scale))
    return settings


def leaf_problems(path: str, found: Mapping[Index, Sequence[Placed]], tree: Tree) -> Iterator[str]:
    """What of the modules of one leaf its site can't represent."""
    every = [placed for at in found.values() for placed in at]
    shape, rule = tree.leaves[path].shape, every[0].spot.rule
    wanted = indices(rule, shape)
    magnitudes = [placed.name for placed in every if placed.module.magnitude is not None]
    if magnitudes and len(magnitudes) < len(wanted) * len(tree.rules[path]):
        yield (
            f"{path!r} has DoRA in {listed(magnitudes)} alone, and its other modules would have "
            "magnitudes here: expected all or none"
        )
    for layer, settings in settings_by_layer(found, wanted).items():
        if len(settings) > 1:
            yield (
                f"{path!r} has experts of different (rank, scale) in layer {layer}, expected one: "
                f"{sorted(settings)}"
            )
    if rule.part[1] > 1 and roles(rule, len(shape))[-1] != "out":
        yield f"{path!r} is fused along its input axis, where modules have no factors of their own"
    for at in found.values():
        if len({placed.module.scale for placed in at}) > 1:
            scales = ", ".join(f"{placed.name} {placed.module.scale}" for placed in at)
            yield f"{path!r} is fused from modules whose scales differ, expected one: {scales}"


def incomplete(whole: Mapping[str, Mapping[str, Any]], tree: Tree) -> Iterator[str]:
    """Leaves that are trained whole in some of their tensors alone."""
    for path, found in whole.items():
        names = [name for name, spot in tree.spots.items() if spot.rule.path == path]
        if missing := [name for name in names if name not in found]:
            yield f"{path!r} is trained whole, without {listed(missing)}: expected all or none"


def double_claims(by_word: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Leaves with two kinds of entry."""
    paths = [path for found in by_word.values() for path in found]
    for path in sorted({path for path in paths if paths.count(path) > 1}):
        words = [word for word, found in by_word.items() if path in found]
        yield f"{path!r} is {' and '.join(words)}, expected one of them"


def site_problems(adapter: Adapter, plan: Plan, tree: Tree, *, known: bool) -> Iterator[str]:
    """What of a plan torch modules can't hold; ``known`` if the tree has the base's leaves."""
    for site in plan.sites:
        rules = tree.rules.get(site.path)
        if not rules:
            near = ", ".join(nearest(site.path, tree.rules)) or "none"
            yield f"{site.path!r} belongs to no known torch module (nearest: {near})"
            continue
        if not known and {rule.name for rule in rules} & {*tree.keymap.copies.values()}:
            yield f"{site.path!r} may be shared with a head: give params, the base's or shapes"
        arrays = [getattr(adapter[site.path], name) for name in site.entry_shapes]
        if not all(np.isfinite(np.asarray(array)).all() for array in arrays):
            yield f"{site.path!r} holds values that are not finite"
        elif site.variant in _PAIRS:
            yield from _pair_problems(site, adapter[site.path], rules[0])
        elif site.variant not in _ALONE:
            yield f"{site.path!r} is of variant {site.variant!r}, which no module of a file has"


def _module_misfits(name: str, module: ModuleAdapter, spot: Spot, tree: Tree) -> Iterator[str]:
    shape = tuple(tree.leaves[spot.rule.path].shape)
    kind = kind_of(spot.rule, len(shape))
    if module.kind != kind:
        yield f"module {name!r} is {module.kind} in the file and {kind or 'other'} in the model"
        return
    shapes = factor_shapes(spot.rule, shape, module.rank)
    if (module.a.shape, module.b.shape) != shapes:
        yield (
            f"module {name!r} has A {module.a.shape} and B {module.b.shape}, the model takes "
            f"{shapes[0]} and {shapes[1]}"
        )
    if module.bias is not None:
        yield f"module {name!r} has a bias on B, which a plan can't hold"


def _row_misfits(name: str, found: RowAdapter, tree: Tree) -> Iterator[str]:
    spot = tree.spot(name)
    if spot is None or spot.rule.kind != "embedding" or spot.rule.stack:
        yield f"rows of {name!r} are trained, which is no embedding table of the model"
        return
    vocabulary, features = tree.leaves[spot.rule.path].shape
    if found.rows.shape[1] != features:
        yield f"rows of {name!r} are {found.rows.shape}, the model's have {features} features"
    if outside := [index for index in found.indices if not 0 <= index < vocabulary]:
        yield f"rows {listed(map(str, outside))} are outside the {vocabulary} of {name!r}"
    if len({*found.indices}) < len(found.indices):
        yield f"rows of {name!r} are named twice: {listed(map(str, found.indices))}"


def _sharing_problems(file: FileAdapter, tree: Tree) -> Iterator[str]:
    trained = () if file.shares_tables else (*file.modules, *file.rows, *file.whole)
    for spot in filter(None, map(tree.spot, trained)):
        if sharers := tree.sharers(spot.rule):
            yield (
                f"{spot.rule.path!r} is also the weight of {', '.join(sharers)}, which a "
                f"{file.format} file leaves as it was: untie the base's weights"
            )


def _pair_problems(site: Site, entry: Any, rule: Rule) -> Iterator[str]:
    if kind_of(rule, len(site.shape)) is None:
        yield f"{site.path!r} is not the weight of a linear, embedding or convolution layer"
    elif site.roles != (expected := roles(rule, len(site.shape))):
        yield f"{site.path!r} has axis roles {site.roles}, the {rule.kind} weight has {expected}"
    elif site.variant == "dora" and 0 in site.ranks:
        yield f"{site.path!r} has DoRA magnitudes in layers of rank 0, where a file has no adapter"
    elif any(_is_filled_beyond(site, layer, entry) for layer in range(len(site.ranks))):
        yield f"{site.path!r} holds values beyond its ranks {site.ranks}, expected zeros"


def _is_filled_beyond(site: Site, layer: int, entry: Any) -> bool:
    a, b, rank = np.asarray(entry.a[layer]), np.asarray(entry.b[layer]), site.ranks[layer]
    deeper = (slice(None),) * (len(site.dims("stack")) - 1)
    return bool(a[..., rank:].any() or b[(*deeper, slice(rank, None))].any())
