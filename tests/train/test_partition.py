"""One tree with base and adapter: the base keeps its bytes, the optimizer sees the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lora
from lora_jax.adapter import LoraPair
from lora_jax.errors import InputError
from lora_jax.train.optim import adamw, clip_by_global_norm
from lora_jax.train.partition import labels, partition

RNG = np.random.default_rng(0)
PARAMS = {
    "first": {"kernel": jnp.asarray(RNG.normal(size=(5, 8)), jnp.float32)},
    "second": {"kernel": jnp.asarray(RNG.normal(size=(8, 3)), jnp.bfloat16)},
    "zeros": jnp.array([0.0, -0.0, 1e-30, -1e30], jnp.float32),
    "count": jnp.arange(3),
}
X = jnp.asarray(RNG.normal(size=(16, 5)), jnp.float32)


def model_fn(params, x):
    return jnp.tanh(x @ params["first"]["kernel"]) @ params["second"]["kernel"]


@pytest.fixture(scope="module")
def problem():
    """The tree, and gradients for all of it: large for the base, so that a leak would show."""
    config = lora.LoraConfig(rank=2, targets=r".*/kernel")
    plan = lora.plan(model_fn, PARAMS, X, config=config)
    adapter = lora.init(jax.random.key(0), PARAMS, plan)
    tree = {"params": PARAMS, "adapter": adapter}

    def loss(tree):
        logits = lora.adapt(model_fn, plan)(tree["params"], tree["adapter"], X)
        return 1e3 * (logits.astype(jnp.float32) ** 2).sum() + tree["params"]["zeros"].sum()

    grads = jax.grad(loss, allow_int=True)(tree)
    grads["params"]["count"] = jnp.zeros(3, jnp.int32)
    return tree, grads


def run(tx, tree, grads, updates=20):
    @jax.jit
    def update(tree, state):
        return tx.update(grads, state, tree)

    state = tx.init(tree)
    for _ in range(updates):
        deltas, state = update(tree, state)
        # Outside of the compiled function, where nothing simplifies the sum away.
        tree = optax.apply_updates(tree, deltas)
    return tree, state


def as_bytes(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_bytes_of_the_base_never_change_under_decay_and_clipping(problem):
    tree, grads = problem
    before = as_bytes(tree["params"])
    moved, _ = run(partition(adamw(0.1, weight_decay=0.5)), tree, grads)
    assert as_bytes(moved["params"]) == before
    assert as_bytes(tree["params"]) == before
    for path, pair in moved["adapter"].items():
        assert float(jnp.abs(pair.b - tree["adapter"][path].b).max()) > 0.1


def test_masking_alone_or_zeros_for_updates_do_change_them(problem):
    tree, grads = problem
    before = as_bytes(tree["params"])
    mask = jax.tree.map(lambda kind: kind != "base", labels(tree))
    masked, _ = run(optax.masked(adamw(0.1), mask), tree, grads, 1)
    assert float(jnp.abs(masked["params"]["first"]["kernel"] - X[0, 0]).max()) > 1
    assert as_bytes(masked["params"]) != before
    groups = jax.tree.map(lambda kind: "base" if kind == "base" else "adapter", labels(tree))
    zeros = optax.partition({"base": optax.set_to_zero(), "adapter": adamw(0.1)}, groups)
    signed, _ = run(zeros, tree, grads, 1)
    assert np.signbit(tree["params"]["zeros"][1])
    assert not np.signbit(signed["params"]["zeros"][1])


def test_what_the_optimizer_does_to_the_adapter_is_as_if_it_stood_alone(problem):
    tree, grads = problem
    tx = adamw(0.1, weight_decay=0.5, clip_norm=0.01)
    together, _ = run(partition(tx), tree, grads)
    alone, _ = run(tx, tree["adapter"], grads["adapter"])
    assert as_bytes(together["adapter"]) == as_bytes(alone)
    in_the_base = jax.tree.map(lambda leaf: leaf * 100, grads["params"])
    louder, _ = run(partition(tx), tree, {**grads, "params": in_the_base})
    assert as_bytes(louder["adapter"]) == as_bytes(alone)


def test_clipping_outside_the_partition_sees_the_whole_tree(problem):
    tree, grads = problem
    inside, outside = (
        partition(optax.chain(clip_by_global_norm(1.0), optax.sgd(1.0))),
        optax.chain(clip_by_global_norm(1.0), partition(optax.sgd(1.0))),
    )
    moves = [tx.update(grads, tx.init(tree), tree)[0]["adapter"] for tx in (inside, outside)]
    norms = [float(optax.tree.norm(move)) for move in moves]
    assert norms[0] == pytest.approx(1.0, rel=1e-5)
    assert norms[1] < 0.98


def test_state_holds_arrays_of_the_adapters_shapes_only(problem):
    tree, _ = problem
    state = partition(adamw(lambda count: 0.1)).init(tree)
    shapes = [leaf.shape for leaf in jax.tree.leaves(tree["adapter"])]
    held = sorted(leaf.shape for leaf in jax.tree.leaves(state))
    assert held == sorted([*shapes, *shapes, (), ()])


def test_freezing_a_in_one_tree(problem):
    tree, grads = problem
    moved, state = run(partition(adamw(0.1), freeze=("a",)), tree, grads, 3)
    for path, pair in moved["adapter"].items():
        assert as_bytes(pair.a) == as_bytes(tree["adapter"][path].a)
        assert as_bytes(pair.b) != as_bytes(tree["adapter"][path].b)
    b_shapes = [pair.b.shape for pair in tree["adapter"].values()]
    held = sorted(leaf.shape for leaf in jax.tree.leaves(state))
    assert held == sorted([*b_shapes, *b_shapes, ()])


def test_compiled_and_eager_agree(problem):
    tree, grads = problem
    tx = partition(adamw(0.1))
    eager, _ = tx.update(grads, tx.init(tree), tree)
    compiled, _ = jax.jit(tx.update)(grads, tx.init(tree), tree)
    assert as_bytes(eager["params"]) == as_bytes(compiled["params"])
    moved = jax.jit(optax.apply_updates)(tree, compiled)
    assert as_bytes(moved["params"]) == as_bytes(tree["params"])


def test_a_tree_without_an_adapter_is_refused():
    with pytest.raises(InputError, match="nothing to train: the tree has leaves of kind"):
        partition(adamw(0.1)).init(PARAMS)
    with pytest.raises(InputError, match="nothing to train"):
        adamw(0.1, freeze=("a", "b")).init({"w": LoraPair(jnp.ones(2), jnp.ones(2))})
