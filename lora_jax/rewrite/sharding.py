"""Through shard_map: each device holds its shard of W and the matching shards of A and B.

A factor's axis is sharded as the view's axis of the same label is, the rank axis never. To add a
rule: write it and give it a row in `SHARDING`.
"""

from dataclasses import replace
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec

from lora_jax.rewrite.views import same_axes
from lora_jax.rewrite.weight import Factor, NotLowRank, Weight


def shard_map(walk, eqn, *inputs):
    """jax.shard_map around the rewritten body; weights leave it as arrays.

    Dropout's masks follow the shards of its input. Where JAX doesn't track them
    (``check_vma=False``) they differ along the mesh axes that every output is sharded over.
    """
    params = eqn.params
    checked, out_specs = params["check_vma"], tuple(params["out_specs"])
    own_masks = () if checked else _in_every(out_specs)

    def body(*shards: Any) -> tuple[Any, ...]:
        inside = walk.at(lax.axis_index(own_masks)) if own_masks else walk
        return tuple(inside.plain_function(params["jaxpr"], eqn)(*shards))

    return jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=tuple(map(_specs, inputs, params["in_specs"])),
        out_specs=out_specs,
        axis_names=params["newly_manual_axes"],
        check_vma=checked,
    )(*inputs)


def all_gather(walk, eqn, weight):
    """Gather the factors that carry the gathered axis, where the others are the same everywhere."""
    params = eqn.params
    if not params["tiled"]:
        raise NotLowRank("is gathered along a new axis")
    [value] = walk.bind(eqn, weight.value)
    label = weight.labels[params["all_gather_dimension"]]
    names, groups = params["axis_name"], params["axis_index_groups"]

    def gathered(array: jax.Array, at: int) -> jax.Array:
        return lax.all_gather(array, names, axis=at, axis_index_groups=groups, tiled=True)

    def gather(factor: Factor) -> Factor:
        if label not in factor.labels and not _is_same_over(names, factor, weight):
            raise NotLowRank("is gathered where its shards may differ along another axis")
        return factor.along(label, gathered)

    return [weight.map_factors(gather).viewed(value)]


SHARDING = {
    "shard_map": shard_map,
    "pvary": same_axes,
    "pcast": same_axes,
    "all_gather": all_gather,
}


def _specs(x: Any, spec: PartitionSpec) -> Any:
    if not isinstance(x, Weight):
        return spec
    names = dict(zip(x.labels, spec, strict=False))

    def factor_spec(factor: Factor) -> Any:
        return replace(factor, array=PartitionSpec(*map(names.get, factor.labels)))

    return replace(x.map_factors(factor_spec), value=spec)


def _in_every(specs: tuple[PartitionSpec, ...]) -> tuple[str, ...]:
    """The mesh axes that each of the specs shards something over."""
    named = [{name for entry in spec for name in _names(entry)} for spec in specs]
    return tuple(sorted(set.intersection(*named))) if named else ()


def _names(entry: Any) -> tuple[str, ...]:
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


def _is_same_over(names: tuple[str, ...], factor: Factor, weight: Weight) -> bool:
    """Whether JAX knows that devices along these mesh axes hold the same factor."""
    tracked = set(names) <= varying(weight.value)
    return tracked and not varying(factor.array) & set(names)


def varying(x: Any) -> frozenset[str]:
    """The mesh axes along which JAX knows the shards of ``x`` to differ."""
    return jax.typeof(x).manual_axis_type.varying
