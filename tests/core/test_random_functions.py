"""Functions that nobody thought of: random einsums behind random views inside random nestings.

A function is built from the inside out. It begins as an einsum of a weight with an activation,
on either side, with any number of stack, input, output and token axes in any order. Each step
then puts a view before the weight or control flow around the function, and knows what becomes of
the axes, so that the roles of the finished weight are known without asking the planner.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import lora_jax as lora

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")
st = pytest.importorskip("hypothesis.strategies")

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Axis(NamedTuple):
    """One axis of the weight."""

    role: str
    size: int


class Model(NamedTuple):
    """``call(w, x)``, what it takes, and what is known about it."""

    call: Callable[[Any, Any], Any]
    axes: tuple[Axis, ...]
    x: tuple[int, ...]
    history: tuple[str, ...] = ()
    """The steps, for whoever reads a failure."""
    exact: bool = False
    """It rounds the weight to float32: its data must be small integers, and nothing curved."""
    branches: bool = False
    """It branches on the activation: of that vmap makes a selection between whole weights."""
    opaque: bool = False
    """It does something to the weight that has no low-rank form."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(axis.size for axis in self.axes)

    @property
    def roles(self) -> str:
        return " ".join(axis.role for axis in self.axes)

    def behind(self, name: str, view: Callable, axes, **known) -> "Model":
        """The same function of a weight that ``view`` is applied to first."""
        call = lambda w, x: self.call(view(w), x)  # noqa: E731
        changed = {"axes": tuple(axes), "history": (name, *self.history)}
        return self._replace(call=call, **changed, **known)

    def inside(self, name: str, wrap: Callable, weights: int = 0, xs: int = 0, **known) -> "Model":
        """``wrap(call)``, of a weight and an activation with a leading axis more if asked."""
        stack = (Axis("stack", weights),) if weights else ()
        x = (xs, *self.x) if xs else self.x
        changed = {"axes": (*stack, *self.axes), "x": x, "history": (name, *self.history)}
        return self._replace(call=wrap(self.call), **changed, **known)


def einsum(draw) -> Model:
    sizes = st.integers(2, 3)
    counts = {"stack": draw(st.integers(0, 1)), "in": draw(st.integers(1, 2)),
              "out": draw(st.integers(1, 2)), "token": draw(st.integers(0, 2))}  # fmt: skip
    letters = iter("abcdefghijkl")
    named = {role: [next(letters) for _ in range(n)] for role, n in counts.items()}
    size = {letter: draw(sizes) for group in named.values() for letter in group}
    role = {letter: role for role, group in named.items() for letter in group}

    def shuffled(*roles):
        return draw(st.permutations([letter for role in roles for letter in named[role]]))

    w = shuffled("stack", "in", "out")
    x, out = shuffled("stack", "in", "token"), shuffled("stack", "out", "token")
    weight_first = draw(st.booleans())
    operands = (w, x) if weight_first else (x, w)
    equation = "{},{}->{}".format(*map("".join, (*operands, out)))

    def call(w, x):
        return jnp.einsum(equation, *((w, x) if weight_first else (x, w)))

    axes = tuple(Axis(role[letter], size[letter]) for letter in w)
    return Model(call, axes, tuple(size[letter] for letter in x), (equation,))


def transposed(draw, model: Model) -> Model:
    order = draw(st.permutations(range(len(model.axes))))
    before = [model.axes[order.index(axis)] for axis in range(len(order))]
    return model.behind(f"transpose{order}", lambda w: w.transpose(order), before)


def split(draw, model: Model) -> Model:
    """One axis of the weight is split into two of the function's."""
    pairs = [k for k in range(len(model.axes) - 1) if model.axes[k].role == model.axes[k + 1].role]
    if not pairs:
        return model
    k = draw(st.sampled_from(pairs))
    first, second = model.axes[k : k + 2]
    one = Axis(first.role, first.size * second.size)
    before = (*model.axes[:k], one, *model.axes[k + 2 :])
    return model.behind(f"split{k}", lambda w: w.reshape(model.shape), before)


def joined(draw, model: Model) -> Model:
    """Two axes of the weight, of one role, become one of the function's."""
    k = draw(st.integers(0, len(model.axes) - 1))
    axis = model.axes[k]
    if axis.size % 2 or axis.size < 4:
        return model
    two = (Axis(axis.role, 2), Axis(axis.role, axis.size // 2))
    before = (*model.axes[:k], *two, *model.axes[k + 1 :])
    return model.behind(f"join{k}", lambda w: w.reshape(model.shape), before)


def sliced(draw, model: Model) -> Model:
    k = draw(st.integers(0, len(model.axes) - 1))
    start, stride = draw(st.integers(0, 1)), draw(st.integers(1, 2))
    axis = model.axes[k]
    limit = start + (axis.size - 1) * stride + 1
    before = (*model.axes[:k], Axis(axis.role, limit), *model.axes[k + 1 :])
    view = partial(lax.slice_in_dim, start_index=start, limit_index=limit, stride=stride, axis=k)
    return model.behind(f"slice{k}[{start}:{limit}:{stride}]", view, before)


def picked(draw, model: Model) -> Model:
    """One entry of a stack, by a number in the source or by one that is computed."""
    k, size = draw(st.integers(0, len(model.axes))), draw(st.integers(1, 3))
    index, computed = draw(st.integers(0, size - 1)), draw(st.booleans())
    before = (*model.axes[:k], Axis("stack", size), *model.axes[k:])

    def view(w):
        if computed:
            return lax.dynamic_index_in_dim(w, jnp.abs(jnp.int32(-index)), k, keepdims=False)
        return lax.index_in_dim(w, index, k, keepdims=False)

    return model.behind(f"pick{k}[{index}]{computed}", view, before)


def same(draw, model: Model) -> Model:
    view = draw(st.sampled_from([
        lambda w: checkpoint_name(w, "kernel"), lax.optimization_barrier, jnp.copy,
        lambda w: jnp.broadcast_to(w[None], (1, *w.shape))[0],
    ]))  # fmt: skip
    return model.behind("same", view, model.axes)


def rounded(draw, model: Model) -> Model:
    view = lambda w: w.astype(jnp.float32).astype(jnp.float64)  # noqa: E731
    return model.behind("round", view, model.axes, exact=True)


def opaque(draw, model: Model) -> Model:
    """No low-rank form, or none that the rules know."""
    views = {"double": lambda w: 2 * w, "flip": lambda w: w[..., ::-1], "sum": lambda w: w + w}
    name = draw(st.sampled_from(sorted(views)))
    return model.behind(name, views[name], model.axes, opaque=True)


def jitted(draw, model: Model) -> Model:
    return model.inside("jit", jax.jit)


def rematerialised(draw, model: Model) -> Model:
    policies = [None, jax.checkpoint_policies.dots_saveable]
    policy = draw(st.sampled_from(policies))
    return model.inside("remat", partial(jax.checkpoint, policy=policy))


def branched(draw, model: Model) -> Model:
    def wrap(call):
        other = lambda w, x: call(w, 2 * x)  # noqa: E731
        return lambda w, x: lax.cond(x.sum() > 0 if on_data else True, call, other, w, x)

    on_data = draw(st.booleans())
    return model.inside(f"cond{on_data}", wrap, branches=on_data or model.branches)


def scanned_layers(draw, model: Model) -> Model:
    def wrap(call):
        return lambda w, x: lax.scan(lambda _, wx: (None, call(*wx)), None, (w, x))[1]

    length = draw(st.integers(1, 3))
    return model.inside("scan_layers", wrap, weights=length, xs=length)


def scanned_tokens(draw, model: Model) -> Model:
    def wrap(call):
        return lambda w, x: lax.scan(lambda _, row: (None, call(w, row)), None, x)[1]

    return model.inside("scan_tokens", wrap, xs=draw(st.integers(1, 3)))


def looped(draw, model: Model) -> Model:
    """Layers by the number of the step, all on one activation."""
    length = draw(st.integers(1, 3))

    def wrap(call):
        return lambda w, x: lax.map(lambda i: call(w[i], x), jnp.arange(length))

    return model.inside("loop", wrap, weights=length)


def unrolled(draw, model: Model) -> Model:
    def wrap(call):
        by_number = lambda w, x: sum(call(w[i], x) for i in range(length))  # noqa: E731
        return (lambda w, x: sum(call(each, x) for each in w)) if iterates else by_number

    length, iterates = draw(st.integers(1, 3)), draw(st.booleans())
    return model.inside(f"unroll{iterates}", wrap, weights=length)


def mapped_tokens(draw, model: Model) -> Model:
    wrap = partial(jax.vmap, in_axes=(None, 0))
    return model.inside("vmap_x", wrap, xs=2, opaque=model.opaque or model.branches)


def mapped_experts(draw, model: Model) -> Model:
    hidden = model.opaque or model.branches
    return model.inside("vmap", jax.vmap, weights=2, xs=2, opaque=hidden)


def picking_tokens(draw, model: Model) -> Model:
    """Each row of the activation takes an entry of its own from the stack."""
    size = draw(st.integers(1, 3))
    numbers = jnp.array(draw(st.lists(st.integers(0, size - 1), min_size=2, max_size=2)))

    def wrap(call):
        row = lambda w, i, x: call(w[i], x)  # noqa: E731
        return lambda w, x: jax.vmap(row, in_axes=(None, 0, 0))(w, numbers, x)

    hidden = model.opaque or model.branches
    return model.inside(f"pick_tokens{size}", wrap, weights=size, xs=2, opaque=hidden)


STEPS = [
    transposed, split, joined, sliced, picked, same, rounded, opaque, jitted, rematerialised,
    branched, scanned_layers, scanned_tokens, looped, unrolled, mapped_tokens, mapped_experts,
    picking_tokens,
]  # fmt: skip


@st.composite
def models(draw) -> Model:
    model = einsum(draw)
    for step in draw(st.lists(st.sampled_from(STEPS), min_size=2, max_size=6)):
        model = step(draw, model)
    return model


def data(model: Model, shape, seed):
    """Normal numbers, or integers from -1 to 1 where sums of products must come out exact."""
    rng = np.random.default_rng(seed)
    values = rng.integers(-1, 2, shape) if model.exact else rng.normal(size=shape)
    return jnp.asarray(values, jnp.float64)


def everything(model: Model, model_fn, plan, params, adapter, x):
    """Values and gradients of both modes, of a fresh adapter, and of the base: one program."""

    def run(mode):
        adapted = lora.adapt(model_fn, plan, mode=mode)

        def loss(adapter, x):
            output = adapted(params, adapter, x)
            return jnp.sum(output if model.exact else jnp.sin(output)), output

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(adapter, x)

    fresh = {"w": adapter["w"]._replace(b=jnp.zeros_like(adapter["w"].b))}
    unchanged = lora.adapt(model_fn, plan)(params, fresh, x)
    return run("low_rank"), run("merge"), unchanged, model_fn(params, x)


def made_plan(model: Model, model_fn, params, x) -> lora.Plan:
    """Found by the trace; by declared roles where the weight is changed before its use."""
    config = lora.LoraConfig(rank=2, alpha=2 if model.exact else 3, targets="w")
    if not model.opaque:
        return lora.plan(model_fn, params, x, config=config)
    message = refusal(partial(lora.plan, model_fn, params, x, config=config))
    assert message is None or "'w'" in message
    return lora.plan(model_fn, params, x, config=replace(config, axes=(("w", model.roles),)))


def refusal(make: Callable[[], Any]) -> str | None:
    try:
        make()
    except lora.InputError as error:
        return str(error)


def holds(model: Model) -> None:
    """What the property is, for one function."""
    params, x = {"w": data(model, model.shape, 0)}, data(model, model.x, 1)
    model_fn = lambda params, x: model.call(params["w"], x)  # noqa: E731
    plan = made_plan(model, model_fn, params, x)
    site = plan["w"]
    if not model.opaque:
        assert " ".join(site.roles) == model.roles
        assert [use.merged_because for use in site.uses] == [""] * len(site.uses)
    a, b = data(model, site.a_shape, 2), data(model, site.b_shape, 3)
    program = jax.jit(partial(everything, model, model_fn, plan))
    ours, want, unchanged, base = program(params, {"w": lora.LoraPair(a, b)}, x)
    close(ours, want, 1e-10)
    close(unchanged, base, 1e-12)
    assert model.exact or not np.allclose(want[0][1], base), "the adapter must change the output"


def close(got, want, tolerance):
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        bound = tolerance * max(1.0, float(jnp.abs(theirs).max()))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound)


@hypothesis.settings(
    derandomize=True,
    deadline=None,
    max_examples=25,
    phases=set(hypothesis.Phase) - {hypothesis.Phase.explain},
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(models())
def test_low_rank_equals_merge_for_any_function(model):
    holds(model)
