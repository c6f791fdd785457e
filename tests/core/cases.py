"""Model functions that use an adapted weight, each in another way."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Case(NamedTuple):
    """A function of parameters, its inputs, and the roles that its weight should get."""

    name: str
    model_fn: Callable
    shapes: dict[str, tuple[int, ...]]
    x: tuple[int, ...]
    roles: dict[str, str]
    """Of the leaves that are targeted."""
    merged: tuple[str, ...] = ()
    """Leaves that some operation needs merged at its place."""
    axes: tuple[tuple[str, str], ...] = ()
    lacks: tuple[str, ...] = ()
    """JAX's own gaps: ``grad`` (no reverse mode), ``vmap`` (no batching rule)."""


def _scan(params, x):
    def layer(hidden, kernel):
        return jnp.tanh(hidden @ kernel), None

    return lax.scan(layer, x, params["w"])[0]


def _scan_remat_cast(params, x):
    @jax.checkpoint
    def layer(hidden, kernel):
        return jnp.tanh(hidden @ kernel.astype(hidden.dtype)), hidden.sum()

    return lax.scan(layer, x, params["w"])


def _scan_const(params, x):
    def step(hidden, scale):
        return jnp.tanh(hidden @ params["w"]) * scale, None

    return lax.scan(step, x, jnp.arange(1.0, 4.0, dtype=x.dtype))[0]


def _fori_dynamic_index(params, x):
    def step(i, hidden):
        return jnp.tanh(hidden @ params["w"][i])

    return lax.fori_loop(0, 3, step, x)


def _indexed_layers(params, x):
    for i in range(3):
        x = jnp.tanh(x @ params["w"][i])
    return x


def _iterated_layers(params, x):
    for kernel in params["w"]:
        x = jnp.tanh(x @ kernel)
    return x


def _while(params, x):
    def more(state):
        return state[0] < 3

    def step(state):
        count, hidden = state
        return count + 1, jnp.tanh(hidden @ params["w"])

    return lax.while_loop(more, step, (0, x))[1]


def _cond(params, x):
    return lax.cond(x.sum() > -1e9, lambda y: y @ params["w"], lambda y: 2 * y, x)


def _switch(params, x):
    branches = [lambda y: y, lambda y: y @ params["w"], lambda y: y @ params["w"].T]
    return lax.switch(1, branches, x)


def _tied(params, x):
    hidden = params["w"][jnp.arange(6).reshape(2, 3)] + x.sum()
    return hidden @ params["w"].T


def _take(params, x):
    return jnp.take(params["w"], jnp.array([[1, 2], [0, 5]]), axis=0) * x.sum()


def _lookup_columns(params, x):
    return jnp.take(params["w"], jnp.array([1, 0, 3]), axis=1) * x.sum()


def _fused_split(params, x):
    gate, up = params["w"][:, :3], params["w"][:, 3:]
    return jax.nn.silu(x @ gate) * (x @ up)


def _heads_out(params, x):
    return jnp.einsum("btd,dhk->bhtk", x, params["w"])


def _heads_in(params, x):
    return jnp.einsum("bthk,hkd->btd", x, params["w"])


def _reshaped_heads(params, x):
    return x @ params["w"].reshape(4, 6)


def _experts(params, x):
    return jnp.einsum("ecd,edf->ecf", x, params["w"])


def _picked_experts(params, x):
    return jnp.einsum("nd,ndf->nf", x, params["w"][jnp.array([2, 0, 1, 1, 0])])


def _weight_norm(params, x):
    w = params["w"]
    return x @ (w / jnp.linalg.norm(w, axis=0))


def _inner_jit(params, x):
    return jax.jit(lambda w, y: jnp.sin(y @ w))(params["w"], x)


def _inner_vmap(params, x):
    return jax.vmap(lambda row: params["w"] @ row)(x)


def _custom_jvp_between(params, x):
    return jax.nn.relu(x @ params["w"]) @ params["v"]


def _product_of_two(params, x):
    return x @ (params["w"] @ params["v"])


def _scan_of_rows(params, x):
    def step(total, row_and_x):
        row, value = row_and_x
        return total + jnp.outer(value, row), None

    start = jnp.zeros((2, 5), x.dtype)
    return lax.scan(step, start, (params["w"], x.T))[0] + x @ params["w"]


def _in_branch_of_scan(params, x):
    def layer(hidden, kernel):
        return lax.cond(
            hidden.sum() > 0, lambda h: h @ kernel, lambda h: h @ kernel.T, hidden
        ), None

    return lax.scan(layer, x, params["w"])[0]


def _conv(dims, **options):
    spatial = len(dims[0]) - 2
    usual = {"window_strides": (1,) * spatial, "padding": "SAME", "dimension_numbers": dims}

    def model_fn(params, x):
        return lax.conv_general_dilated(x, params["w"], **{**usual, **options})

    return model_fn


def _ragged_experts(params, x):
    return lax.ragged_dot(x, params["w"], jnp.array([2, 0, 3], jnp.int32))


def _broadcast_weight(params, x):
    repeated = jnp.broadcast_to(params["w"], (2, 4, 6))
    return jnp.einsum("bnd,bdf->bnf", x, repeated)


def _custom_vjp_on_weight(params, x):
    @jax.custom_vjp
    def scaled(w):
        return 2 * w

    scaled.defvjp(lambda w: (2 * w, None), lambda _, g: (2 * g,))
    return x @ scaled(params["w"])


def _name_and_barrier(params, x):
    from jax.ad_checkpoint import checkpoint_name

    return x @ checkpoint_name(lax.optimization_barrier(params["w"]), "kernel")


def _fortran_order(params, x):
    return x @ params["w"].ravel(order="F").reshape(4, 4)


def _fortran_square(params, x):
    return x @ jnp.reshape(params["w"], (4, 4), order="F")


def _one_batched_expert(params, x):
    picked = jax.vmap(lambda w, i: w[i])(params["w"], jnp.zeros(1, jnp.int32))
    return x @ picked.T


def _one_head(params, x):
    return jnp.einsum("thd,hdo->to", x[:, None], params["w"].reshape(1, 4, 6))


def _shared_jit(params, x):
    product = jax.jit(lambda w, y: y @ w)
    return product(params["w"].T, product(params["w"], x))


def _flipped(params, x):
    return x @ params["w"][::-1]


CASES = [
    Case("dense", lambda p, x: x @ p["w"], {"w": (4, 6)}, (2, 3, 4), {"w": "in out"}),
    Case("transposed", lambda p, x: x @ p["w"].T, {"w": (6, 4)}, (2, 3, 4), {"w": "out in"}),
    Case("weight_first", lambda p, x: p["w"] @ x, {"w": (6, 4)}, (4, 5), {"w": "out in"}),
    Case("vector_input", lambda p, x: x @ p["w"], {"w": (4, 6)}, (4,), {"w": "in out"}),
    Case("read_twice", lambda p, x: x @ p["w"] @ p["w"], {"w": (4, 4)}, (2, 4), {"w": "in out"}),
    Case("scan", _scan, {"w": (3, 4, 4)}, (2, 4), {"w": "stack in out"}),
    Case("scan_remat_cast", _scan_remat_cast, {"w": (3, 4, 4)}, (2, 4), {"w": "stack in out"}),
    Case("scan_const", _scan_const, {"w": (4, 4)}, (2, 4), {"w": "in out"}),
    Case("scan_of_rows", _scan_of_rows, {"w": (4, 5)}, (2, 4), {"w": "in out"}, ("w",)),
    Case("scan_of_branches", _in_branch_of_scan, {"w": (3, 4, 4)}, (2, 4), {"w": "stack out in"}),
    Case("fori_index", _fori_dynamic_index, {"w": (3, 4, 4)}, (2, 4), {"w": "stack in out"}),
    Case("indexed_layers", _indexed_layers, {"w": (3, 4, 4)}, (2, 4), {"w": "stack in out"}),
    Case("iterated_layers", _iterated_layers, {"w": (3, 4, 4)}, (2, 4), {"w": "stack in out"}),
    Case("while", _while, {"w": (4, 4)}, (2, 4), {"w": "in out"}, lacks=("grad",)),
    Case("cond", _cond, {"w": (4, 4)}, (2, 4), {"w": "in out"}),
    Case("switch", _switch, {"w": (4, 4)}, (2, 4), {"w": "in out"}),
    Case("tied_embedding", _tied, {"w": (7, 4)}, (1,), {"w": "in out"}),
    Case("take", _take, {"w": (7, 4)}, (1,), {"w": "in out"}),
    Case("lookup_columns", _lookup_columns, {"w": (7, 4)}, (1,), {"w": "out in"}),
    Case("fused_split", _fused_split, {"w": (4, 6)}, (2, 4), {"w": "in out"}),
    Case("heads_out", _heads_out, {"w": (4, 2, 3)}, (2, 3, 4), {"w": "in out out"}),
    Case("heads_in", _heads_in, {"w": (2, 3, 4)}, (2, 5, 2, 3), {"w": "in in out"}),
    Case("reshaped_heads", _reshaped_heads, {"w": (4, 2, 3)}, (2, 4), {"w": "in out out"}),
    Case("experts", _experts, {"w": (3, 4, 5)}, (3, 2, 4), {"w": "stack in out"}),
    Case("picked_experts", _picked_experts, {"w": (3, 4, 5)}, (5, 4), {"w": "stack in out"}),
    Case("weight_norm", _weight_norm, {"w": (4, 6)}, (2, 4), {"w": "in out"}, ("w",)),
    Case("inner_jit", _inner_jit, {"w": (4, 6)}, (2, 4), {"w": "in out"}),
    Case("inner_vmap", _inner_vmap, {"w": (6, 4)}, (2, 4), {"w": "out in"}),
    Case("two_weights", _custom_jvp_between, {"w": (4, 6), "v": (6, 4)}, (2, 4),
         {"w": "in out", "v": "in out"}),
    Case("product_of_two", _product_of_two, {"w": (4, 6), "v": (6, 4)}, (2, 4),
         {"w": "in out", "v": "in out"}, ("w",)),
    Case("dense_expert_mixture", lambda p, x: jnp.einsum("td,edf->tef", x, p["w"]),
         {"w": (3, 4, 5)}, (2, 4), {"w": "stack in out"}, axes=(("w", "stack in out"),)),
    Case("conv_nhwc", _conv(("NHWC", "HWIO", "NHWC")), {"w": (3, 3, 2, 4)}, (2, 5, 5, 2),
         {"w": "in in in out"}),
    Case("conv_nchw_strided", _conv(("NCHW", "OIHW", "NCHW"), window_strides=(2, 1)),
         {"w": (4, 2, 3, 2)}, (2, 2, 6, 5), {"w": "out in in in"}),
    Case("conv_dilated", _conv(("NWC", "WIO", "NWC"), rhs_dilation=(2,), padding=[(1, 3)]),
         {"w": (3, 2, 4)}, (2, 7, 2), {"w": "in in out"}),
    Case("conv_transposed",
         _conv(("NHWC", "HWIO", "NHWC"), lhs_dilation=(2, 2), padding=[(2, 1)] * 2),
         {"w": (3, 3, 2, 4)}, (1, 4, 4, 2), {"w": "in in in out"}),
    Case("conv_groups", _conv(("NHWC", "HWIO", "NHWC"), feature_group_count=2),
         {"w": (3, 3, 2, 6)}, (2, 4, 4, 4), {"w": "in in in out"}),
    Case("conv_depthwise_nchw", _conv(("NCHW", "OIHW", "NCHW"), feature_group_count=3),
         {"w": (6, 1, 3, 3)}, (2, 3, 4, 4), {"w": "out in in in"}),
    Case("conv_3d", _conv(("NDHWC", "DHWIO", "NDHWC")), {"w": (2, 2, 1, 2, 3)}, (1, 3, 3, 3, 2),
         {"w": "in in in in out"}),
    Case("ragged_experts", _ragged_experts, {"w": (3, 4, 5)}, (5, 4), {"w": "stack in out"},
         lacks=("vmap",)),
    Case("broadcast_weight", _broadcast_weight, {"w": (4, 6)}, (2, 3, 4), {"w": "in out"}),
    Case("custom_vjp_on_weight", _custom_vjp_on_weight, {"w": (4, 6)}, (2, 4), {"w": "in out"},
         ("w",)),
    Case("name_and_barrier", _name_and_barrier, {"w": (4, 6)}, (2, 4), {"w": "in out"}),
    Case("flipped", _flipped, {"w": (4, 6)}, (2, 4), {"w": "in out"}),
    Case("fortran_order", _fortran_order, {"w": (4, 4)}, (2, 4), {"w": "in out"}, ("w",)),
    Case("fortran_square", _fortran_square, {"w": (4, 4)}, (2, 4), {"w": "in out"}),
    Case("one_batched_expert", _one_batched_expert, {"w": (1, 3, 4)}, (2, 4), {"w": "stack in out"},
         axes=(("w", "stack in out"),)),
    Case("one_head", _one_head, {"w": (4, 6)}, (2, 4), {"w": "in out"}),
    Case("shared_jit", _shared_jit, {"w": (4, 4)}, (2, 4), {"w": "in out"}),
]  # fmt: skip


def make_params(case: Case, dtype=jnp.float64):
    """Random parameters for a case, an adapted weight and a bias that is left alone."""
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=s), dtype) for name, s in case.shapes.items()}
    return {**params, "bias": jnp.asarray(rng.normal(), dtype)}


def make_input(case: Case, dtype=jnp.float64):
    """The activation that goes with a case."""
    return jnp.asarray(np.random.default_rng(1).normal(size=case.x), dtype)
