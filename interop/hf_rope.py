"""Rotary settings of ``config.json`` <-> `Rope`, where each version of transformers keeps them.

The base stands in ``rope_theta`` or in ``rope_parameters``, the scaling in ``rope_scaling`` or
in ``rope_parameters``; a model that rotates its windowed layers otherwise has
``rope_local_base_freq``, or one group of ``rope_parameters`` for each type of layer.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from interop.hf_attributes import NUMBER, REQUIRED, Attribute, faults, resolved
from lora_jax.models.forms import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    Rope,
    Scaling,
    YarnScaling,
)

FULL, SLIDING = LAYER_TYPES = ("full_attention", "sliding_attention")
_GROUPS = ("rope_parameters", "rope_scaling")
_ORIGINAL = "original_max_position_embeddings"
_PART = "partial_rotary_factor"


class RopeScheme(NamedTuple):
    """How a family rotates.

    Attributes:
      theta: base where none is given.
      local_theta: base of windowed layers where none is given; None: as of the others.
      original: longest row before stretching, where ``original_max_position_embeddings`` stands
        outside the groups and isn't given; None: it stands in the groups.
      partial: a part of each head may stay as it is.
      renamed: older names of types.
    """

    theta: float = 10_000.0
    local_theta: float | None = None
    original: int | None = None
    partial: bool = False
    renamed: Mapping[str, str] = {}

    @property
    def attributes(self) -> tuple[Attribute, ...]:
        """What may be given."""
        local = (
            (Attribute("rope_local_base_freq", None, NUMBER, above=1),) if self.local_theta else ()
        )
        original = (
            (Attribute(_ORIGINAL, None, default=self.original, above=1),) if self.original else ()
        )
        return (
            *(Attribute(name, None, (dict,)) for name in _GROUPS),
            Attribute("rope_theta", None, NUMBER, above=1),
            Attribute(_PART, None, NUMBER, above=0),
            *local,
            *original,
        )


_OF_ALL_TYPES = (
    Attribute("rope_theta", None, NUMBER, above=1),
    Attribute("rope_type", None, (str,)),
    Attribute("type", None, (str,)),
    Attribute(_PART, None, NUMBER, above=0),
)
_NAMES_OF_ALL_TYPES = frozenset(attribute.name for attribute in _OF_ALL_TYPES)


class _Type(NamedTuple):
    scaling: type[Scaling]
    settings: tuple[Attribute, ...]


_LEAST_FACTOR = 1e-3  # below, float32 frequencies would overflow
_FACTOR = Attribute("factor", "factor", NUMBER, REQUIRED, above=_LEAST_FACTOR)
_CONTEXT = Attribute(
    _ORIGINAL, "original_max_positions", default=lambda found: found["longest"], above=1
)


def _factors(name: str) -> Attribute:
    return Attribute(name, name, (list,), REQUIRED, items=NUMBER, above=_LEAST_FACTOR)


_NULL_IS_NO = ("truncate",)  # where transformers asks for its truth, and absence means yes
_AMPLITUDE = Attribute("attention_factor", "attention_factor", NUMBER)
_TYPES: dict[str, _Type | None] = {
    "default": None,
    "linear": _Type(LinearScaling, (_FACTOR,)),
    "dynamic": _Type(DynamicScaling, (_FACTOR,)),
    "llama3": _Type(
        Llama3Scaling,
        (
            _FACTOR,
            Attribute("low_freq_factor", "low_freq_factor", NUMBER, REQUIRED),
            Attribute("high_freq_factor", "high_freq_factor", NUMBER, REQUIRED),
            _CONTEXT,
        ),
    ),
    "yarn": _Type(
        YarnScaling,
        (
            _FACTOR,
            _CONTEXT,
            _AMPLITUDE,
            Attribute("beta_fast", "beta_fast", NUMBER, 32.0, above=0),
            Attribute("beta_slow", "beta_slow", NUMBER, 1.0, above=0),
            Attribute("mscale", "mscale", NUMBER),
            Attribute("mscale_all_dim", "mscale_all_dim", NUMBER),
            Attribute("truncate", "truncate", (bool,), True),
        ),
    ),
    "longrope": _Type(
        LongScaling,
        (
            _factors("short_factor"),
            _factors("long_factor"),
            _CONTEXT,
            Attribute(
                "factor",
                "factor",
                NUMBER,
                lambda found: found["longest"] / found[_ORIGINAL],
            ),
            _AMPLITUDE,
        ),
    ),
}


def rope_faults(scheme: RopeScheme, given: Mapping[str, Any], layers: str) -> list[str]:
    """What keeps a type of layers from being rotated as ``given``, without nulls, describes."""
    if scheme.local_theta and not _one_group_a_type(given):
        expected = f"expected a group for each of {', '.join(LAYER_TYPES)}"
        return [f"rope_parameters={given['rope_parameters']!r} ({expected})"]
    groups = _groups(scheme, given, layers)
    found = [
        f"{name}={given[name]!r} ({', '.join(wrong)})"
        for name, group in groups.items()
        if (wrong := _group_faults(group, scheme))
    ]
    return found or _contradictions(scheme, given, layers)


def _contradictions(scheme: RopeScheme, given: Mapping[str, Any], layers: str) -> list[str]:
    """What each place says well, and all together don't."""
    groups, thetas = _groups(scheme, given, layers), _thetas(scheme, given, layers)
    parts = {place[_PART] for place in _places(groups, given) if _PART in place}
    said = [_settings(group, scheme) for group in groups.values()]
    found = []
    if (given.get(_PART, 1.0) != 1 and not scheme.partial) or len(parts) > 1:
        found.append(f"{_PART} is {' and '.join(map(str, sorted(parts)))} (known: 1.0)")
    if said[1:] and said[0] != said[1]:
        found += [f"{name}={given[name]!r} (they differ)" for name in groups]
    if len(thetas) > 1:
        found.append(f"rope_theta is {' and '.join(map(str, sorted(thetas)))}")
    return found


def rope_of(scheme: RopeScheme, given: Mapping[str, Any], layers: str) -> Rope:
    """The rotation of a type of layers, from attributes without faults and without nulls."""
    groups, thetas = _groups(scheme, given, layers), _thetas(scheme, given, layers)
    default = scheme.local_theta if layers == SLIDING and scheme.local_theta else scheme.theta
    settings = next((_settings(group, scheme) for group in groups.values()), {})
    parts = (group.get(_PART) for group in _places(groups, given))
    return Rope(
        theta=float(next(iter(thetas), default)),
        scaling=_scaling(settings, given),
        fraction=float(next(filter(None, parts), 1.0)),
    )


def stretches(scheme: RopeScheme, given: Mapping[str, Any], layers: str) -> bool:
    """Whether attributes without faults say that a type of layers has longer waves."""
    return any(
        _type(group, scheme) != "default" for group in _groups(scheme, given, layers).values()
    )


def rope_attributes(scheme: RopeScheme, full: Rope, sliding: Rope) -> dict[str, Any]:
    """What `rope_of` reads as these two, for transformers 5 (``rope_parameters``) and 4."""
    said = {FULL: _written(full), SLIDING: _written(sliding)}
    scaling = {} if full.scaling is None else {"rope_scaling": _without_theta(said[FULL])}
    partial = {} if full.fraction == 1 else {_PART: full.fraction}
    if scheme.original and _ORIGINAL in said[FULL]:
        partial[_ORIGINAL] = said[FULL][_ORIGINAL]
    local = {"rope_local_base_freq": sliding.theta, "rope_parameters": said}
    plain = {"rope_parameters": said[FULL]}
    return {
        "rope_theta": full.theta,
        **scaling,
        **partial,
        **(local if scheme.local_theta else plain),
    }


def _groups(
    scheme: RopeScheme, given: Mapping[str, Any], layers: str
) -> dict[str, Mapping[str, Any]]:
    """What each attribute says of a type of layers."""
    groups = {name: given[name] for name in _GROUPS if name in given}
    if scheme.local_theta and "rope_parameters" in groups:
        groups["rope_parameters"] = groups["rope_parameters"].get(layers) or {}
    if scheme.local_theta and layers == SLIDING:
        groups.pop("rope_scaling", None)
    return {name: _without_nulls(group) for name, group in groups.items()}


def _without_nulls(group: Mapping[str, Any]) -> dict[str, Any]:
    nulls = {key: False for key in _NULL_IS_NO if key in group}
    return nulls | {key: value for key, value in group.items() if value is not None}


def _one_group_a_type(given: Mapping[str, Any]) -> bool:
    groups = given.get("rope_parameters", {})
    return {*groups} <= {*LAYER_TYPES} and all(
        type(g) in (dict, type(None)) for g in groups.values()
    )


def _thetas(scheme: RopeScheme, given: Mapping[str, Any], layers: str) -> set[float]:
    """The bases that are said, which each version of transformers keeps elsewhere."""
    local = scheme.local_theta is not None and layers == SLIDING
    top = given.get("rope_local_base_freq" if local else "rope_theta")
    groups = _groups(scheme, given, layers).values()
    return {theta for theta in (top, *(g.get("rope_theta") for g in groups)) if theta is not None}


def _places(
    groups: Mapping[str, Mapping[str, Any]], given: Mapping[str, Any]
) -> Iterable[Mapping[str, Any]]:
    return (
        {_PART: given[_PART]} if _PART in given else {},
        *groups.values(),
    )


def _type(group: Mapping[str, Any], scheme: RopeScheme) -> str:
    name = group.get("rope_type", group.get("type", "default"))
    return scheme.renamed.get(name, name)


def _settings(group: Mapping[str, Any], scheme: RopeScheme) -> dict[str, Any]:
    """The group in one spelling, without what is said of all types."""
    rest = {key: value for key, value in group.items() if key not in _NAMES_OF_ALL_TYPES}
    return {"rope_type": _type(group, scheme), **rest}


def _group_faults(group: Mapping[str, Any], scheme: RopeScheme) -> list[str]:
    if wrong := faults(_OF_ALL_TYPES, group):
        return wrong
    name, settings = _type(group, scheme), _settings(group, scheme)
    if name not in _TYPES:
        return [f"rope_type {name!r} is none of {', '.join(_TYPES)}"]
    kind = _TYPES[name]
    known = kind.settings if kind else ()
    unknown = set(settings) - {"rope_type", *(each.name for each in known)}
    part = group.get(_PART, 1.0)
    return [
        *(f"{key} says nothing in {name!r}" for key in sorted(unknown)),
        *([f"{_PART}={part} instead of 1.0"] if part != 1 and not scheme.partial else ()),
        *faults(known, group),
    ]


def _scaling(settings: Mapping[str, Any], given: Mapping[str, Any]) -> Scaling | None:
    kind = _TYPES[settings.get("rope_type", "default")]
    if kind is None:
        return None
    longest = given["max_position_embeddings"]
    outside = {key: given[key] for key in (_ORIGINAL,) if key in given}
    values = resolved(
        (Attribute("longest"), *kind.settings), {**settings, **outside, "longest": longest}
    )
    return kind.scaling(**{str(a.field): _hashable(values[a.name]) for a in kind.settings})


def _hashable(value: Any) -> Any:
    return tuple(value) if type(value) is list else value


def _written(rope: Rope) -> dict[str, Any]:
    names = (name for name, kind in _TYPES.items() if kind and type(rope.scaling) is kind.scaling)
    name = next(names, "default")
    kind = _TYPES[name]
    fields = {a.name: getattr(rope.scaling, str(a.field)) for a in kind.settings} if kind else {}
    said = {key: [*v] if type(v) is tuple else v for key, v in fields.items() if v is not None}
    partial = {} if rope.fraction == 1 else {_PART: rope.fraction}
    return {"rope_theta": rope.theta, "rope_type": name, **partial, **said}


def _without_theta(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != "rope_theta"}
