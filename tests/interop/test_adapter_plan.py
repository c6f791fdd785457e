"""Files by torch module <-> (adapter, plan): the same weights, and the same file again."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interop.adapter_file import FileAdapter, RowAdapter, delta_weight
from interop.adapter_plan import from_plan, to_plan
from interop.conversion import to_torch
from lora_jax.errors import InputError

from module_cases import CASES, SHAPES, TABLE, experts, file_of, merged_by_torch_name, pair, params


def effective(weights, file):
    """The maths of every entry in NumPy, by torch's names."""
    weights = {name: np.array(weight, np.float64) for name, weight in weights.items()}
    for module_name, module in file.modules.items():
        name = module_name if module_name in weights else f"{module_name}.weight"
        turned = module_name == "c" or module_name.endswith("mlp.up")
        weight = weights[name].swapaxes(-1, -2) if turned else weights[name]
        total = weight + delta_weight(module)
        if module.magnitude is not None:
            flat = total.reshape(len(total), -1)
            ratio = module.magnitude / np.linalg.norm(flat, axis=1)
            total = (flat * ratio[:, None]).reshape(total.shape)
        weights[name] = total.swapaxes(-1, -2) if turned else total
    for name, found in file.rows.items():
        weights[f"{name}.weight"][list(found.indices)] = found.rows
    return weights | file.whole


@pytest.mark.parametrize("case", CASES)
def test_plans_compute_what_the_modules_do(case):
    file, tree = file_of(CASES[case]), params()
    adapter, plan = to_plan(file, tree, TABLE)
    base, expected = to_torch(tree, TABLE), effective(to_torch(tree, TABLE), file)
    merged = merged_by_torch_name(tree, adapter, plan)
    changed = [name for name in base if np.abs(expected[name] - base[name]).max() > 0.1]
    assert changed
    for name in base:
        np.testing.assert_allclose(merged[name], expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_the_way_back_gives_the_file_and_then_the_plan(case):
    file, tree = file_of(CASES[case]), params()
    adapter, plan = to_plan(file, tree, TABLE)
    back = from_plan(adapter, plan, TABLE, params=jax.eval_shape(lambda: tree))
    again, plan_again = to_plan(back, tree, TABLE)
    assert plan_again == plan
    assert jax.tree.all(jax.tree.map(np.array_equal, adapter, again))
    assert jax.tree.all(jax.tree.map(np.array_equal, back.modules, file.modules))
    assert back.modules.keys() == file.modules.keys()


def test_modules_of_a_fused_leaf_share_the_ranks_that_all_use():
    adapter, plan = to_plan(file_of(CASES["parts of fused experts"]), params(), TABLE)
    leaf, rng = adapter["moe/gate_up"], np.random.default_rng(0)
    b = jnp.asarray(rng.normal(size=leaf.b.shape), jnp.float32).at[1].set(0)
    adapter = {"moe/gate_up": leaf._replace(b=b)}
    back = from_plan(adapter, plan, TABLE, params=params())
    assert {module.rank for module in back.modules.values()} == {plan["moe/gate_up"].rank}
    again, plan_again = to_plan(back, params(), TABLE)
    first = merged_by_torch_name(params(), adapter, plan)
    second = merged_by_torch_name(params(), again, plan_again)
    for name in first:
        np.testing.assert_allclose(first[name], second[name], rtol=1e-5, atol=1e-5)


MISFITS = {
    "unknown": ({"modules": {"h.3.fc": pair(2, (4,), 6)}}, r"no modules 'h\.3\.fc' \(nearest"),
    "kind": ({"modules": {"embed": pair(2, (11,), 4)}}, "linear in the file and embedding in"),
    "turned": ({"modules": {"h.0.fc": pair(2, (6,), 4)}}, r"takes \(2, 4\) and \(6, 2\)"),
    "wrong rank": (
        {"modules": {"h.0.fc": pair(2, (4,), 6)._replace(b=np.ones((6, 3)))}},
        r"A \(2, 4\) of rank 2 and B \(6, 3\) of rank 3",
    ),
    "integers": (
        {"modules": {"h.0.fc": pair(2, (4,), 6, dtype=np.int32)}},
        r"A of 'h\.0\.fc' is int32.*B of 'h\.0\.fc' is int32",
    ),
    "not finite": (
        {
            "modules": {"h.0.fc": pair(2, (4,), 6, np.inf)},
            "whole": {"h.0.fc.bias": np.full(6, np.nan)},
        },
        r"scale inf.*'h\.0\.fc\.bias' is not finite",
    ),
    "dora somewhere": ({"modules": {"h.1.fc": pair(2, (4,), 6, dora=True)}}, "h.1.fc alone"),
    "bias of B": (
        {"modules": {"h.1.fc": pair(2, (4,), 6)._replace(bias=np.ones(6))}},
        "bias on B, which a plan can't hold",
    ),
    "whole in part": ({"whole": {"h.1.fc.bias": np.ones(6)}}, r"without h\.0\.fc\.bias, h\.2"),
    "whole shape": ({"whole": {"h.1.fc.bias": np.ones(5)}}, r"is \(5,\), the model's is \(6,\)"),
    "unknown parameter": ({"whole": {"h.1.fc.bia": np.ones(5)}}, r"no parameters 'h\.1\.fc\.bia'"),
    "scales of parts": (
        {"modules": experts() | {"h.0.experts.0.gate": pair(2, (4,), 5, 2.0)}},
        r"experts of different.*\(5, 1\.0\), \(5, 2\.0\).*scales differ",
    ),
    "rows outside": (
        {"rows": {"embed": RowAdapter((11, 11), np.ones((2, 4)))}},
        "rows 11, 11 are outside the 11 .* named twice",
    ),
    "rows of no table": ({"rows": {"h.0.fc": RowAdapter((1,), np.ones((1, 4)))}}, "no embedding"),
    "twice": (
        {"modules": {"head": pair(2, (4,), 11)}, "whole": {"head.weight": np.ones((11, 4))}},
        "adapted and trained whole",
    ),
    "nothing": ({}, "holds no adapter"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_named(case):
    content, message = MISFITS[case]
    with pytest.raises(InputError, match=message):
        to_plan(file_of(content), params(), TABLE)


def test_a_tied_table_is_adapted_where_the_file_shares_it():
    tied = params({key: shapes for key, shapes in SHAPES.items() if key != "head"})
    file = file_of(CASES["embedding"])
    with pytest.raises(InputError, match="also the weight of head, which a mine file leaves"):
        to_plan(file, tied, TABLE)
    adapter, plan = to_plan(file._replace(shares_tables=True), tied, TABLE)
    assert from_plan(adapter, plan, TABLE, params=tied).shares_tables
    with pytest.raises(InputError, match="may be shared with a head: give params"):
        from_plan(adapter, plan, TABLE)


def test_what_a_plan_has_that_modules_have_not_is_named():
    file, tree = file_of(CASES["ranks and scales by layer"]), params()
    adapter, plan = to_plan(file, tree, TABLE)
    pair_of_it = adapter["h/fc/kernel"]
    for broken, message in (
        (pair_of_it._replace(a=jnp.ones_like(pair_of_it.a)), r"beyond its ranks \(3, 0, 1\)"),
        (pair_of_it._replace(b=jnp.full_like(pair_of_it.b, jnp.nan)), "not finite"),
    ):
        with pytest.raises(InputError, match=message):
            from_plan({"h/fc/kernel": broken}, plan, TABLE, params=tree)
    with pytest.raises(InputError, match="no known torch module"):
        from_plan(adapter, plan, TABLE._replace(rules=TABLE.rules[:1]), params=tree)


def test_a_hundred_thousand_unknown_modules_are_refused_at_once():
    one = pair(2, (4,), 6)
    file = FileAdapter("mine", {f"x.{k}": one for k in range(100_000)})
    start = time.process_time()
    with pytest.raises(InputError, match="and 99995 more"):
        to_plan(file, params(), TABLE)
    assert time.process_time() - start < 1
