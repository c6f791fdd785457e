"""Finding out how each weight is used, by tracing the model function on shapes alone.

The tree before and after, for a function ``model_fn(params, x)`` with one dense layer:

    params                                adapter = init(key, params, plan)
    {"dense": {"kernel": (8, 4),          {"dense/kernel": LoraPair(a=(8, 2), b=(2, 4))}
               "bias": (4,)}}

>>> import jax, jax.numpy as jnp
>>> import lora_jax as lora
>>> def model_fn(params, x):
...     return jnp.tanh(x @ params["dense"]["kernel"] + params["dense"]["bias"])
>>> params = {"dense": {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}}
>>> x = jnp.ones((3, 8))
>>> config = lora.LoraConfig(rank=2, alpha=4, targets=r".*kernel")
>>> plan = lora.plan(model_fn, params, x, config=config)
>>> plan["dense/kernel"].roles, plan["dense/kernel"].scale
(('in', 'out'), 2.0)
"""

import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapter import LoraPair
from lora_jax.config import LoraConfig, Rule, scale_of
from lora_jax.errors import InputError
from lora_jax.paths import named_leaves, nearest
from lora_jax.rewrite.walk import Note, Traced, Walk, trace
from lora_jax.rewrite.weight import NotLowRank, RolesContradict, symbolic_weight
from lora_jax.site import Plan, Role, Site, Use


def plan(
    model_fn: Callable[..., Any],
    params: Any,
    *args: Any,
    config: LoraConfig,
    strict: bool = False,
    **kwargs: Any,
) -> Plan:
    """Decide which weights of ``model_fn(params, *args, **kwargs)`` are adapted, and how.

    The function is traced on shapes: nothing is computed, and ``params`` and the arguments may
    be ``jax.ShapeDtypeStruct`` trees. An axis that is contracted with an activation is an
    ``in`` axis, one that remains an ``out`` axis, one that is looped, indexed or batched over a
    ``stack`` axis. A weight that is used twice has one entry, and the first use decides which
    side is ``in``.

    Args:
      model_fn: any traceable function whose first argument is the parameter tree.
      params: the base parameter tree.
      *args, **kwargs: the other arguments of ``model_fn``. Leaves that are not arrays are
        static.
      config: targets, rank, scale and initialiser.
      strict: refuse weights that some operation needs merged (W + ΔW) at its place.

    ``config`` and ``strict`` are this function's own: a model function with keywords of these
    names is planned as ``functools.partial(model_fn, strict=...)``.

    Returns:
      The plan: frozen, hashable, ``{path: Site}``.

    Raises:
      InputError: naming every target that matches no leaf, every matched leaf that the function
        never reads, that is not floating, whose roles can't be told, whose uses contradict each
        other, or whose rank exceeds what the weight allows.
    """
    leaves = {path: leaf for path, leaf in named_leaves(params).items() if hasattr(leaf, "dtype")}
    sites, problems = _matched_sites(leaves, config)
    traced = trace(model_fn, params, args, kwargs)
    sites, more = _with_roles(sites, _seen(traced, sites), config)
    problems += more or _rank_problems(sites)
    if not problems:
        sites, problems = _with_uses(sites, _seen(traced, sites), strict)
    _raise_all(problems)
    return Plan(tuple(sites), _parameters(leaves))


def plan_from_axes(params: Any, config: LoraConfig, axes: Mapping[str, str]) -> Plan:
    """A plan from declared axis roles, where there is no function to trace.

    Args:
      params: the base parameter tree (arrays or shapes).
      config: targets, rank, scale and initialiser.
      axes: regular expression over leaf paths to roles, as in ``{".*kernel": "stack in out"}``.

    Raises:
      InputError: a target matches no leaf, or a targeted leaf has no declared roles, or as many
        roles as it has no axes.

    >>> params = {"q": jax.ShapeDtypeStruct((4, 6), jnp.float32)}
    >>> plan_from_axes(params, LoraConfig(rank=2, targets="q"), {"q": "in out"})["q"].a_shape
    (4, 2)
    """
    leaves = named_leaves(params)
    config = replace(config, axes=(*config.axes, *axes.items()))
    sites, problems = _matched_sites(leaves, config)
    sites, more = _with_roles(sites, {}, config)
    _raise_all(problems + (more or _rank_problems(sites)))
    return Plan(tuple(sites), _parameters(leaves))


def _matched_sites(leaves: dict[str, Any], config: LoraConfig) -> tuple[list[Site], list[str]]:
    matched = {path: config.rule_for(path) for path in leaves}
    problems = [*_idle_patterns(leaves, config), *_idle_rules(matched, config)]
    sites = [_bare_site(path, leaves[path], rule, config) for path, rule in matched.items() if rule]
    problems += [
        f"{site.path!r} is {site.dtype}, only floating weights can be adapted: exclude it"
        for site in sites
        if not jnp.issubdtype(site.dtype, jnp.floating)
    ]
    return sites, problems


def _idle_patterns(leaves: Iterable[str], config: LoraConfig) -> Iterable[str]:
    """Patterns of whatever kind that match nothing."""
    kinds = {
        "target": [rule.pattern for rule in config.rules],
        "exclude": config.exclude_patterns,
        "axes": [pattern for pattern, _ in config.axes],
    }
    for kind, patterns in kinds.items():
        for pattern in patterns:
            if not any(re.fullmatch(pattern, path) for path in leaves):
                near = _nearest_to(pattern, leaves)
                yield f"{kind} {pattern!r} matches no leaf (nearest: {near})"


def _idle_rules(matched: Mapping[str, Rule | None], config: LoraConfig) -> Iterable[str]:
    """Rules that match leaves, all of which an earlier rule or an exclude pattern decides."""
    deciding = set(matched.values())
    for rule in config.rules:
        if rule not in deciding and any(re.fullmatch(rule.pattern, path) for path in matched):
            yield (
                f"target {rule.pattern!r} decides nothing: earlier targets or exclude patterns "
                "take every leaf it matches; put it first, or drop it"
            )


def _bare_site(path: str, leaf: Any, rule: Rule, config: LoraConfig) -> Site:
    scale = scale_of(rule, config.use_rslora)
    dtype = jnp.dtype(leaf.dtype).name
    shape, rank = tuple(leaf.shape), rule.rank or 0
    settings = {"init": rule.init, "init_std": rule.init_std, "dropout": rule.dropout}
    return Site(path, shape, dtype, (), rank, scale, **settings)


def _seen(traced: Traced, sites: list[Site]) -> dict[str, list[Note]]:
    """Walk the function on shapes; what is seen of each leaf, in program order."""
    seen: dict[Hashable, Note] = {}
    walk = Walk(seen)
    pairs = {site.path: _pair_shapes(site) for site in sites if site.roles}

    def run(leaves: dict[str, Any], others: list[Any], pairs: dict[str, LoraPair]) -> Any:
        weights = {
            site.path: symbolic_weight(site, leaves[site.path], pairs.get(site.path))
            for site in sites
        }
        return traced._replace(leaves=leaves, others=others).run(walk, weights)

    jax.eval_shape(run, traced.leaves, traced.others, pairs)
    notes = list(seen.values())
    return {site.path: [note for note in notes if note.path == site.path] for site in sites}


def _pair_shapes(site: Site) -> LoraPair:
    shapes = site.a_shape, site.b_shape
    return LoraPair._make(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)


def _with_roles(
    sites: list[Site], seen: Mapping[str, list[Note]], config: LoraConfig
) -> tuple[list[Site], list[str]]:
    found = {site.path: _roles(site, seen.get(site.path, []), config) for site in sites}
    problems = [f"{path!r} {roles}" for path, roles in found.items() if isinstance(roles, str)]
    known = [replace(s, roles=found[s.path]) for s in sites if not isinstance(found[s.path], str)]
    return known, problems


def _roles(site: Site, notes: list[Note], config: LoraConfig) -> tuple[Role, ...] | str:
    """The role of each axis, or what is wrong."""
    declared = config.roles_for(site.path)
    if declared is not None:
        wrong = f"has {len(site.shape)} axes, but the declared roles are {declared}"
        return declared if len(declared) == len(site.shape) else wrong
    if not notes:
        return "is never read by the function (or no axes are declared for it): drop the target"
    inputs, outputs = _in_and_out(notes)
    if not inputs or not outputs:
        return (
            f"of shape {site.shape} is never contracted with an activation, so its axes have no "
            "roles: drop the target, or declare axes=((pattern, 'in out'),)"
        )
    roles: tuple[Role, ...] = tuple(_role(axis, inputs, outputs) for axis in range(len(site.shape)))
    return roles


def _role(axis: int, inputs: frozenset[int], outputs: frozenset[int]) -> Role:
    return "in" if axis in inputs else "out" if axis in outputs else "stack"


def _in_and_out(notes: list[Note]) -> tuple[frozenset[int], frozenset[int]]:
    """From the first use that tells; two axes that no product tells apart are (in, out)."""
    for note in notes:
        if note.meeting and not note.meeting.contracted & note.meeting.free:
            return note.meeting.contracted, note.meeting.free
    axes = sorted(notes[0].present)
    return (frozenset(axes[:1]), frozenset(axes[1:])) if len(axes) == 2 else (_NONE, _NONE)


_NONE: frozenset[int] = frozenset()


def _rank_problems(sites: list[Site]) -> list[str]:
    return [
        f"{site.path!r}: rank {site.rank} exceeds {limit}, the smaller side of its "
        f"{site.fan_in} x {site.fan_out} matrix: lower the rank"
        for site in sites
        if site.rank > (limit := min(site.fan_in, site.fan_out))
    ]


def _with_uses(
    sites: list[Site], seen: dict[str, list[Note]], strict: bool
) -> tuple[list[Site], list[str]]:
    problems = [
        _contradiction(site, note)
        if isinstance(note.refusal, RolesContradict)
        else f"{site.path!r} is merged at {note.where}: it {note.refusal}"
        for site in sites
        for note in seen[site.path]
        if isinstance(note.refusal, NotLowRank if strict else RolesContradict)
    ]
    problems += [
        f"{site.path!r} has dropout, which can't act at {note.where}, where it is merged: "
        "set it to 0 there"
        for site in sites
        for note in seen[site.path]
        if site.dropout and note.refusal
    ]
    used = [replace(site, uses=tuple(map(_use, seen[site.path]))) for site in sites]
    return used, problems


def _contradiction(site: Site, note: Note) -> str:
    return (
        f"{site.path!r} has roles {' '.join(site.roles)}, but {note.operation} at {note.where} "
        f"{note.refusal}: exclude it, or declare roles that fit every use"
    )


def _use(note: Note) -> Use:
    return Use(note.operation, note.where, str(note.refusal or ""))


def _nearest_to(pattern: str, leaves: Iterable[str]) -> str:
    words = re.sub(r"[^\w/]+", "", pattern)
    return ", ".join(nearest(words, leaves) or sorted(leaves)[:3])


def _parameters(leaves: dict[str, Any]) -> int:
    return sum(leaf.size for leaf in leaves.values())


def _raise_all(problems: list[str]) -> None:
    if problems:
        raise InputError("no plan could be made: " + "; ".join(problems))
