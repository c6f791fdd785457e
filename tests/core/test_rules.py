"""Rules for stacking, splitting, scaling and sharding weights, and what has no rule of its own."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax.adapter import shapes_of

from cases import Case, make_input, make_params

KEY = jax.random.key(3)


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


def sharded(body, w_spec, x_spec, out_spec, **options):
    def model_fn(params, x):
        specs = {"in_specs": (w_spec, x_spec), "out_specs": out_spec}
        return jax.shard_map(body, mesh=mesh(), **specs, **options)(params["w"], x)

    return model_fn


def _product(w, x):
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
    "column": (_product, P(None, "model"), P("data"), P("data", "model")),
    "row_and_column": (_row_parallel, P("model", "data"), P(None, "model"), P(None, "data")),
    "replicated": (_product, P(), P("data"), P("data")),
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

CASES = [*STACKED, *VIEWED, *SHARDED, *FALLBACKS]


def planned(case, **config):
    params, x = make_params(case), make_input(case)
    config = {"rank": 2, "alpha": 3.0, "targets": tuple(case.roles), **config}
    return params, x, lora.plan(case.model_fn, params, x, config=lora.LoraConfig(**config))


def random_adapter(plan):
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), shapes_of(plan))


def scalar(model_fn):
    def loss(*args):
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(model_fn(*args)))

    return loss


def evaluated(case, plan, mode="low_rank"):
    """The function's value, and its gradient with respect to everything that has one."""
    loss = scalar(lora.adapt(case.model_fn, plan, mode=mode))
    if "grad" in case.lacks:
        return jax.jit(lambda *args: (loss(*args), {}))
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))


def assert_low_rank_equals_merge(case, params, x, plan):
    adapter = random_adapter(plan)
    low_rank = evaluated(case, plan)
    got, want = (f(params, adapter, x) for f in (low_rank, evaluated(case, plan, "merge")))
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)
    base, _ = low_rank(params, jax.tree.map(jnp.zeros_like, adapter), x)
    assert abs(got[0] - base) > 1e-3, "the adapter must change the output"
    if "grad" not in case.lacks:
        assert all(jnp.abs(factor).max() > 1e-6 for factor in jax.tree.leaves(got[1][1]))


def merged_leaves(plan):
    return {path for path, site in plan.items() if any(use.merged_because for use in site.uses)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_roles_merges_value_and_gradient(case):
    params, x, plan = planned(case)
    assert {path: " ".join(site.roles) for path, site in plan.items()} == case.roles
    assert merged_leaves(plan) == set(case.merged)
    assert ("merged there" in lora.explain(plan, width=300)) == bool(case.merged)
    assert all(site.uses for site in plan.values())
    assert_low_rank_equals_merge(case, params, x, plan)


def named(name):
    return next(case for case in CASES if case.name == name)


def rules_of(case, **values):
    """One target rule a leaf, the values by position."""
    return tuple(
        lora.Rule(path, **{name: each[place] for name, each in values.items()})
        for place, path in enumerate(case.roles)
    )


@pytest.mark.parametrize(
    "name",
    [
        "stack_scan",
        "stack_partly_adapted",
        "joined_stacks_and_one",
        "split_layers",
        "split_outputs",
        "reversed_layers",
        "scaled_by_three",
        "scaled_outputs",
        "scaled_inputs",
        "row_checked",
        "row_and_column_unchecked",
        "scan_inside",
        "gathered",
        "barrier_of_several",
    ],
)
def test_a_magnitude_follows_its_weight(name):
    case = named(name)
    params, x, plan = planned(case, variant="dora")
    assert not merged_leaves(plan)
    assert_low_rank_equals_merge(case, params, x, plan)


def test_variants_that_differ_within_a_stack_are_merged():
    case = named("stack_scan")
    params, x, plan = planned(case, targets=rules_of(case, variant=["lora", "dora", "lora"]))
    assert merged_leaves(plan) == set(case.roles)
    assert_low_rank_equals_merge(case, params, x, plan)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("stack_scan", {"rank": [1, 3, 2]}),
        ("stack_partly_adapted", {"alpha": [1.0, 5.0]}),
        ("stack_of_transposed", {"rank": [3, 1], "alpha": [2.0, 2.0]}),
    ],
)
def test_members_of_a_stack_may_differ_in_rank_and_scale(name, values):
    case = named(name)
    params, x, plan = planned(case, targets=rules_of(case, **values))
    assert not merged_leaves(plan)
    assert_low_rank_equals_merge(case, params, x, plan)


def test_members_of_other_dropout_rates_are_merged_which_dropout_refuses():
    case = named("stack_scan")
    with pytest.raises(lora.InputError, match="'l0' has dropout, which can't act"):
        planned(case, targets=rules_of(case, dropout=[0.1, 0.2, 0.1]))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("fused_columns", "is joined with others along an input or output axis"),
        ("sum_over_stack", "is contracted along an axis on which weights are stacked"),
        ("stack_of_other_roles", "is stacked with weights of other axis roles"),
        ("scaled_everywhere", "is multiplied by an array along input and output axes"),
        ("returned_beside", r"output\['kernel'\]: it is returned by the function"),
        ("returned_by_scan", "leaves a loop, branch or shard_map"),
        ("gathered_along_other_axis", "is gathered where its shards may differ"),
        ("weights_summed", "psum.* has no low-rank rule"),
        ("primitive", "tripled has no low-rank rule"),
        ("pallas_kernel", "pallas_call has no low-rank rule"),
    ],
)
def test_every_member_is_told_why_it_is_merged(name, reason):
    case = named(name)
    params, x = make_params(case), make_input(case)
    config = lora.LoraConfig(rank=2, targets=tuple(case.roles))
    with pytest.raises(lora.InputError, match=reason) as refused:
        lora.plan(case.model_fn, params, x, config=config, strict=True)
    assert all(f"'{path}' is merged at" in str(refused.value) for path in case.roles)


def test_the_users_backward_pass_sees_the_effective_weight():
    case = named("custom_vjp_layer")
    params, x, plan = planned(case)
    adapter = random_adapter(plan)

    def plain(params, adapter, x):
        w = params["w"] + 1.5 * adapter["w"].a @ adapter["w"].b
        return scalar(lambda: jnp.tanh(x @ w))()

    own = jax.grad(plain, argnums=1)(params, adapter, x)["w"]
    got = evaluated(case, plan)(params, adapter, x)[1][1]["w"]
    assert jnp.abs(got.a - own.a).max() > 1e-3, "the layer's gradient is the user's, not autodiff's"


RATE = 0.25


def masks(model_fn, params, x):
    """A function of the dropout key: what is added to a base of zero, A and B being identities."""
    config = lora.LoraConfig(rank=x.shape[-1], alpha=x.shape[-1], targets=".*", dropout=RATE)
    plan = lora.plan(model_fn, params, x, config=config)
    eye = jnp.eye(x.shape[-1])
    adapter = {path: lora.LoraPair(eye, eye) for path in plan}
    adapted = jax.jit(lora.adapt(model_fn, plan))
    return lambda key: adapted(params, adapter, x, dropout_key=key)


@pytest.mark.parametrize("checked", [True, False])
def test_shards_of_the_activation_have_their_own_masks(checked):
    model_fn = sharded(_product, P(), P("data"), P("data"), check_vma=checked)
    params, x = {"w": jnp.zeros((16, 16))}, jnp.ones((8, 16))
    mask = masks(model_fn, params, x)
    first, second = jnp.split(mask(KEY), 2)
    assert (first != second).any()
    np.testing.assert_array_equal(mask(KEY)[:4], first)
    assert (mask(jax.random.key(4))[:4] != first).any()
    np.testing.assert_allclose(mask(None), x)


@pytest.mark.parametrize("checked", [True, False])
def test_an_activation_that_every_device_holds_has_one_mask(checked):
    model_fn = sharded(_product, P(), P(), P(), check_vma=checked)
    mask = masks(model_fn, {"w": jnp.zeros((16, 16))}, jnp.ones((8, 16)))(KEY)
    np.testing.assert_allclose(np.unique(mask), [0, 1 / (1 - RATE)])
    assert len({shard.data.tobytes() for shard in mask.addressable_shards}) == 1


def test_layers_of_a_stack_have_their_own_masks():
    def model_fn(params, x):
        stacked = jnp.stack([params["a"], params["b"]])
        return lax.scan(lambda carry, w: (carry, x @ w), 0, stacked)[1]

    params = {"a": jnp.zeros((16, 16)), "b": jnp.zeros((16, 16))}
    mask = masks(model_fn, params, jnp.ones((8, 16)))
    first, second = mask(KEY)
    assert (first != second).any()
    np.testing.assert_array_equal(mask(KEY)[0], first)
