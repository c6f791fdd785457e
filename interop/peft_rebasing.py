"""PiSSA and OLoRA, saved as they were trained: against a base that they took their start off.

PEFT computes W − s·B₀A₀ + s·BA, with A₀ and B₀ from W itself, so the plain LoRA against the
original W is twice as wide: A' = [A; A₀], B' = [B, −B₀].

=========  ==============================  =======================================
init       A₀                              B₀
=========  ==============================  =======================================
``pissa``  √(S/s) Vᵀ of the r largest      U √(S/s)
``olora``  the first r rows of R           the first r columns of Q, where W = Q R
=========  ==============================  =======================================

Sources: Meng et al., arXiv:2404.02948; Büyükakyüz, arXiv:2406.01775; and PEFT 0.21.2, which does
this to linear layers alone.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import jax
import numpy as np

from interop.peft_claims import Claims
from interop.peft_layout import is_pair, places, put, setting_of, taken, whole_place
from interop.peft_matching import PeftConfig, Setting
from interop.peft_modules import Base
from lora_jax.errors import InputError
from lora_jax.site import Site

Arrays = Mapping[str, Mapping[str, np.ndarray]]
Start = Callable[[np.ndarray, Setting], tuple[np.ndarray, np.ndarray]]
"""A₀ (rank, in) and B₀ (out, rank) of a weight (out, in)."""

_RELATIVE_GAP = 1e-5
"""Of singular values: closer ones span a plane, in which rounding decides the direction."""


_KINDS = {"pissa": ("linear", "linear_in_out"), "olora": ("linear",)}
"""OLoRA in PEFT forgets that a `Conv1D` is (in, out)."""


def rebasing_problems(config: PeftConfig, claims: Claims, base: Base) -> Iterator[str]:
    """Targets that don't start from their weights in PEFT, or whose weights aren't here."""
    fits = _KINDS[str(config.init_lora_weights)]
    for path in claims.pair:
        kind = base.kind(path)
        if kind != "embedding" and kind not in fits:
            yield (
                f"init_lora_weights is {config.init_lora_weights!r}, which PEFT has no form of for "
                f"{path!r}, of kind {kind}"
            )
        elif kind != "embedding" and isinstance(base.leaves[path], jax.ShapeDtypeStruct):
            yield (
                f"init_lora_weights is {config.init_lora_weights!r}, which starts from the values "
                f"of {path!r}: give params, not shapes"
            )


def against_the_original(
    config: PeftConfig, sites: tuple[Site, ...], arrays: Arrays, base: Base
) -> tuple[tuple[Site, ...], Arrays]:
    """The same function on the base as it was before the first update was taken off it.

    Raises:
      InputError: a weight whose largest singular vectors its values don't determine.
    """
    start = _STARTS[str(config.init_lora_weights)]
    wide = {
        site.path: replace(site, rank=2 * site.rank, ranks=tuple(2 * rank for rank in site.ranks))
        for site in sites
        if is_pair(site) and base.kind(site.path) != "embedding"
    }
    doubled = {
        site.path: _doubled(site, wide[site.path], arrays[site.path], base, start)
        for site in sites
        if site.path in wide
    }
    return tuple(wide.get(site.path, site) for site in sites), {**arrays, **doubled}


def _doubled(
    site: Site, wide: Site, arrays: Mapping[str, np.ndarray], base: Base, start: Start
) -> dict[str, np.ndarray]:
    rule, leaf = base.rules[site.path], np.asarray(base.leaves[site.path])
    new = {name: np.zeros(shape, np.float32) for name, shape in wide.entry_shapes.items()}
    new |= {name: array for name, array in arrays.items() if name not in ("a", "b")}
    found = {(p.index, p.field): p for p in places(site, base, ())}
    for place in places(wide, base, ()):
        if place.field not in ("a", "b"):
            continue
        weight = taken(leaf, whole_place(rule, site.shape, place.index, place.name))
        in_torch = weight.T if rule.kind == "linear_in_out" else weight
        try:
            a, b = start(in_torch.astype(np.float64), setting_of(site, place.index))
        except ValueError as error:
            raise InputError(f"{place.name.removesuffix('.lora_A.weight')}: {error}") from error
        own = taken(arrays[place.field], found[place.index, place.field])
        both = np.concatenate([own, a], 0) if place.field == "a" else np.concatenate([own, -b], 1)
        put(new[place.field], place, both)
    return new


def _pissa(weight: np.ndarray, setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    rank, scale = setting
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    if rank < len(s) and s[rank - 1] - s[rank] < _RELATIVE_GAP * s[0]:
        raise ValueError(
            f"its singular values {rank} and {rank + 1} are equal, so that what PiSSA took off the "
            "base can't be told: have PEFT convert the adapter to a plain LoRA"
        )
    root = np.sqrt(s[:rank] / scale)
    return root[:, None] * vt[:rank], u[:, :rank] * root


def _olora(weight: np.ndarray, setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    q, r = np.linalg.qr(weight)
    return r[: setting.rank], q[:, : setting.rank]


_STARTS: dict[str, Start] = {"pissa": _pissa, "olora": _olora}
