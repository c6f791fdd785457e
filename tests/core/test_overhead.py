"""The rewrite adds nothing to what a person would have written: not compiled, hardly in tracing."""

import gc
import re
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from lora_jax.cli.trace_times import scanned_sides, trace_times, unrolled_sides

TRACING_TIME = 1.6
"""The most that the rewrite may take, as a multiple of hand-written LoRA's time."""
TRACING_CALLS = 1.3
"""The same in Python calls a layer, of which JAX 0.10.2 makes 1.20 times and 0.12 1.17 times."""


@pytest.fixture(autouse=True)
def _float64():
    """Here the dtypes of training, whatever the other tests of the core use."""


class Cost(NamedTuple):
    flops: float
    products: int
    temporaries: int


def cost(lower):
    compiled = lower().compile()
    products = re.findall(r" (?:dot|custom-call)\(", compiled.as_text())
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    return Cost(compiled.cost_analysis()["flops"], len(products), temporaries)


def calls(lower):
    """Python calls of one lowering from empty caches: a measure of its time without noise."""
    jax.clear_caches()
    gc.collect()
    count = 0

    def on_event(frame, event, argument):
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(on_event)
    try:
        lower()
    finally:
        sys.setprofile(before)
    return count


PROGRAMS = [
    pytest.param(unrolled_sides, 3, jnp.float32, id="unrolled"),
    pytest.param(unrolled_sides, 2, jnp.bfloat16, id="unrolled-bfloat16"),
    pytest.param(unrolled_sides, 32, jnp.float32, id="unrolled-32", marks=pytest.mark.slow),
    pytest.param(scanned_sides, 32, jnp.float32, id="scanned"),
    pytest.param(scanned_sides, 32, jnp.bfloat16, id="scanned-bfloat16"),
]


@pytest.mark.parametrize(("sides_of", "layers", "dtype"), PROGRAMS)
def test_compiles_to_what_is_written_by_hand(sides_of, layers, dtype):
    sides = sides_of(layers, dtype)
    by_hand, rewrite = cost(sides.hand_written), cost(sides.rewrite)
    weights_times_uses = 7 * 2
    assert by_hand.products > weights_times_uses, "the compiled text has no products to count"
    assert rewrite.flops == by_hand.flops
    assert rewrite.products == by_hand.products
    assert rewrite.temporaries == pytest.approx(by_hand.temporaries, rel=0.01)


def test_merging_in_the_forward_pass_would_cost_more():
    sides = unrolled_sides(2, mode="merge")
    assert cost(sides.rewrite).flops > 1.05 * cost(sides.hand_written).flops


def test_tracing_a_layer_takes_few_python_calls_more_than_by_hand():
    few, more = unrolled_sides(2), unrolled_sides(4)
    for lower in (*few, *more):
        lower()
    by_hand, rewrite, _ = (calls(b) - calls(a) for a, b in zip(few, more, strict=True))
    assert by_hand > 10_000, "nothing was counted"
    assert rewrite < TRACING_CALLS * by_hand


def test_tracing_a_scan_takes_as_many_python_calls_at_any_depth():
    shallow, deep = scanned_sides(4).rewrite, scanned_sides(64).rewrite
    for lower in (shallow, deep):
        lower()
    assert calls(deep) == pytest.approx(calls(shallow), rel=0.001)


@pytest.mark.slow
def test_tracing_32_unrolled_layers_takes_at_most_1_6_times_as_long_as_by_hand():
    ratios = (trace_times(32, rounds=3).ratio for _ in range(2))
    assert any(ratio <= TRACING_TIME for ratio in ratios), "twice above: not a busy machine"
