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

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import Any

import jax

from lora_jax.adapter import Adapter, dtype_name, shapes_of
from lora_jax.config import LoraConfig
from lora_jax.errors import InputError
from lora_jax.paths import named_leaves
from lora_jax.rewrite.walk import Note, Traced, Walk, trace
from lora_jax.rewrite.weight import NotLowRank, RolesContradict, symbolic_weight
from lora_jax.selection import (
    Roles,
    is_floating,
    raise_all,
    require_config,
    select,
)
from lora_jax.site import Plan, Role, Site, Use
from lora_jax.targets import PRESETS, Leaf, matches
from lora_jax.variants import factors_of


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
    require_config(config)
    if not callable(model_fn):
        raise InputError(
            f"model_fn is a {type(model_fn).__name__}: the function comes first, then its params"
        )
    leaves = _arrays(params)
    traced = trace(model_fn, params, args, kwargs)
    watched = [
        _unplanned(path, leaf) for path, leaf in leaves.items() if _watched(path, leaf, config)
    ]
    seen = _seen(traced, watched)
    unread = {path: _why_unread(path, traced) for path, notes in seen.items() if not notes}
    known = {s.path: _roles(s, seen[s.path], config) for s in watched if s.path not in unread}
    candidates = [_candidate(path, leaf, known, seen) for path, leaf in leaves.items()]
    sites, problems = select(candidates, {**known, **unread}, config, unread)
    raise_all(problems)
    with_factors = [site for site in sites if not site.is_whole]
    sites, problems = _with_uses(sites, {**seen, **_seen(traced, with_factors)}, strict)
    raise_all(problems)
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

    >>> params = {"q": jax.ShapeDtypeStruct((4, 6), "float32")}
    >>> plan_from_axes(params, LoraConfig(rank=2, targets="q"), {"q": "in out"})["q"].a_shape
    (4, 2)
    """
    require_config(config)
    if not isinstance(axes, Mapping):
        raise InputError(f"axes is {axes!r}: give a mapping such as {{'.*kernel': 'in out'}}")
    leaves = _arrays(params)
    config = replace(config, axes=(*config.axes, *axes.items()))
    known = {path: _declared(path, leaf, config) for path, leaf in leaves.items()}
    sites, problems = select(
        [_candidate(*item, known, {}) for item in leaves.items()], known, config
    )
    raise_all(problems)
    return Plan(tuple(sites), _parameters(leaves))


def _arrays(params: Any) -> dict[str, Any]:
    return {path: leaf for path, leaf in named_leaves(params).items() if hasattr(leaf, "dtype")}


def _watched(path: str, leaf: Any, config: LoraConfig) -> bool:
    """Whether some rule may pick the leaf once its use is known."""
    if not is_floating(leaf):
        return False
    targets = [rule.target for rule in config.rules]
    return any(matches(target, Leaf(path, leaf)) for target in targets) or (
        len(leaf.shape) > 1 and any(target in PRESETS for target in targets)
    )


def _unplanned(path: str, leaf: Any) -> Site:
    return Site(path, tuple(leaf.shape), dtype_name(leaf), (), 0, 1.0)


def _candidate(
    path: str, leaf: Any, known: Mapping[str, Roles], seen: Mapping[str, list[Note]]
) -> Leaf:
    """The leaf with the matrix that it is, if it is contracted and never looked up by rows."""
    roles, notes = known.get(path, ""), seen.get(path)
    contracted = notes is None or any(note.meeting for note in notes)
    looked_up = any(note.meeting and note.operation == "gather" for note in notes or ())
    if isinstance(roles, str) or not contracted or looked_up:
        return Leaf(path, leaf)
    site = replace(_unplanned(path, leaf), roles=roles)
    return Leaf(path, leaf, (site.fan_in, site.fan_out))


def _seen(traced: Traced, sites: list[Site]) -> dict[str, list[Note]]:
    """Walk the function on shapes; what is seen of each leaf, in program order."""
    seen: dict[Hashable, Note] = {}
    walk = Walk(seen)
    planned = Plan(tuple(site for site in sites if site.roles), 0)

    def run(leaves: dict[str, Any], others: list[Any], adapter: Adapter) -> None:
        weights = {
            site.path: symbolic_weight(site, leaf, _factors(site, leaf, adapter))
            for site in sites
            for leaf in [leaves[site.path]]
        }
        traced._replace(leaves=leaves, others=others).run(walk, weights)

    jax.eval_shape(run, traced.leaves, traced.others, shapes_of(planned))
    notes = list(seen.values())
    return {site.path: [note for note in notes if note.path == site.path] for site in sites}


def _factors(site: Site, leaf: Any, adapter: Adapter) -> Any:
    return factors_of(site, leaf, adapter[site.path]) if site.path in adapter else None


def _roles(site: Site, notes: list[Note], config: LoraConfig) -> Roles:
    """The role of each axis, or why there are none."""
    if config.roles_for(site.path) is not None:
        return _declared(site.path, site, config)
    inputs, outputs = _in_and_out(notes)
    if not inputs or not outputs:
        return (
            f"of shape {site.shape} is never contracted with an activation, so its axes have no "
            "roles: drop the target, declare axes=((pattern, 'in out'),), or train it whole with "
            "Rule(pattern, variant='full')"
        )
    roles: tuple[Role, ...] = tuple(_role(axis, inputs, outputs) for axis in range(len(site.shape)))
    return roles


def _declared(path: str, leaf: Any, config: LoraConfig) -> Roles:
    declared = config.roles_for(path)
    if declared is None:
        return "has no declared axis roles: add them to axes, or drop the target"
    wrong = f"has {len(leaf.shape)} axes, but the declared roles are {declared}"
    return declared if len(declared) == len(leaf.shape) else wrong


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


def _why_unread(path: str, traced: Traced) -> str:
    if any(const is traced.leaves[path] for const in traced.jaxpr.consts):
        return (
            "is closed over: the function uses the array itself instead of reading it from its "
            "first argument, so no adapter can reach it"
        )
    return "is never read by the function: drop the target"


def _with_uses(
    sites: list[Site], seen: Mapping[str, list[Note]], strict: bool
) -> tuple[list[Site], list[str]]:
    """The sites with what became of each use; a leaf trained whole has no form to lose."""
    adapted = [site for site in sites if not site.is_whole]
    problems = [
        _contradiction(site, note)
        if isinstance(note.refusal, RolesContradict)
        else f"{site.path!r} is merged at {note.where}: it {note.refusal}"
        for site in adapted
        for note in seen[site.path]
        if isinstance(note.refusal, NotLowRank if strict else RolesContradict)
    ]
    problems += [
        f"{site.path!r} has dropout, which can't act at {note.where}, where it is merged: "
        "set it to 0 there"
        for site in adapted
        for note in seen[site.path]
        if site.dropout and note.refusal
    ]
    problems = list(dict.fromkeys(problems))  # One line may read a weight twice.
    used = [replace(site, uses=_uses(seen[site.path], not site.is_whole)) for site in sites]
    return used, problems


def _contradiction(site: Site, note: Note) -> str:
    return (
        f"{site.path!r} has roles {' '.join(site.roles)}, but {note.operation} at {note.where} "
        f"{note.refusal}: exclude it, or declare roles that fit every use"
    )


def _uses(notes: list[Note], in_factors: bool) -> tuple[Use, ...]:
    refusals = [str(note.refusal or "") if in_factors else "" for note in notes]
    return tuple(
        Use(note.operation, note.where, refusal)
        for note, refusal in zip(notes, refusals, strict=True)
    )


def _parameters(leaves: dict[str, Any]) -> int:
    return sum(math.prod(leaf.shape) for leaf in leaves.values())
