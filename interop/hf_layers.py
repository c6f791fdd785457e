"""What ``config.json`` says of single layers <-> `LayerKind`: windows and rotations."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from interop.hf_attributes import Attribute
from interop.hf_rope import (
    FULL,
    LAYER_TYPES,
    SLIDING,
    RopeScheme,
    rope_attributes,
    rope_faults,
    rope_of,
    stretches,
)
from lora_jax.models.forms import LayerKind, Rope

Found = Mapping[str, Any]


class LayerScheme(NamedTuple):
    """How a family's layers differ.

    Attributes:
      rope: how they rotate; None: not at all.
      windowed: which layers have a window where ``layer_types`` doesn't say it.
      attributes: what it reads, besides those of the rotations.
    """

    rope: RopeScheme | None
    windowed: Callable[[Found], Sequence[bool]] = lambda found: [False] * _count(found)
    attributes: tuple[Attribute, ...] = ()

    @property
    def handled(self) -> tuple[Attribute, ...]:
        """Every attribute that it reads."""
        return (*self.attributes, *(self.rope.attributes if self.rope else ()))


def _count(found: Found) -> int:
    return found["num_hidden_layers"]


def _sliding(default: int | None) -> Attribute:
    return Attribute("sliding_window", None, default=default, nullable=True, above=0)


_USED = Attribute("use_sliding_window", None, (bool,), False)
_STRETCHED = "inference_rope_scaling"
_TYPES = Attribute("layer_types", None, (list,), items=(str,))


def never(rope: RopeScheme | None) -> LayerScheme:
    """No windows."""
    return LayerScheme(rope)


def never_unless_said(rope: RopeScheme) -> LayerScheme:
    """No windows; rotations are stretched only together with ``inference_rope_scaling``."""
    return LayerScheme(rope, attributes=(Attribute(_STRETCHED, None, (bool,), False),))


def always(rope: RopeScheme, window: int | None) -> LayerScheme:
    """Every layer has the window, if there is one."""
    return LayerScheme(
        rope,
        lambda found: [found["sliding_window"] is not None] * _count(found),
        (_sliding(window),),
    )


def if_used(rope: RopeScheme, window: int) -> LayerScheme:
    """If ``use_sliding_window`` says so, every layer has the window."""

    def windowed(found: Found) -> list[bool]:
        used = found["use_sliding_window"] and found["sliding_window"] is not None
        return [used] * _count(found)

    return LayerScheme(rope, windowed, (_USED, _sliding(window)))


def late(rope: RopeScheme, window: int, first: int) -> LayerScheme:
    """If at all, the layers from ``max_window_layers`` on have a window."""

    def windowed(found: Found) -> list[bool]:
        used = found["use_sliding_window"] and found["sliding_window"] is not None
        return [used and layer >= found["max_window_layers"] for layer in range(_count(found))]

    counted = Attribute("max_window_layers", None, default=first)
    return LayerScheme(rope, windowed, (_USED, _sliding(window), counted, _TYPES))


def alternating(rope: RopeScheme, window: int, period: int, *, said: bool = False) -> LayerScheme:
    """All but every ``period``-th layer have the window; files may say another period."""

    def windowed(found: Found) -> list[bool]:
        every = found.get("sliding_window_pattern", period)
        return [bool((n + 1) % every) for n in range(_count(found))]

    pattern = (Attribute("sliding_window_pattern", None, default=period, above=0),) if said else ()
    return LayerScheme(rope, windowed, (_sliding(window), *pattern, _TYPES))


def unrotated(rope: RopeScheme, period: int) -> LayerScheme:
    """Every ``period``-th layer rotates nothing; those may have a window."""

    def windowed(found: Found) -> list[bool]:
        used = found["use_sliding_window"] and found["sliding_window"] is not None
        return [bool(used and not rotates) for rotates in found["no_rope_layers"]]

    def rotating(found: Found) -> list[int]:
        every = found["no_rope_layer_interval"]
        return [int((layer + 1) % every != 0) for layer in range(_count(found))]

    which = Attribute("no_rope_layers", None, (list,), rotating, items=(int,))
    interval = Attribute("no_rope_layer_interval", None, default=period, above=0)
    return LayerScheme(rope, windowed, (_USED, _sliding(None), interval, which, _TYPES))


def layer_faults(scheme: LayerScheme, given: Found, found: Found) -> list[str]:
    """What keeps the layers from being what the attributes describe.

    Args:
      scheme: of the family.
      given: the file's attributes that aren't null.
      found: the same with all defaults.
    """
    wrong = []
    for name in ("layer_types", "no_rope_layers"):
        value = found.get(name)
        if value is not None and len(value) != _count(found):
            wrong.append(f"{name}={value!r} (num_hidden_layers={_count(found)})")
    types = found.get("layer_types") or []
    if unknown := sorted(set(types) - {*LAYER_TYPES}):
        wrong.append(f"layer_types={types!r} (unknown: {', '.join(map(repr, unknown))})")
    if SLIDING in types and _window(found) is None:
        wrong.append(f"layer_types={types!r} (there is no sliding_window, or it isn't used)")
    if not types and _window(found) is None and any(scheme.windowed(found)):
        wrong.append("sliding_window=None (layers have one where there are no layer_types)")
    if scheme.rope is not None:
        kinds = LAYER_TYPES if scheme.rope.local_theta else (FULL,)
        wrong += [fault for kind in kinds for fault in rope_faults(scheme.rope, given, kind)]
    said = found.get(_STRETCHED)
    if scheme.rope is not None and not wrong and said is not None:
        stretched = stretches(scheme.rope, given, FULL)
        if said != stretched:
            wrong.append(f"{_STRETCHED}={said!r} (known: {stretched!r}, beside these rotations)")
    return wrong


def layer_kinds(scheme: LayerScheme, given: Found, found: Found) -> tuple[LayerKind, ...]:
    """The kinds of the layers, shortest repetition first; the attributes have no faults."""
    types, count = found.get("layer_types"), _count(found)
    windowed = [kind == SLIDING for kind in types] if types else scheme.windowed(found)
    rotates = [
        scheme.rope is not None and bool(n) for n in found.get("no_rope_layers", [1] * count)
    ]
    outside = ("max_position_embeddings", "original_max_position_embeddings")
    context = {**given, **{name: found[name] for name in outside if name in found}}
    ropes = {
        kind: rope_of(scheme.rope, context, kind) if scheme.rope else None for kind in LAYER_TYPES
    }
    kinds = [
        LayerKind(
            rope=ropes[SLIDING if window else FULL] if turns else None,
            window=_window(found) if window else None,
        )
        for window, turns in zip(windowed, rotates, strict=True)
    ]
    return _repeated(kinds)


def layer_attributes(scheme: LayerScheme, kinds: Sequence[LayerKind]) -> dict[str, Any]:
    """What `layer_kinds` reads as these kinds of all layers, as far as the family can say it."""
    windows = [kind.window for kind in kinds]
    ropes = {
        windowed: next(
            (k.rope for k in kinds if k.rope and (k.window is not None) == windowed), None
        )
        for windowed in (False, True)
    }
    said = {
        "use_sliding_window": any(windows),
        "sliding_window": next(filter(None, windows), None),
        "max_window_layers": next((n for n, w in enumerate(windows) if w), len(windows)),
        "no_rope_layers": [int(kind.rope is not None) for kind in kinds],
        _STRETCHED: any(kind.rope and kind.rope.scaling for kind in kinds),
        "layer_types": [SLIDING if window else FULL for window in windows],
    }
    names = {attribute.name for attribute in scheme.attributes}
    windowing = {name: value for name, value in said.items() if name in names}
    if scheme.rope is None:
        return windowing
    full = ropes[False] or ropes[True] or Rope(scheme.rope.theta)
    sliding = ropes[True] or Rope(scheme.rope.local_theta or full.theta)
    return windowing | rope_attributes(scheme.rope, full, sliding)


def _window(found: Found) -> int | None:
    return found.get("sliding_window") if found.get("use_sliding_window", True) else None


def _repeated(kinds: Sequence[LayerKind]) -> tuple[LayerKind, ...]:
    """The shortest beginning that, over and over again, gives all."""
    count = len(kinds)
    periods = (
        p for p in range(1, count + 1) if all(kinds[n] == kinds[n % p] for n in range(count))
    )
    return tuple(kinds[: next(periods, 0)])
