"""Uses of a weight that a LoRA library easily passes over in silence, each by its name."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.ad_checkpoint import print_saved_residuals

import lora_jax as lora
from lora_jax.models.attention import attention_context
from lora_jax.models.blocks import Block
from lora_jax.models.decoder import init_params
from lora_jax.models.presets import TINY

from hlo import equations

pytestmark = pytest.mark.usefixtures("quick_compilation")

X = np.random.default_rng(1).normal(size=(5, 4))
RANK, ALPHA = 2, 3.0
TOKENS = 7


class Checked(NamedTuple):
    """A model function that was found to be adapted rightly."""

    plan: lora.Plan
    adapter: dict[str, lora.LoraPair]
    adapted: Callable[..., Any]
    output: Any
    grads: dict[str, lora.LoraPair]

    def roles(self, path: str) -> str:
        return " ".join(self.plan[path].roles)

    def operations(self, path: str) -> list[str]:
        return [use.operation for use in self.plan[path].uses]


def check(model_fn, params, *args, targets=".*", merged=(), tolerance=1e-10, std=0.5) -> Checked:
    """Low-rank equals merge mode in value and gradient, not the base, and merges are told."""
    config = lora.LoraConfig(rank=RANK, alpha=ALPHA, targets=targets)
    plan = lora.plan(model_fn, params, *args, config=config)
    merges = {path for path, site in plan.items() if any(u.merged_because for u in site.uses)}
    assert merges == set(merged)
    assert all(site.uses for site in plan.values())
    adapter = random_adapter(plan, params, std)
    adapted = lora.adapt(model_fn, plan)
    ours, ours_grads = value_and_grads(adapted, adapter, params, args)
    in_merge_mode = lora.adapt(model_fn, plan, mode="merge")
    want, want_grads = value_and_grads(in_merge_mode, adapter, params, args)
    close((ours, ours_grads), (want, want_grads), tolerance)
    for pair in ours_grads.values():
        assert all(float(jnp.abs(grad).max()) > 0 for grad in pair)
    base = jax.jit(model_fn)(params, *args)
    assert not np.allclose(ours, base, rtol=1e-3), "the adapter must change the output"
    return Checked(plan, adapter, adapted, ours, ours_grads)


def random_adapter(plan, params, std=0.5):
    rng = np.random.default_rng(2)
    shapes = jax.eval_shape(lambda: lora.init(jax.random.key(0), params, plan))
    dtype = jnp.promote_types(jax.tree.leaves(params)[0].dtype, jnp.float32)
    return jax.tree.map(lambda s: jnp.asarray(std * rng.normal(size=s.shape), dtype), shapes)


def value_and_grads(adapted, adapter, params, args):
    def loss(adapter):
        output = adapted(params, adapter, *args)
        return jnp.sum(jnp.sin(output.astype(jnp.promote_types(output.dtype, jnp.float32)))), output

    (_, output), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(adapter)
    return output, grads


def close(got, want, tolerance):
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        bound = tolerance * float(jnp.abs(theirs).max())
        np.testing.assert_allclose(*map(np.float64, (ours, theirs)), rtol=0, atol=bound)


def weights(**shapes):
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}


def effective(params, checked, path):
    """W + scale · A B of a leaf, written out by hand."""
    a, b = checked.adapter[path]
    return params[path] + ALPHA / RANK * a @ b


def test_transposed_weight():
    params = weights(w=(6, 4))
    checked = check(lambda p, x: x @ p["w"].T, params, X)
    assert checked.roles("w") == "out in"
    assert checked.adapter["w"].a.shape == (4, RANK)


def test_one_layer_of_a_stack_by_index():
    params = weights(w=(3, 4, 6))
    config = lora.LoraConfig(rank=RANK, alpha=ALPHA, targets="w")
    model_fn = lambda p, x: x @ p["w"][0]  # noqa: E731
    plan = lora.plan(model_fn, params, X, config=config)
    assert plan["w"].roles == ("stack", "in", "out")
    adapter = random_adapter(plan, params)
    got, grads = value_and_grads(lora.adapt(model_fn, plan), adapter, params, (X,))
    a, b = adapter["w"]
    close(got, X @ (params["w"][0] + ALPHA / RANK * a[0] @ b[0]), 1e-10)
    assert jnp.any(grads["w"].b[0] != 0)
    assert not jnp.any(grads["w"].b[1:] != 0), "layers that aren't read must not train"


@pytest.mark.parametrize("loop", ["python", "fori"])
def test_layers_by_index_in_a_loop(loop):
    def model_fn(params, x):
        layer = lambda i, hidden: jnp.tanh(hidden @ params["w"][i])  # noqa: E731
        if loop == "fori":
            return lax.fori_loop(0, 3, layer, x)
        for i in range(3):
            x = layer(i, x)
        return x

    params = weights(w=(3, 4, 4))
    checked = check(model_fn, params, X)
    assert checked.roles("w") == "stack in out"
    want = X
    for w in effective(params, checked, "w"):
        want = jnp.tanh(want @ w)
    close(checked.output, want, 1e-10)


def test_weight_as_the_left_operand():
    checked = check(lambda p, x: p["w"] @ x, weights(w=(6, 5)), X)
    assert checked.roles("w") == "out in"


def test_weight_that_is_read_twice():
    params = weights(w=(4, 4))
    checked = check(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"], params, X)
    assert checked.operations("w") == ["dot_general", "dot_general"]
    w = effective(params, checked, "w")
    close(checked.output, jnp.tanh(X @ w) @ w, 1e-10)


def test_two_weights_of_one_shape():
    """A lookup by shape would give both the same entry, or one of them none."""
    params = weights(v=(4, 4), w=(4, 4))
    checked = check(lambda p, x: jnp.tanh(x @ p["v"]) @ p["w"], params, X)
    assert sorted(checked.adapter) == ["v", "w"]
    v, w = (effective(params, checked, path) for path in "vw")
    close(checked.output, jnp.tanh(X @ v) @ w, 1e-10)
    swapped = {"v": checked.adapter["w"], "w": checked.adapter["v"]}
    assert not np.allclose(checked.adapted(params, swapped, X), checked.output, rtol=1e-2)


class Tied(nn.Module):
    """The embedding table is the head too."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(7, 4, param_dtype=jnp.float64)
        return embed.attend(jnp.tanh(embed(tokens)))


def test_embedding_that_is_tied_to_the_head():
    tokens = jnp.array([[1, 2, 6], [0, 5, 1]])
    params = Tied().init(jax.random.key(0), tokens)
    checked = check(Tied().apply, params, tokens)
    [path] = checked.adapter
    assert sorted(checked.operations(path)) == ["dot_general", "gather"]
    a, b = checked.adapter[path]
    table = params["params"]["Embed_0"]["embedding"] + ALPHA / RANK * a @ b
    close(checked.output, jnp.tanh(table[tokens]) @ table.T, 1e-10)


def test_attention_kernels_of_three_axes():
    """[d, heads, head_dim] on the way in, [heads, head_dim, d] on the way out."""
    model = nn.MultiHeadDotProductAttention(num_heads=2, param_dtype=jnp.float64)
    x = jnp.asarray(np.random.default_rng(3).normal(size=(2, 5, 6)))
    params = model.init(jax.random.key(0), x)
    checked = check(lambda params, x: model.apply(params, x), params, x, targets=".*kernel")
    assert len(checked.plan) == 4
    for name in ("query", "key", "value"):
        assert checked.roles(f"params/{name}/kernel") == "in out out"
        assert checked.adapter[f"params/{name}/kernel"].a.shape == (6, RANK)
        assert checked.adapter[f"params/{name}/kernel"].b.shape == (RANK, 2, 3)
    assert checked.roles("params/out/kernel") == "in in out"
    assert checked.adapter["params/out/kernel"].a.shape == (2, 3, RANK)


def test_stacked_layers_have_each_their_own_a():
    def model_fn(params, x):
        return lax.scan(lambda hidden, w: (jnp.tanh(hidden @ w), None), x, params["w"])[0]

    params = weights(w=(3, 4, 4))
    checked = check(model_fn, params, X)
    assert checked.adapter["w"].a.shape == (3, 4, RANK)
    want = X
    for w in effective(params, checked, "w"):
        want = jnp.tanh(want @ w)
    close(checked.output, want, 1e-10)
    a = lora.init(jax.random.key(0), params, checked.plan)["w"].a
    assert not np.allclose(a[0], a[1]), "layers must start apart"


@pytest.mark.parametrize("ragged", [False, True])
def test_experts_have_each_their_own_a_and_b(ragged):
    sizes = jnp.array([2, 2, 2], jnp.int32)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(6, 4)))

    def model_fn(params, x):
        if ragged:
            return lax.ragged_dot(x, params["w"], sizes)
        return jnp.einsum("ecd,edf->ecf", x.reshape(3, 2, 4), params["w"]).reshape(6, 5)

    params = weights(w=(3, 4, 5))
    checked = check(model_fn, params, x)
    assert checked.roles("w") == "stack in out"
    experts = zip(x.reshape(3, 2, 4), effective(params, checked, "w"), strict=True)
    close(checked.output, jnp.concatenate([rows @ w for rows, w in experts]), 1e-10)


def test_weight_inside_a_custom_vjp():
    """Its own backward rule decides, and it reaches the adapter: merged there, and told."""

    @jax.custom_vjp
    def product(x, w):
        return x @ w

    def backward(residuals, g):
        x, w = residuals
        return 5 * g @ w.T, 3 * x.T @ g

    product.defvjp(lambda x, w: (x @ w, (x, w)), backward)
    params = weights(w=(4, 6))
    checked = check(lambda p, x: product(x, p["w"]), params, X, merged=["w"])
    a = checked.adapter["w"].a
    g = jnp.cos(checked.output)
    close(checked.grads["w"].b, 3 * ALPHA / RANK * a.T @ (X.T @ g), 1e-10)


def test_plain_model_run_before_the_adapted_one():
    """The model's own compiled functions serve both and must not be taken for each other."""
    layer = jax.jit(lambda w, x: jnp.tanh(x @ w))
    block = jax.checkpoint(lambda w, x: layer(w, x))
    model_fn = jax.jit(lambda p, x: block(p["w"], x))
    params = weights(w=(4, 4))
    before = model_fn(params, X)
    gradient = jax.grad(lambda p: model_fn(p, X).sum())(params)
    check(model_fn, params, X)
    np.testing.assert_array_equal(model_fn(params, X), before)
    close(jax.grad(lambda p: model_fn(p, X).sum())(params), gradient, 1e-12)


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 4, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, hidden):
        return jnp.tanh(self.linear(hidden))


class Scanned(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.vmap(Layer)(rngs.split(3))

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(hidden, layer):
            return layer(hidden)

        return run(x, self.layers)


def test_nnx_scan_over_stacked_layers():
    graphdef, params = nnx.split(Scanned(nnx.Rngs(0)))
    checked = check(lambda p, x: nnx.merge(graphdef, p)(x), params, X, targets=".*kernel")
    assert checked.roles("layers/linear/kernel") == "stack in out"
    a, b = checked.adapter["layers/linear/kernel"]
    want = X
    for w in params["layers"]["linear"]["kernel"][...] + ALPHA / RANK * a @ b:
        want = jnp.tanh(want @ w)
    close(checked.output, want, 1e-10)


def test_raw_linen_einsum():
    model = nn.Einsum((4, 2, 3), "btd,dhk->bhtk", use_bias=False, param_dtype=jnp.float64)
    x = X[None]
    checked = check(model.apply, model.init(jax.random.key(0), x), x)
    assert checked.roles("params/kernel") == "in out out"


def test_bfloat16_compute_over_float32_weights():
    model = nn.Dense(6, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    params = model.init(jax.random.key(0), X)
    checked = check(model.apply, params, X, targets=".*kernel", tolerance=0.02)
    assert checked.output.dtype == jnp.bfloat16
    assert {grad.dtype for grad in jax.tree.leaves(checked.grads)} == {jnp.dtype(jnp.float32)}
    jaxpr = jax.make_jaxpr(checked.adapted)(params, checked.adapter, X)
    products = [eqn for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name == "dot_general"]
    assert len(products) == 3
    for eqn in products:
        assert {var.aval.dtype for var in eqn.invars} == {jnp.dtype(jnp.bfloat16)}


def scanned_decoder_layers(policy):
    tokens = jnp.zeros((1, TOKENS), jnp.int32)

    def model_fn(params, hidden):
        context, choice = attention_context(TINY, tokens, None, None, None)

        @partial(jax.checkpoint, policy=policy)
        def layer(hidden, of_layer):
            return Block(TINY).apply({"params": of_layer}, hidden, None, choice, context)[0], None

        return lax.scan(layer, hidden, params["layers"])[0]

    return model_fn


def saved_by_scan(function, *args, capsys) -> Counter[str]:
    """Dtype and shape of every array that a scan keeps for the backward pass."""
    print_saved_residuals(lambda *args: jnp.sum(function(*args)), *args)
    lines = capsys.readouterr().out.splitlines()
    return Counter(line.split()[0] for line in lines if "output of scan" in line)


def test_remat_that_saves_dots_saves_no_product_with_b(capsys):
    model_fn = scanned_decoder_layers(jax.checkpoint_policies.dots_saveable)
    params = init_params(jax.random.key(0), TINY)
    hidden = jax.random.normal(jax.random.key(1), (1, TOKENS, TINY.hidden_size), jnp.float32)
    targets = ".*_proj/kernel"
    checked = check(model_fn, params, hidden, targets=targets, tolerance=1e-4, std=0.1)
    adapted = partial(checked.adapted, params)
    ours = saved_by_scan(adapted, checked.adapter, hidden, capsys=capsys)
    theirs = saved_by_scan(model_fn, params, hidden, capsys=capsys)
    products = f"f32[{TINY.num_layers},1,{TOKENS},{TINY.intermediate_size}]"
    assert theirs[products] == 2, "the policy must save the products of gate and up"
    rank_sized = f"f32[{TINY.num_layers},{TOKENS},{RANK}]"
    assert ours - theirs == Counter({rank_sized: len(checked.plan)})
    assert not theirs - ours
