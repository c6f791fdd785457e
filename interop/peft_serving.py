"""Adapters for servers that know one rank and one scale: vLLM and SGLang."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.adapter import Adapter, LoraPair
from lora_jax.site import Plan, Site


def folded(adapter: Adapter, plan: Plan) -> tuple[Adapter, Plan, tuple[str, ...]]:
    """The same function with one rank and one scale for every layer of every site.

    A and B are filled up with zeros to the largest rank. Where scales differ each is multiplied
    into its B, in float32, and the common scale is 1.

    Args:
      adapter: pairs alone, zero beyond the rank of each layer.
      plan: its plan.

    Returns:
      The adapter (float32), its plan, and a sentence for each site that changed.

    >>> site = Site("w", (2, 3), "float32", ("in", "out"), rank=1, scale=3.0)
    >>> pair = LoraPair(np.ones((2, 1)), np.ones((1, 3)))
    >>> wide = Site("v", (2, 3), "float32", ("in", "out"), rank=2, scale=0.5)
    >>> adapter = {"w": pair, "v": LoraPair(np.ones((2, 2)), np.ones((2, 3)))}
    >>> adapter, plan, notes = folded(adapter, Plan((site, wide), 12))
    >>> [(site.rank, site.scale) for site in plan.sites], adapter["w"].b.tolist()
    ([(2, 1.0), (2, 1.0)], [[3.0, 3.0, 3.0], [0.0, 0.0, 0.0]])
    >>> for note in notes: print(note)
    'w': rank 1 filled up with zeros to 2, scale 3 multiplied into B
    'v': scale 0.5 multiplied into B
    """
    rank = max(site.rank for site in plan.sites)
    scales = {scale for site in plan.sites for scale in _scales(site) if scale}
    scale = scales.pop() if len(scales) == 1 else 1.0
    sites = tuple(replace(site, rank=rank, ranks=(), scale=scale) for site in plan.sites)
    pairs: Adapter = {s.path: _folded(adapter[s.path], s, rank, scale) for s in plan.sites}
    notes = (_note(site, rank, scale) for site in plan.sites)
    return pairs, replace(plan, sites=sites), tuple(note for note in notes if note)


def _scales(site: Site) -> tuple[float, ...]:
    return site.scale if isinstance(site.scale, tuple) else (site.scale,)


def _folded(pair: Any, site: Site, rank: int, scale: float) -> LoraPair:
    a, b = (np.asarray(factor, np.float32) for factor in pair[:2])
    ratios = np.array(_scales(site), np.float32) / np.float32(scale)
    b = b * ratios.reshape(-1, *(1,) * (b.ndim - 1)) if len(ratios) > 1 else b * ratios[0]
    more = rank - site.rank
    return LoraPair(_wider(a, a.ndim - 1, more), _wider(b, len(site.dims("stack")), more))


def _wider(factor: np.ndarray, axis: int, more: int) -> jnp.ndarray:
    return jnp.asarray(np.pad(factor, [(0, more * (k == axis)) for k in range(factor.ndim)]))


def _note(site: Site, rank: int, scale: float) -> str:
    ranks = sorted({*site.ranks} or {site.rank})
    scales = [each for each in _scales(site) if each not in (scale, 0)]
    padded = f"rank {_listed(ranks)} filled up with zeros to {rank}" if ranks != [rank] else ""
    multiplied = f"scale {_listed(sorted({*scales}))} multiplied into B" if scales else ""
    changes = ", ".join(filter(None, (padded, multiplied)))
    return f"{site.path!r}: {changes}" if changes else ""


def _listed(values: list[Any]) -> str:
    return ", ".join(f"{value:g}" for value in values)
