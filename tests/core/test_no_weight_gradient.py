"""Where the plan says low-rank, the compiled gradient holds no dW and no W + ΔW: read from HLO."""

from functools import cache
from itertools import groupby

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import lora_jax as lora

import cases
import hlo

RANKS = {"broadcast_weight": 1, "conv_depthwise_nchw": 1}
"""Other than 2 where the function repeats a factor, which then has as many elements as W."""
PRIMES = (11, 13, 17, 19, 23, 29, 31, 37, 41, 43)
MERGED_ROW_BY_ROW = ("scan_of_rows",)
"""Cases whose loop merges a part of the weight at a time, so that nowhere the whole appears."""


def planned(case):
    params = {name: jax.ShapeDtypeStruct(s, jnp.float64) for name, s in case.shapes.items()}
    x = jax.ShapeDtypeStruct(case.x, jnp.float64)
    config = lora.LoraConfig(
        RANKS.get(case.name, 2), alpha=3.0, targets=tuple(case.roles), axes=case.axes
    )
    return params, x, lora.plan(case.model_fn, params, x, config=config)


def merged_paths(plan):
    return {path for path, site in plan.items() if any(use.merged_because for use in site.uses)}


@cache
def widened(name):
    """The case with each size that its function does not insist on made a prime of its own.

    So no activation has as many elements as a weight by chance: a product of primes tells its
    factors.
    """
    case = next(case for case in cases.CASES if case.name == name)
    sizes = {("x", k): size for k, size in enumerate(case.x)}
    for name, shape in case.shapes.items():
        sizes |= {(name, k): size for k, size in enumerate(shape)}
    tied = groupby(sorted(sizes, key=sizes.__getitem__), key=sizes.__getitem__)
    primes = iter(PRIMES)
    prime = next(primes)
    for places in [*([place] for place in sizes), *(list(places) for _, places in tied)]:
        free = [place for place in places if sizes[place] not in PRIMES]
        wider = {**sizes, **dict.fromkeys(free, prime)}
        if free and still_the_case(resized(case, wider)):
            sizes, prime = wider, next(primes)
    return resized(case, sizes)


def resized(case, sizes):
    shapes = {n: tuple(sizes[n, k] for k in range(len(s))) for n, s in case.shapes.items()}
    return case._replace(shapes=shapes, x=tuple(sizes["x", k] for k in range(len(case.x))))


def still_the_case(case):
    try:
        params, x, plan = planned(case)
        outputs = jax.tree.leaves(jax.eval_shape(case.model_fn, params, x))
    except (TypeError, ValueError):
        return False
    roles = {path: " ".join(site.roles) for path, site in plan.items()}
    same = roles == case.roles and merged_paths(plan) == set(case.merged)
    return same and all(output.size for output in outputs)


def scalar(adapted):
    def loss(adapter, params, x):
        return sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(adapted(params, adapter, x)))

    return loss


def adapter_arrays(case, mode="low_rank"):
    """Every array of the compiled gradient (or of the loss) that depends on the adapter."""
    params, x, plan = planned(case)
    adapter = jax.eval_shape(lambda: lora.init(jax.random.key(0), params, plan))
    loss = scalar(lora.adapt(case.model_fn, plan, mode=mode))
    function = loss if "grad" in case.lacks else jax.grad(loss)
    return depending_on_first(function, adapter, params, x), plan


def depending_on_first(function, adapter, *args):
    lowered = jax.jit(function, keep_unused=True).lower(adapter, *args)
    text = lowered.compile({"xla_llvm_disable_expensive_passes": True}).as_text()
    return hlo.arrays_depending_on(text, len(jax.tree.leaves(adapter)))


def of_a_weights_size(arrays, site):
    """Those that hold a value for each pair of an input and an output of the weight."""
    matrix = site.fan_in * site.fan_out
    return [array for array in arrays if array.size % matrix == 0]


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_a_weights_size_appears_where_the_plan_says_merged_and_nowhere_else(case):
    arrays, plan = adapter_arrays(widened(case.name))
    assert arrays
    found = {path: of_a_weights_size(arrays, site) for path, site in plan.items()}
    expected = merged_paths(plan) if case.name not in MERGED_ROW_BY_ROW else set()
    assert {path for path in found if found[path]} == expected, found


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_merging_first_would_show(case):
    arrays, plan = adapter_arrays(widened(case.name), mode="merge")
    assert all(of_a_weights_size(arrays, site) for site in plan.values())


def scanned_weight_norm(params, x):
    def layer(hidden, kernel):
        return jnp.tanh(hidden @ (kernel / jnp.linalg.norm(kernel, axis=0))), None

    return lax.scan(layer, x, params["w"])[0]


def indexed_weight_norm(params, x):
    def step(i, hidden):
        kernel = params["w"][i]
        return jnp.tanh(hidden @ (kernel / jnp.linalg.norm(kernel, axis=0)))

    return lax.fori_loop(0, 3, step, x)


@pytest.mark.parametrize("model_fn", [scanned_weight_norm, indexed_weight_norm])
def test_what_is_merged_in_a_loop_is_merged_inside_its_body(model_fn):
    shapes, roles = {"w": (3, 13, 13)}, {"w": "stack in out"}
    case = cases.Case("loop", model_fn, shapes, (11, 13), roles, axes=(("w", roles["w"]),))
    arrays, plan = adapter_arrays(case)
    found = of_a_weights_size(arrays, plan["w"])
    assert merged_paths(plan) == {"w"}
    assert found
    assert all(array.in_loop for array in found)
    merged_first, _ = adapter_arrays(case, mode="merge")
    assert not all(array.in_loop for array in of_a_weights_size(merged_first, plan["w"]))


def test_the_gradient_of_the_weight_itself_would_show():
    case = widened("dense")
    params, x, plan = planned(case)
    adapter = jax.eval_shape(lambda: lora.init(jax.random.key(0), params, plan))
    both = jax.grad(scalar(lora.adapt(case.model_fn, plan)), argnums=(0, 1))
    assert of_a_weights_size(depending_on_first(both, adapter, params, x), plan["w"])


def test_widened_weights_have_sizes_of_their_own():
    for case in cases.CASES:
        _, _, plan = planned(widened(case.name))
        matrices = [site.fan_in * site.fan_out for site in plan.values()]
        assert len(set(matrices)) == len(matrices) or not case.merged, case.name
