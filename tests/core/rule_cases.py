"""Model functions that stack, split, scale, gather and shard weights, or have no rule for them."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from cases import Case


def mesh():
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def scanned(x, kernels):
    return lax.scan(lambda hidden, kernel: (jnp.tanh(hidden @ kernel), None), x, kernels)[0]


def _stack_scan(params, x):
    return scanned(x, jnp.stack([params["l0"], params["l1"], params["l2"]]))


def _stack_of_transposed(params, x):
    return scanned(x, jnp.stack([params["l0"], params["l1"].T]))


def _stack_last(params, x):
    stacked = jnp.stack([params["l0"], params["l1"]], axis=-1)
    return jnp.einsum("nd,dfl->lnf", x, stacked)


def _stacks_of_stacks(params, x):
    pairs = [jnp.stack([params["l0"], params["l1"]]), jnp.stack([params["l1"], params["l2"]])]
    return jnp.einsum("nd,lmdf->lmnf", x, jnp.stack(pairs))


def _joined_stacks(params, x):
    early, late, one = params["early"], params["late"], params["one"]
    return scanned(x, jnp.concatenate([early, one[None], late]))


def _batched_experts(params, x):
    stacked = jnp.stack([params["l0"], params["l1"]]).astype(x.dtype)
    return jnp.einsum("ecd,edf->ecf", x, stacked)


def _picked_from_stack(params, x):
    stacked = jnp.stack([params["l0"], params["l1"]])
    return jnp.einsum("nd,ndf->nf", x, stacked[jnp.array([1, 0, 1])])


def _indexed_stack(params, x):
    stacked = jnp.stack([params["l0"], params["l1"]])
    return lax.fori_loop(0, 2, lambda i, hidden: jnp.tanh(hidden @ stacked[i]), x)


def _same_leaf_twice(params, x):
    return scanned(x, jnp.stack([params["w"], params["w"]]))


def _fused_columns(params, x):
    q, kv = jnp.split(x @ jnp.concatenate([params["l0"], params["l1"]], axis=1), [3], axis=-1)
    return jnp.sin(q), kv


def _fused_rows(params, x):
    return x @ jnp.concatenate([params["l0"].T, params["l1"].T])


def _sum_over_stack(params, x):
    return jnp.einsum("ld,ldf->f", x, jnp.stack([params["l0"], params["l1"]]))


def _stack_of_other_roles(params, x):
    y = x @ params["l0"] @ params["l1"]
    return y + scanned(x, jnp.stack([params["l0"], params["l1"].T]))


def _sum_over_repeats(params, x):
    return jnp.einsum("bnd,bdf->nf", x, jnp.broadcast_to(params["w"], (2, 4, 3)))


def _returned_beside(params, x):
    return {"y": x @ params["w"], "kernel": params["w"].T}


def _returned_by_scan(params, x):
    def layer(hidden, kernel):
        return jnp.tanh(hidden @ kernel), kernel.T

    return lax.scan(layer, x, params["w"])


def _split(axis):
    def model_fn(params, x):
        first, second = jnp.split(params["w"], 2, axis=axis)
        return x @ first @ second.T

    return model_fn


def _split_inputs(params, x):
    first, second = jnp.split(params["w"], [1])
    return x[:, :1] @ first + jnp.sin(x[:, 1:] @ second)


def _split_layers(params, x):
    early, late = jnp.split(params["w"], [1])
    return scanned(jnp.sin(scanned(x, early)), late)


def _reversed_layers(params, x):
    return scanned(x, params["w"][::-1, :, ::-1])


def _scaled_by_three(params, x):
    w = -(params["bias"] * params["w"] * 0.5) / jnp.sqrt(4.0)
    return x @ (w / params["bias"].reshape(1, 1))


def _scaled_outputs(params, x):
    return x @ (params["w"] * params["gain"])


def _scaled_inputs(params, x):
    return x @ (params["w"] / params["gain"][:, None])


def _scaled_layers(params, x):
    return scanned(x, params["w"] * params["gain"][:, None, None])


def _scaled_everywhere(params, x):
    return x @ (params["w"] * (x.T @ x))


def _squared(params, x):
    return x @ (params["w"] * params["w"])


def _is_a_divisor(params, x):
    return x @ (1 / params["w"])


def _repeated_by_scaling(params, x):
    return x @ (params["w"][:1] * x[0, :, None])


STACKED = [
    Case("stack_scan", _stack_scan, dict.fromkeys(("l0", "l1", "l2"), (4, 4)), (2, 4),
         dict.fromkeys(("l0", "l1", "l2"), "in out")),
    Case("stack_partly_adapted", _stack_scan, dict.fromkeys(("l0", "l1", "l2"), (4, 4)), (2, 4),
         {"l2": "in out", "l0": "in out"}),
    Case("stack_of_transposed", _stack_of_transposed, {"l0": (4, 4), "l1": (4, 4)}, (2, 4),
         {"l0": "in out", "l1": "out in"}),
    Case("stack_last", _stack_last, {"l0": (4, 3), "l1": (4, 3)}, (2, 4),
         {"l0": "in out", "l1": "in out"}),
    Case("stacks_of_stacks", _stacks_of_stacks, dict.fromkeys(("l0", "l1", "l2"), (4, 3)), (2, 4),
         dict.fromkeys(("l0", "l1", "l2"), "in out")),
    Case("joined_stacks", _joined_stacks, {"early": (2, 4, 4), "late": (3, 4, 4), "one": (4, 4)},
         (2, 4), {"early": "stack in out", "late": "stack in out"}),
    Case("joined_stacks_and_one", _joined_stacks,
         {"early": (2, 4, 4), "late": (3, 4, 4), "one": (4, 4)}, (2, 4),
         {"early": "stack in out", "one": "in out"}),
    Case("batched_experts", _batched_experts, {"l0": (4, 3), "l1": (4, 3)}, (2, 5, 4),
         {"l0": "in out", "l1": "in out"}),
    Case("picked_from_stack", _picked_from_stack, {"l0": (4, 5), "l1": (4, 5)}, (3, 4),
         {"l0": "in out", "l1": "in out"}),
    Case("indexed_stack", _indexed_stack, {"l0": (4, 4), "l1": (4, 4)}, (3, 4),
         {"l0": "in out", "l1": "in out"}),
    Case("same_leaf_twice", _same_leaf_twice, {"w": (4, 4)}, (2, 4), {"w": "in out"}),
    Case("fused_columns", _fused_columns, {"l0": (4, 3), "l1": (4, 5)}, (2, 4),
         {"l0": "in out", "l1": "in out"}, ("l0", "l1")),
    Case("fused_rows", _fused_rows, {"l0": (3, 2), "l1": (3, 2)}, (2, 4),
         {"l0": "out in", "l1": "out in"}, ("l0", "l1")),
    Case("sum_over_stack", _sum_over_stack, {"l0": (4, 3), "l1": (4, 3)}, (2, 4),
         {"l0": "in out", "l1": "in out"}, ("l0", "l1")),
    Case("stack_of_other_roles", _stack_of_other_roles, {"l0": (4, 4), "l1": (4, 4)}, (2, 4),
         {"l0": "in out", "l1": "in out"}, ("l0", "l1")),
]  # fmt: skip

VIEWED = [
    Case("split_outputs", _split(1), {"w": (3, 4)}, (2, 3), {"w": "in out"}),
    Case("split_inputs", _split_inputs, {"w": (3, 4)}, (2, 3), {"w": "in out"}),
    Case("split_layers", _split_layers, {"w": (3, 4, 4)}, (2, 4), {"w": "stack in out"}),
    Case("reversed_inputs", lambda p, x: x @ p["w"][::-1], {"w": (3, 4)}, (2, 3), {"w": "in out"}),
    Case("reversed_layers", _reversed_layers, {"w": (3, 4, 4)}, (2, 4), {"w": "stack in out"}),
    Case("scaled_by_three", _scaled_by_three, {"w": (4, 3)}, (2, 4), {"w": "in out"}),
    Case("scaled_then_transposed", lambda p, x: x @ (2 * p["w"]).T, {"w": (3, 4)}, (2, 4),
         {"w": "out in"}),
    Case("scaled_outputs", _scaled_outputs, {"w": (4, 3), "gain": (3,)}, (2, 4), {"w": "in out"}),
    Case("scaled_inputs", _scaled_inputs, {"w": (4, 3), "gain": (4,)}, (2, 4), {"w": "in out"}),
    Case("scaled_layers", _scaled_layers, {"w": (3, 4, 4), "gain": (3,)}, (2, 4),
         {"w": "stack in out"}),
    Case("scaled_everywhere", _scaled_everywhere, {"w": (4, 4)}, (2, 4), {"w": "in out"}, ("w",)),
    Case("squared", _squared, {"w": (4, 3)}, (2, 4), {"w": "in out"}, ("w",)),
    Case("is_a_divisor", _is_a_divisor, {"w": (4, 3)}, (2, 4), {"w": "in out"}, ("w",)),
    Case("repeated_by_scaling", _repeated_by_scaling, {"w": (4, 3)}, (2, 4), {"w": "in out"},
         ("w",)),
    Case("sum_over_repeats", _sum_over_repeats, {"w": (4, 3)}, (2, 5, 4), {"w": "in out"}, ("w",)),
    Case("returned_beside", _returned_beside, {"w": (4, 3)}, (2, 4), {"w": "in out"}, ("w",)),
    Case("returned_by_scan", _returned_by_scan, {"w": (3, 4, 4)}, (2, 4), {"w": "stack in out"},
         ("w",)),
]  # fmt: skip


def _mapped_loop(params, x):
    def layers(w, x):
        return lax.fori_loop(0, 3, lambda i, hidden: jnp.tanh(hidden @ w[i]), x)

    return jax.vmap(layers)(params["w"], x)


def _mapped_twice_over_a_loop(params, x):
    inner = lambda w: _mapped_loop({"w": w}, x)  # noqa: E731
    return jax.vmap(inner, in_axes=1)(params["w"])


def _layer_of_each_stack(params, x):
    numbers = jnp.array([2, 0])
    return jax.vmap(lambda w, i, x: x @ w[i])(params["w"], numbers, x)


def _expert_of_each_row(params, x):
    numbers = jnp.array([1, 0, 1, 2, 2])
    return jax.vmap(lambda i, row: row @ params["w"][i])(numbers, x)


def _expert_of_each_row_of_one(params, x):
    return jax.vmap(lambda i, row: row @ params["w"][i])(jnp.zeros(5, jnp.int32), x)


def _picked_by_two(params, x):
    layer, expert = jnp.array([[1, 0, 0], [1, 1, 0]]), jnp.array([2, 0, 1])
    return jnp.einsum("bnd,bndf->bnf", x, params["w"][layer, expert])


def _picked_by_two_apart(params, x):
    picked = params["w"][jnp.array([1, 0]), :, jnp.array([2, 0])]
    return jnp.einsum("nd,ndf->nf", x, picked)


def _permuted_heads(params, x):
    return jnp.einsum("td,dhk->thk", x, params["w"][:, jnp.array([2, 0, 1])])


def _windows(params, x):
    start = jnp.array([0, 1])
    window = lambda i: lax.dynamic_slice_in_dim(params["w"], i, 2)  # noqa: E731
    return jnp.einsum("nld,nldf->nlf", x, jax.vmap(window)(start))


def _windows_of_each_stack(params, x):
    window = lambda w: lax.dynamic_slice_in_dim(w, x.astype(int)[0, 0, 0], 2)  # noqa: E731
    return jnp.einsum("nld,nldf->nlf", x, jax.vmap(window)(params["w"]))


def _windows_of_inputs(params, x):
    window = lambda i: lax.dynamic_slice_in_dim(params["w"], i, 2)  # noqa: E731
    return jnp.einsum("nd,ndf->nf", x, jax.vmap(window)(jnp.array([0, 1])))


def _tables(params, x):
    ids = jnp.array([[6, 1, 1], [0, 6, 2]])
    rows = jax.vmap(lambda w, ids: jnp.sin(w[ids]))(params["w"], ids)
    return rows @ x + jnp.einsum("evd,edf->evf", params["w"], x)[:, :3]


def _rows_of_one_table(params, x):
    rows = jax.vmap(lambda i: jnp.sin(params["w"][i]))(jnp.array([6, 1, 1]))
    return rows @ x + jnp.sin(params["w"] @ x)[:3]


def _grid(params, x):
    return jnp.sin(params["w"][jnp.array([1, 0, 1]), jnp.array([2, 2, 0])]) * x


def _along_an_axis(params, x):
    ids = jnp.array([[0, 1, 2], [2, 1, 1]])
    return x @ jnp.take_along_axis(params["w"], ids, 0)


def _out_of_bounds(**options):
    """Row 5 of 4, and row -5."""

    def model_fn(params, x):
        rows = params["w"].at[jnp.array([[0, 5], [3, -5]])].get(**options)
        return jnp.sin(jnp.nan_to_num(rows)) * x

    return model_fn


def _picked_out_of_bounds(**options):
    def model_fn(params, x):
        picked = params["w"].at[jnp.array([2, 7, 0])].get(**options)
        return jnp.einsum("nd,ndf->nf", x, picked)

    return model_fn


GATHERED = [
    Case("mapped_loop", _mapped_loop, {"w": (2, 3, 4, 4)}, (2, 5, 4), {"w": "stack stack in out"}),
    Case("mapped_twice_over_a_loop", _mapped_twice_over_a_loop, {"w": (2, 2, 3, 4, 4)}, (2, 5, 4),
         {"w": "stack stack stack in out"}),
    Case("layer_of_each_stack", _layer_of_each_stack, {"w": (2, 3, 4, 3)}, (2, 5, 4),
         {"w": "stack stack in out"}),
    Case("expert_of_each_row", _expert_of_each_row, {"w": (3, 4, 2)}, (5, 4),
         {"w": "stack in out"}),
    Case("expert_of_each_row_of_one", _expert_of_each_row_of_one, {"w": (1, 4, 2)}, (5, 4),
         {"w": "stack in out"}),
    Case("picked_by_two", _picked_by_two, {"w": (2, 3, 4, 5)}, (2, 3, 4),
         {"w": "stack stack in out"}),
    Case("picked_by_two_apart", _picked_by_two_apart, {"w": (2, 4, 3, 5)}, (2, 4),
         {"w": "stack in stack out"}),
    Case("permuted_heads", _permuted_heads, {"w": (4, 3, 2)}, (2, 4), {"w": "in out out"}),
    Case("windows", _windows, {"w": (3, 4, 5)}, (2, 2, 4), {"w": "stack in out"}),
    Case("windows_of_inputs", _windows_of_inputs, {"w": (3, 5)}, (2, 2), {"w": "in out"}, ("w",)),
    Case("windows_of_each_stack", _windows_of_each_stack, {"w": (2, 3, 4, 5)}, (2, 2, 4),
         {"w": "stack stack in out"}),
    Case("tables", _tables, {"w": (2, 7, 4)}, (2, 4, 3), {"w": "stack in out"}),
    Case("rows_of_one_table", _rows_of_one_table, {"w": (7, 4)}, (4, 3), {"w": "in out"}),
    Case("grid", _grid, {"w": (2, 3, 4)}, (3, 4), {"w": "in in out"}),
    Case("along_an_axis", _along_an_axis, {"w": (4, 3)}, (5, 2), {"w": "in out"}, ("w",)),
    Case("rows_clipped", _out_of_bounds(mode="clip"), {"w": (4, 3)}, (2, 2, 3), {"w": "in out"}),
    Case("rows_filled", _out_of_bounds(mode="fill", fill_value=0), {"w": (4, 3)}, (2, 2, 3),
         {"w": "in out"}),
    Case("rows_filled_with_a_number", _out_of_bounds(mode="fill", fill_value=-1), {"w": (4, 3)},
         (2, 2, 3), {"w": "in out"}),
    Case("rows_filled_with_nan", _out_of_bounds(mode="fill"), {"w": (4, 3)}, (2, 2, 3),
         {"w": "in out"}),
    Case("entries_clipped", _picked_out_of_bounds(mode="clip"), {"w": (3, 4, 5)}, (3, 4),
         {"w": "stack in out"}),
    Case("entries_filled_with_a_number", _picked_out_of_bounds(mode="fill", fill_value=2),
         {"w": (3, 4, 5)}, (3, 4), {"w": "stack in out"}),
]  # fmt: skip


def sharded(body, w_spec, x_spec, out_spec, **options):
    def model_fn(params, x):
        specs = {"in_specs": (w_spec, x_spec), "out_specs": out_spec}
        return jax.shard_map(body, mesh=mesh(), **specs, **options)(params["w"], x)

    return model_fn


def product(w, x):
    return x @ w


def _row_parallel(w, x):
    return lax.psum(x @ w, "model")


def _scan_of_row_parallel(w, x):
    def layer(hidden, kernel):
        y = lax.psum(hidden @ kernel.astype(hidden.dtype), "model")
        mine = lax.axis_index("model") * hidden.shape[-1]
        return jnp.tanh(lax.dynamic_slice_in_dim(y, mine, hidden.shape[-1], 1)), None

    return lax.scan(jax.checkpoint(layer), x, w)[0]


def _gathered(w, x):
    return x @ lax.all_gather(w, "data", axis=0, tiled=True)


def _gathered_along_other_axis(w, x):
    return x @ lax.all_gather(w, "data", axis=1, tiled=True)


def _weights_summed(w, x):
    return x @ lax.psum(w, "model")


def _made_varying(w, x):
    return x @ lax.pcast(w, ("data",), to="varying")


def _weight_leaves(w, x):
    return w.T * 2


def _nested_maps(params, x):
    def outer(w, x):
        inner = jax.shard_map(_row_parallel, in_specs=(P("model"), P(None, "model")),
                              out_specs=P(), axis_names={"model"})  # fmt: skip
        return inner(w, x)

    specs = {"in_specs": (P(), P("data")), "out_specs": P("data")}
    return jax.shard_map(outer, mesh=mesh(), axis_names={"data"}, **specs)(params["w"], x)


def _closed_over(params, x):
    body = lambda x: jnp.tanh(x @ params["w"])  # noqa: E731
    return jax.shard_map(body, mesh=mesh(), in_specs=P("data"), out_specs=P("data"))(x)


def _map_in_scan(params, x):
    layer = sharded(_row_parallel, P("model"), P("data", "model"), P("data"))
    return lax.scan(lambda h, w: (jnp.tanh(layer({"w": w}, h)), None), x, params["w"])[0]


def _stacked_experts(params, x):
    stacked = jnp.stack([params["w"], params["v"]])
    layer = sharded(partial(jnp.einsum, "edf,end->enf"), P("data", None, "model"), P("data"),
                    P("data", None, "model"))  # fmt: skip
    return layer({"w": stacked}, x)


def _parallel_over_all(w, x):
    return lax.psum(x @ w, ("data", "model"))


KINDS = {
    "row": (_row_parallel, P("model", None), P("data", "model"), P("data")),
    "column": (product, P(None, "model"), P("data"), P("data", "model")),
    "row_and_column": (_row_parallel, P("model", "data"), P(None, "model"), P(None, "data")),
    "replicated": (product, P(), P("data"), P("data")),
    "both_axes": (_parallel_over_all, P(("data", "model")), P(None, ("data", "model")), P()),
}

SHARDED = [
    *(
        Case(f"{name}_{checking}", sharded(*kind, check_vma=checking == "checked"),
             {"w": (8, 8)}, (4, 8), {"w": "in out"})
        for name, kind in KINDS.items()
        for checking in ("checked", "unchecked")
    ),
    Case("scan_inside", sharded(_scan_of_row_parallel, P(None, "model"), P("data", "model"),
         P("data", "model")), {"w": (3, 8, 8)}, (4, 8), {"w": "stack in out"}),
    Case("map_in_scan", _map_in_scan, {"w": (3, 8, 8)}, (4, 8), {"w": "stack in out"}),
    Case("nested", _nested_maps, {"w": (8, 3)}, (4, 8), {"w": "in out"}, lacks=("grad",)),
    Case("closed_over", _closed_over, {"w": (8, 3)}, (4, 8), {"w": "in out"}),
    Case("stacked_experts", _stacked_experts, {"w": (3, 8), "v": (3, 8)}, (2, 5, 3),
         {"w": "in out", "v": "in out"}),
    Case("made_varying", sharded(_made_varying, P(), P("data"), P("data")), {"w": (8, 3)}, (4, 8),
         {"w": "in out"}),
    Case("gathered", sharded(_gathered, P("data", "model"), P("data"), P("data", "model")),
         {"w": (8, 8)}, (4, 8), {"w": "in out"}),
    Case("gathered_unchecked", sharded(_gathered, P("data", "model"), P("data"),
         P("data", "model"), check_vma=False), {"w": (8, 8)}, (4, 8), {"w": "in out"}, ("w",)),
    Case("gathered_along_other_axis", sharded(_gathered_along_other_axis, P("data"), P(None,
         "data"), P("data")), {"w": (8, 3)}, (4, 8), {"w": "in out"}, ("w",)),
    Case("weights_summed", sharded(_weights_summed, P("model"), P(None), P(None)), {"w": (8, 3)},
         (4, 2), {"w": "in out"}, ("w",)),
    Case("weight_leaves", sharded(_weight_leaves, P("model"), P(None), P(None, "model")),
         {"w": (8, 3)}, (4, 2), {"w": "in out"}, ("w",)),
]  # fmt: skip


def _doubled_in_pallas(w_ref, out_ref):
    out_ref[...] = 2 * w_ref[...]


def _pallas_kernel(params, x):
    shape = jax.ShapeDtypeStruct(params["w"].shape, params["w"].dtype)
    return x @ pallas.pallas_call(_doubled_in_pallas, shape, interpret=True)(params["w"])


tripled_p = Primitive("tripled")
tripled_p.def_impl(lambda w: 3 * w)
tripled_p.def_abstract_eval(lambda w: w)
ad.deflinear2(tripled_p, lambda cotangent, _: [tripled_p.bind(cotangent)])
batching.defvectorized(tripled_p)
mlir.register_lowering(tripled_p, mlir.lower_fun(lambda w: 3 * w, multiple_results=False))


@jax.custom_vjp
def _clipped_layer(w, x):
    return jnp.tanh(x @ w)


def _clipped_forward(w, x):
    return _clipped_layer(w, x), (w, x)


def _clipped_backward(saved, cotangent):
    """Not the layer's own gradient: the user's word on it must hold."""
    w, x = saved
    clipped = jnp.clip(cotangent, -0.5, 0.5)
    return x.T @ clipped, clipped @ w.T


_clipped_layer.defvjp(_clipped_forward, _clipped_backward)


@jax.custom_jvp
def _sine(w):
    return jnp.sin(w)


_sine.defjvp(lambda primals, tangents: (jnp.sin(primals[0]), 3 * tangents[0]))


def _barrier_of_several(params, x):
    w, v, ids, x = lax.optimization_barrier((params["w"], params["v"], jnp.arange(2), x))
    return x[ids] @ w @ v


def _constrained(params, x):
    sharding = NamedSharding(mesh(), P("data", "model"))
    return x @ lax.with_sharding_constraint(params["w"], sharding)


def _branch_returns_weight(params, x):
    w = lax.cond(x.sum() > -1e9, lambda w: w, lambda w: 2 * w, params["w"])
    return x @ w


def _switch_returns_weight(params, x):
    branches = [lambda w: -w, lambda w: w.T, lambda w: w]
    return x @ lax.switch(1, branches, params["w"])


FALLBACKS = [
    Case("pallas_kernel", _pallas_kernel, {"w": (4, 3)}, (2, 4), {"w": "in out"}, ("w",),
         lacks=("grad",)),
    Case("primitive", lambda p, x: x @ tripled_p.bind(p["w"]), {"w": (4, 3)}, (2, 4),
         {"w": "in out"}, ("w",)),
    Case("custom_vjp_layer", lambda p, x: _clipped_layer(p["w"], x), {"w": (4, 3)}, (2, 4),
         {"w": "in out"}, ("w",)),
    Case("custom_jvp", lambda p, x: x @ _sine(p["w"]), {"w": (4, 3)}, (2, 4), {"w": "in out"},
         ("w",)),
    Case("barrier_of_several", _barrier_of_several, {"w": (4, 3), "v": (3, 4)}, (3, 4),
         {"w": "in out", "v": "in out"}),
    Case("constrained", _constrained, {"w": (4, 8)}, (2, 4), {"w": "in out"}),
    Case("branch_returns_weight", _branch_returns_weight, {"w": (4, 3)}, (2, 4), {"w": "in out"},
         ("w",)),
    Case("switch_returns_weight", _switch_returns_weight, {"w": (4, 4)}, (2, 4), {"w": "in out"},
         ("w",)),
]  # fmt: skip

CASES = [*STACKED, *VIEWED, *GATHERED, *SHARDED, *FALLBACKS]
