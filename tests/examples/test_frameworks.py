"""Every example of examples/frameworks trains, and says and does what it should."""

import importlib
import io
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import lora_jax as lora

EXAMPLES = Path(__file__).parents[2] / "examples" / "frameworks"
RANK = 4


class Expected(NamedTuple):
    """What the plan of one example should say."""

    roles: dict[str, str]
    """Of some of its leaves, each of another kind."""
    targets: int
    trainable: int
    needs: str = "flax"


EXPECTED = {
    "plain_jnp": Expected(
        {"w1": "in out", "w2": "out in", "w3": "in out"},
        targets=3,
        trainable=RANK * ((16 + 64) + (64 + 64) + (64 + 4)),
        needs="jax",
    ),
    "flax_linen": Expected(
        {
            "params/embed/embedding": "in out",
            "params/layers/attention/query/kernel": "stack in out out",
            "params/layers/attention/out/kernel": "stack in in out",
            "params/layers/up/kernel": "stack in out",
        },
        targets=7,
        trainable=RANK * ((16 + 32) + 3 * (4 * (32 + 32) + 2 * (32 + 64))),
    ),
    "flax_nnx": Expected(
        {
            "embed/embedding": "in out",
            "layers/attention/query/kernel": "stack in out out",
            "layers/attention/out/kernel": "stack in in out",
            "layers/up/kernel": "stack in out",
            "head/kernel": "in out",
        },
        targets=8,
        trainable=RANK * (2 * (16 + 32) + 3 * (4 * (32 + 32) + 2 * (32 + 64))),
    ),
    "haiku_mlp": Expected(
        {"mlp/~/linear_0/w": "in out", "mlp/~/linear_2/w": "in out"},
        targets=3,
        trainable=RANK * ((16 + 64) + (64 + 64) + (64 + 4)),
        needs="haiku",
    ),
    "equinox_mlp": Expected(
        {"layers/0/weight": "out in", "layers/2/weight": "out in"},
        targets=3,
        trainable=RANK * ((16 + 64) + (64 + 64) + (64 + 4)),
        needs="equinox",
    ),
    "convnet": Expected(
        {
            "params/Conv_0/kernel": "in in in out",
            "params/Conv_1/kernel": "in in in out",
            "params/Dense_0/kernel": "in out",
        },
        targets=4,
        trainable=RANK * ((9 + 16) + (9 * 8 + 32) + (32 + 64) + (64 + 4)),
    ),
    "mixture_of_experts": Expected(
        {"router": "in out", "up": "stack in out", "down": "stack in out", "head": "in out"},
        targets=4,
        trainable=RANK * ((16 + 4) + 4 * 2 * (16 + 64) + (16 + 4)),
        needs="jax",
    ),
    "vision_transformer": Expected(
        {
            "params/patches/kernel": "in in in out",
            "params/block_0/attention/key/kernel": "in out out",
            "params/block_1/attention/out/kernel": "in in out",
            "params/head/kernel": "in out",
        },
        targets=14,
        trainable=RANK * ((16 + 32) + 2 * (4 * (32 + 32) + 2 * (32 + 64)) + (32 + 4)),
    ),
}


class Run(NamedTuple):
    """An example's task, what its parameters were before, and what its ``main`` returned."""

    model_fn: Callable[..., Any]
    params: Any
    x: Any
    bytes_before: list[bytes]
    adapted: Callable[..., Any]
    plan: lora.Plan
    adapter: dict[str, lora.LoraPair]
    merged: Any
    losses: list[float]
    printed: str


@pytest.mark.parametrize("name", EXPECTED)
def test_example(name, monkeypatch):
    """One test for all properties: with several workers each ``main`` still runs only once."""
    expected = EXPECTED[name]
    pytest.importorskip(expected.needs, reason=f"{expected.needs} is not installed")
    run = run_main(name, monkeypatch)
    learns(run)
    merged_computes_what_adapted_does(run)
    fresh_adapter_changes_nothing(run)
    every_target_is_low_rank_with_its_roles(run, expected)
    trains_the_adapter_alone(run, expected)


def test_all_examples_are_here_and_show_the_same_lines():
    files = sorted(EXAMPLES.glob("*.py"))
    assert {path.stem for path in files} == set(EXPECTED)
    shown = {path.read_text().partition("    plan = lora.plan(")[2] for path in files}
    assert len(shown) == 1


def run_main(name: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run an example's ``main`` on the very tree that the test holds."""
    monkeypatch.syspath_prepend(EXAMPLES)
    module = importlib.import_module(name)
    model_fn, params, x, y = module.task()
    monkeypatch.setattr(module, "task", lambda: (model_fn, params, x, y))
    before = tree_bytes(params)
    with redirect_stdout(io.StringIO()) as printed:
        adapted, plan, adapter, merged, losses = module.main()
    said = printed.getvalue()
    return Run(model_fn, params, x, before, adapted, plan, adapter, merged, losses, said)


def learns(run: Run):
    assert run.losses[-1] < run.losses[0] / 2


def merged_computes_what_adapted_does(run: Run):
    model_fn, adapted = jax.jit(run.model_fn), run.adapted(run.params, run.adapter, run.x)
    assert_same(model_fn(run.merged, run.x), adapted)
    with pytest.raises(AssertionError):
        assert_same(model_fn(run.params, run.x), adapted)


def fresh_adapter_changes_nothing(run: Run):
    fresh = lora.init(jax.random.key(7), run.params, run.plan)
    base = jax.jit(run.model_fn)(run.params, run.x)
    assert_same(run.adapted(run.params, fresh, run.x), base)


def every_target_is_low_rank_with_its_roles(run: Run, expected: Expected):
    assert {path: " ".join(run.plan[path].roles) for path in expected.roles} == expected.roles
    assert len(run.plan) == expected.targets
    assert all(site.uses for site in run.plan.values())
    assert not [use for site in run.plan.values() for use in site.uses if use.merged_because]


def trains_the_adapter_alone(run: Run, expected: Expected):
    assert run.plan.trainable == lora.count(run.adapter) == expected.trainable
    assert f"trainable params: {expected.trainable:,d} " in run.printed
    assert tree_bytes(run.params) == run.bytes_before
    assert tree_bytes(run.merged) != run.bytes_before


def assert_same(got: Any, want: Any):
    """To 1e-5 of the largest logit."""
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * float(np.abs(want).max()))


def tree_bytes(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]
