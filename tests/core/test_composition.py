"""The adapted function is a JAX function: under every transformation, and under itself."""

import logging
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax.models.decoder import Decoder, init_params
from lora_jax.models.presets import TINY

import cases

pytestmark = pytest.mark.usefixtures("quick_compilation")

DEVICES = 8
CASES = {case.name: case for case in cases.CASES}
NAMES = [
    "decoder", "scan_remat_cast", "cond", "tied_embedding", "experts", "conv_nhwc", "weight_norm",
]  # fmt: skip


class Subject(NamedTuple):
    """A model function with its adapted form, all that it takes, and how exact it is."""

    model_fn: Callable
    targets: str | tuple[str, ...]
    params: Any
    xs: jax.Array
    """Eight inputs."""
    plan: lora.Plan
    adapters: list[dict]
    tolerance: float
    """Of the largest entry of an array; the decoder's norms and logits are float32."""

    @property
    def adapted(self) -> Callable:
        return lora.adapt(self.model_fn, self.plan)

    @property
    def merge_mode(self) -> Callable:
        return lora.adapt(self.model_fn, self.plan, mode="merge")

    def close(self, got: Any, want: Any, factor: float = 1.0) -> None:
        for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            largest = float(jnp.abs(theirs).max())
            assert largest > 0, "nothing to compare"
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=factor * self.tolerance * largest)


@pytest.fixture(params=NAMES)
def subject(request) -> Subject:
    return named_subject(request.param)


@pytest.fixture
def decoder() -> Subject:
    return named_subject("decoder")


@cache
def named_subject(name: str) -> Subject:
    return tiny_decoder() if name == "decoder" else of_case(CASES[name])


def tiny_decoder() -> Subject:
    model = Decoder(TINY)
    tokens = np.random.default_rng(0).integers(0, TINY.vocab_size, (DEVICES, 1, 5), np.int32)
    params = init_params(jax.random.key(0), TINY)
    targets = r".*(_proj/kernel|embedding)"
    return made_of(
        lambda params, tokens: model.apply({"params": params}, tokens)[0],
        targets, params, jnp.asarray(tokens), tolerance=3e-5,
    )  # fmt: skip


def of_case(case: cases.Case) -> Subject:
    xs = jnp.asarray(np.random.default_rng(1).normal(size=(DEVICES, *case.x)))
    targets = tuple(case.roles)
    return made_of(case.model_fn, targets, cases.make_params(case), xs, tolerance=1e-10)


def made_of(model_fn, targets, params, xs, tolerance) -> Subject:
    config = lora.LoraConfig(rank=2, alpha=2, targets=targets)
    plan = lora.plan(model_fn, params, xs[0], config=config)
    adapters = [random_adapter(params, plan, seed) for seed in range(DEVICES)]
    return Subject(model_fn, targets, params, xs, plan, adapters, tolerance)


def random_adapter(params, plan, seed=0):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: lora.init(jax.random.key(0), params, plan))
    dtype = jax.tree.leaves(params)[0].dtype
    return jax.tree.map(lambda s: jnp.asarray(0.1 * rng.normal(size=s.shape), dtype), shapes)


def stacked(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def scalar(outputs):
    return sum(jnp.mean(jnp.sin(leaf)) for leaf in jax.tree.leaves(outputs))


def loss_of(adapted):
    return lambda adapter, params, x: scalar(adapted(params, adapter, x))


def test_jit_grad_and_value_and_grad(subject):
    args = subject.adapters[0], subject.params, subject.xs[0]

    @jax.jit
    def everything(adapter, params, x):
        loss, oracle = loss_of(subject.adapted), loss_of(subject.merge_mode)
        ours = loss(adapter, params, x), jax.grad(loss)(adapter, params, x)
        of = (jax.value_and_grad(each)(adapter, params, x) for each in (loss, oracle))
        return ours, *of, scalar(subject.model_fn(params, x))

    ours, both, want, without = everything(*args)
    subject.close(ours, both)
    subject.close(both, want)
    assert abs(both[0] - without) > 1e-5, "the adapter must change the output"


def test_forward_mode(subject):
    """jvp in adapter and base together; in float64 also against a central difference."""
    x, point = subject.xs[0], (subject.params, subject.adapters[0])
    direction = jax.tree.map(jnp.cos, point)

    def along(adapted):
        return jax.jvp(lambda point: scalar(adapted(*point, x)), (point,), (direction,))

    ours, want = jax.jit(lambda: (along(subject.adapted), along(subject.merge_mode)))()
    subject.close(ours, want)
    if subject.tolerance > 1e-9:
        return
    step = 1e-6

    def moved(by):
        params, adapter = jax.tree.map(lambda p, d: p + by * d, point, direction)
        return scalar(subject.adapted(params, adapter, x))

    difference = jax.jit(lambda: (moved(step) - moved(-step)) / (2 * step))()
    assert abs(ours[1] - difference) < 1e-7 * max(1, abs(ours[1]))


def test_hessian_vector_product(subject):
    params, x, adapter = subject.params, subject.xs[0], subject.adapters[0]

    def product(adapted):
        gradient = jax.grad(lambda adapter: loss_of(adapted)(adapter, params, x))
        return jax.jvp(gradient, (adapter,), (jax.tree.map(jnp.cos, adapter),))[1]

    ours, want = jax.jit(lambda: (product(subject.adapted), product(subject.merge_mode)))()
    subject.close(ours, want, factor=10)


@pytest.mark.parametrize("axes", [(None, 0), (0, None), (0, 0)], ids=["xs", "adapters", "both"])
def test_vmap(subject, axes):
    many_adapters, many_xs = (axis == 0 for axis in axes)
    run = partial(subject.adapted, subject.params)
    adapters = stacked(subject.adapters) if many_adapters else subject.adapters[0]
    together = jax.jit(jax.vmap(run, axes))(adapters, subject.xs if many_xs else subject.xs[0])
    alone = jax.jit(run)
    separate = [
        alone(subject.adapters[i * many_adapters], subject.xs[i * many_xs]) for i in range(DEVICES)
    ]
    subject.close(together, stacked(separate))


@cache
def mean_gradient(name):
    """Over all eight inputs, on one device."""
    subject = named_subject(name)
    loss = loss_of(subject.adapted)

    def mean(adapter, params):
        return jax.vmap(partial(loss, adapter, params))(subject.xs).mean()

    return jax.jit(jax.grad(mean))(subject.adapters[0], subject.params)


@pytest.mark.parametrize("name", ["decoder", "cond"])
def test_pmap_over_eight_devices(name):
    subject = named_subject(name)
    gradient = jax.grad(loss_of(subject.adapted))

    def summed(adapter, params, x):
        return lax.psum(gradient(adapter, params, x), "devices")

    over_devices = jax.pmap(summed, axis_name="devices", in_axes=(None, None, 0))
    got = over_devices(subject.adapters[0], subject.params, subject.xs)
    want = jax.tree.map(lambda leaf: DEVICES * leaf, mean_gradient(name))
    for device in (0, DEVICES - 1):
        subject.close(jax.tree.map(lambda leaf, i=device: leaf[i], got), want)
    assert len(jax.tree.leaves(got)[0].sharding.device_set) == DEVICES


@pytest.mark.parametrize(
    ("name", "check_vma"), [("decoder", True), ("cond", True), ("scan_remat_cast", False)]
)
def test_shard_map_over_eight_devices(name, check_vma):
    """With replication checked JAX sums the gradients itself; without, the caller does."""
    subject = named_subject(name)
    loss = loss_of(subject.adapted)

    def of_mean(adapter, params, x):
        return jax.grad(lambda adapter: lax.pmean(loss(adapter, params, x[0]), "data"))(adapter)

    def mean_of(adapter, params, x):
        return lax.pmean(jax.grad(loss)(adapter, params, x[0]), "data")

    sharded = jax.shard_map(
        of_mean if check_vma else mean_of,
        mesh=jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=(P(), P(), P("data")),
        out_specs=P(),
        check_vma=check_vma,
    )
    got = jax.jit(sharded)(subject.adapters[0], subject.params, subject.xs)
    subject.close(got, mean_gradient(name))


def test_checkpoint_around_it(subject):
    args = subject.adapters[0], subject.params, subject.xs[0]
    loss = loss_of(subject.adapted)
    losses = jax.checkpoint(loss), loss
    both = jax.jit(lambda *args: [jax.value_and_grad(each)(*args) for each in losses])
    subject.close(*both(*args))


def test_scan_around_it(subject):
    """Training as one scan over batches is the same as a Python loop."""
    gradient = jax.grad(loss_of(subject.adapted))

    @jax.jit
    def update(adapter, x):
        grads = gradient(adapter, subject.params, x)
        return jax.tree.map(lambda p, g: p - 0.05 * g, adapter, grads)

    adapter = subject.adapters[0]
    scanned, _ = lax.scan(lambda adapter, x: (update(adapter, x), None), adapter, subject.xs)
    for x in subject.xs:
        adapter = update(adapter, x)
    subject.close(scanned, adapter, factor=10)


def test_scan_over_adapters(subject):
    def each(_, adapter):
        return None, subject.adapted(subject.params, adapter, subject.xs[0])

    _, got = jax.jit(lambda adapters: lax.scan(each, None, adapters))(stacked(subject.adapters))
    alone = jax.jit(subject.adapted)
    want = [alone(subject.params, adapter, subject.xs[0]) for adapter in subject.adapters]
    subject.close(got, stacked(want))


def test_two_adapters_at_once(subject):
    """`adapt` of an adapted function: both updates are added, and both train together."""
    params, x = subject.params, subject.xs[0]
    first, adapted = subject.adapters[0], subject.adapted

    def with_first(params, first, x):
        return adapted(params, first, x)

    config = lora.LoraConfig(rank=1, alpha=3, targets=subject.targets)
    plan = lora.plan(with_first, params, first, x, config=config)
    assert {path: site.roles for path, site in plan.items()} == {
        path: site.roles for path, site in subject.plan.items()
    }
    second = random_adapter(params, plan, seed=9)
    with_both = lora.adapt(with_first, plan)

    def both(pair):
        return scalar(with_both(params, pair[1], pair[0], x))

    def merged(pair):
        once = lora.merge(params, pair[0], subject.plan)
        return scalar(subject.model_fn(lora.merge(once, pair[1], plan), x))

    @jax.jit
    def everything(pair):
        got, want = (jax.value_and_grad(each)(pair) for each in (both, merged))
        return got, want, scalar(adapted(params, first, x))

    got, want, alone = everything((first, second))
    subject.close(got, want)
    assert abs(got[0] - alone) > 1e-5, "the second adapter must change the output"


def test_hundred_updates_trace_and_compile_once(decoder, caplog):
    traces = []

    def model_fn(params, tokens):
        traces.append(tokens.shape)
        return decoder.model_fn(params, tokens)

    loss = loss_of(lora.adapt(model_fn, decoder.plan))
    tx = optax.adam(1e-3)

    @jax.jit
    def one_update_of_adam(adapter, state, params, tokens):
        value, grads = jax.value_and_grad(loss)(adapter, params, tokens)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(adapter, updates), state, value

    def train(adapter, steps):
        state, values = jax.jit(tx.init)(adapter), []
        for i in range(steps):
            batch = decoder.xs[i % DEVICES]
            adapter, state, value = one_update_of_adam(adapter, state, decoder.params, batch)
            values.append(float(value))
        return values

    def compilations():
        starts = (r.getMessage() for r in caplog.records if "Compiling" in r.getMessage())
        return [message for message in starts if one_update_of_adam.__name__ in message]

    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        values = train(decoder.adapters[0], 100)
        assert len(traces) == len(compilations()) == 1
        others = train(decoder.adapters[1], 2)
    assert len(traces) == len(compilations()) == 1, "another adapter of the plan compiled anew"
    assert values[-1] < values[0]
    assert others[0] != values[0]
    assert one_update_of_adam._cache_size() == 1


def test_eight_adapters_on_a_decoder_share_every_base_product(decoder):
    """As many products with a base weight as without an adapter, and no weight is repeated."""
    params, tokens = decoder.params, decoder.xs[0]
    together = jax.vmap(decoder.adapted, (None, 0, None))
    adapters = stacked(decoder.adapters)
    jaxpr = jax.make_jaxpr(together)(params, adapters, tokens)
    of_base = jax.make_jaxpr(decoder.model_fn)(params, tokens)
    ours, theirs = (products_with(decoder.plan, j.jaxpr) for j in (jaxpr, of_base))
    assert len(ours) == len(theirs) == len(decoder.plan)
    for eqn in ours:
        _, batch = eqn.params["dimension_numbers"]
        assert batch == ((), ()), "a base weight is multiplied once for each adapter"
    sizes = {var.aval.shape for eqn in equations(jaxpr.jaxpr) for var in eqn.outvars}
    assert not sizes & {(DEVICES, *shape) for shape in one_layer_shapes(decoder.plan)}


def one_layer_shapes(plan) -> set[tuple[int, ...]]:
    return {site.dims("in") + site.dims("out") for site in plan.values()}


def products_with(plan, jaxpr) -> list:
    shapes = one_layer_shapes(plan)
    return [
        eqn
        for eqn in equations(jaxpr)
        if eqn.primitive.name == "dot_general" and shapes & {v.aval.shape for v in eqn.invars}
    ]


def equations(jaxpr) -> Iterator:
    """Of a jaxpr and of every jaxpr inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(eqn.params):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)
