"""One step in three places: the same losses, the same adapter, and the memory that was promised."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import lora_jax as lora
from lora_jax.data.batches import Batch
from lora_jax.errors import InputError
from lora_jax.models.config import DecoderConfig
from lora_jax.models.decoder import param_shapes
from lora_jax.models.forms import AttentionForm, ExpertsForm, LayerKind, MLPForm, NormForm
from lora_jax.train.losses import LossSum
from lora_jax.train.mesh import make_mesh
from lora_jax.train.placement import Placement, on_mesh, on_one_device, on_replicas
from lora_jax.train.sharding import adapter_specs, param_specs, state_specs
from lora_jax.train.sharding_rules import Rule, leaf_shardings
from lora_jax.train.sharding_table import explain_sharding
from lora_jax.train.step import TrainState, init_state, make_step

from tiny_task import (
    MICRO_BATCHES,
    batches,
    largest_difference,
    mean_of_means,
    optimizer,
    require_equal,
    tiny_task,
    trained,
)

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs eight CPU devices")


@pytest.fixture(scope="module")
def task():
    return tiny_task()


@pytest.fixture(scope="module")
def run(task):
    """Twenty updates in a place, made once."""
    return cache(lambda place: trained(PLACES[place](task), task))


def mesh_of(task, rules=(), **sizes):
    return on_mesh(make_mesh(**sizes), task.params, task.adapter, task.plan, rules)


PLACES = {
    "one device": lambda task: on_one_device(),
    "pmap": lambda task: on_replicas(),
    "8x1": lambda task: mesh_of(task, data=8),
    "4x2": lambda task: mesh_of(task, data=4, fsdp=2),
    "2x2x2": lambda task: mesh_of(task, data=2, fsdp=2, tensor=2),
}


def test_the_task_is_uneven(task):
    tokens = np.stack([batch.weights.sum(axis=1) for batch in batches(task)])
    assert tokens.shape == (20, MICRO_BATCHES)
    assert (tokens.max(axis=1) > 1.2 * tokens.min(axis=1)).all()
    assert (tokens == 0).any(), "the last update of an epoch has empty micro-batches"


def test_one_pass_equals_accumulation(task, run):
    step = jax.jit(make_step(task.loss_fn, optimizer()), donate_argnums=0)
    state, losses = init_state(jax.tree.map(jnp.array, task.adapter), optimizer()), []
    for batch in batches(task, batch_size=MICRO_BATCHES, accumulate=None):
        state, metrics = step(state, task.params, batch)
        losses.append(float(metrics.loss))
    expected = run("one device")
    require_equal(expected._replace(losses=np.array(losses), adapter=state.adapter), expected)


@pytest.mark.parametrize("place", [*PLACES][1:])
def test_places_compute_the_same(run, place):
    require_equal(run(place), run("one device"))


@pytest.mark.parametrize("place", ["one device", "pmap"])
def test_averaging_the_means_of_devices_would_be_found(task, run, place):
    right = run(place)
    wrong = trained(PLACES[place](task), task, mean_of_means, right.program)
    assert largest_difference(wrong, right) > 1e-3


@pytest.mark.parametrize("place", ["pmap", "2x2x2"])
def test_donated_bytes_are_three_adapters(run, place):
    state = run(place).state
    adapter = sum(leaf.addressable_data(0).nbytes for leaf in jax.tree.leaves(state.adapter))
    counts = sum(leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.ndim == 0)
    donated = run(place).program.memory_analysis().alias_size_in_bytes
    assert donated == 3 * adapter + counts


def test_the_state_stays_where_it_was_put(task, run):
    before = PLACES["2x2x2"](task).put_state(init_state(task.adapter, optimizer()))
    for old, new in zip(*map(jax.tree.leaves, (before, run("2x2x2").state)), strict=True):
        assert new.sharding.is_equivalent_to(old.sharding, old.ndim)


def test_positions_that_are_predicted_stay_on_their_device(run):
    assert collectives(run("8x1").program) == {"all-reduce"}


def test_fsdp_gathers_weights_and_moves_no_activations(run):
    assert collectives(run("4x2").program) == {"all-gather", "all-reduce"}


def test_evaluation_is_the_same_everywhere():
    losses = []
    for place in SMALL_PLACES.values():
        small = small_task(place)
        losses.append(small.place.compile_loss(small.loss_fn)(small.state.adapter, *small.inputs))
    np.testing.assert_allclose(losses[1:], [losses[0]] * (len(losses) - 1), rtol=1e-6)


@pytest.mark.parametrize("place", ["one device", "pmap", "mesh"])
def test_a_step_moves_nothing_and_compiles_once(place, caplog):
    small = small_task(SMALL_PLACES[place])
    state = small.state
    counts = []
    with jax.log_compiles(), jax.transfer_guard("disallow"):
        for _ in range(4):
            state, _ = small.step(state, *small.inputs)
            counts.append(sum("Finished XLA compilation" in line for line in caplog.messages))
    assert counts == [1, 1, 1, 1]


def test_a_script_with_its_own_pmap():
    """State and base replicated along an axis of devices, as such scripts do it."""
    small, tx = small_task(on_one_device), optax.sgd(0.1)
    base, batch = small.inputs
    expected, _ = small.step(small.state, base, batch)
    replicated = jax.tree.map(lambda leaf: np.stack([leaf] * 8), (init_state(PAIR, tx), base))
    step = jax.pmap(make_step(small.loss_fn, tx, axis_name="devices"), axis_name="devices")
    state, metrics = step(*replicated, np.asarray(batch))
    for found, right in zip(*map(jax.tree.leaves, (state, expected)), strict=True):
        for device in range(8):
            np.testing.assert_allclose(found[device], right, rtol=1e-5, atol=1e-5)
    assert metrics.tokens.tolist() == [8 * 256] * 8


class Small(NamedTuple):
    place: Placement
    loss_fn: Callable
    step: Callable
    state: TrainState
    inputs: tuple


SHAPES = {"w": jax.ShapeDtypeStruct((4096, 256), jnp.float32)}
PLAN = lora.plan_from_axes(SHAPES, lora.LoraConfig(rank=2, targets="w"), {"w": "in out"})
PAIR = {"w": lora.LoraPair(np.ones((4096, 2), np.float32), np.zeros((2, 256), np.float32))}
SMALL_PLACES = {
    "one device": on_one_device,
    "pmap": on_replicas,
    "mesh": lambda: small_mesh(data=2, fsdp=2, tensor=2),
}


def small_mesh(devices=8, **sizes):
    return on_mesh(make_mesh(**sizes, devices=jax.devices()[:devices]), SHAPES, PAIR, PLAN)


def small_task(make_place):
    """A step over one matrix."""

    def loss_fn(adapter, params, x):
        y = x @ params["w"] + (x @ adapter["w"].a) @ adapter["w"].b
        return LossSum((y**2).sum(), jnp.float32(y.size))

    place, tx = make_place(), optax.sgd(0.1)
    step = place.compile_step(partial(make_step, tx=tx), loss_fn)
    random = np.random.default_rng(0)
    base = place.put_params({"w": random.normal(size=(4096, 256)).astype(np.float32)})
    batch = place.put_batch(random.normal(size=(8, 1, 4096)).astype(np.float32))
    return Small(place, loss_fn, step, place.put_state(init_state(PAIR, tx)), (base, batch))


def base_bytes_per_device(**sizes):
    """What the compiled step's arguments take on a device, without state and batch."""
    small = small_task(partial(small_mesh, **sizes))
    memory = small.step.lower(small.state, *small.inputs).compile().memory_analysis()
    rest = jax.tree.leaves((small.state, small.inputs[1]))
    return memory.argument_size_in_bytes - sum(leaf.addressable_data(0).nbytes for leaf in rest)


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_the_base_of_each_device_shrinks_as_fsdp_grows(parts):
    assert base_bytes_per_device(devices=parts, fsdp=parts) == 4096 * 256 * 4 // parts


def test_copies_along_data_hold_the_whole_base():
    assert base_bytes_per_device(data=8) == 4096 * 256 * 4


def test_the_decoder_is_split_to_one_part_in_n(task):
    sizes = {"data": 1, "fsdp": 8, "tensor": 1}
    leaves = leaf_shardings(task.params, sizes).values()
    whole, held = (sum(leaf[k] for leaf in leaves) for k in (1, 2))
    assert 1 / 8 <= held / whole < 1.03 / 8  # the norms are replicated


def collectives(program):
    found = re.findall(
        r" (all-\w+|reduce-scatter|collective-permute)(?:-start)?\(", program.as_text()
    )
    return set(found)


DECODER = DecoderConfig(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=4, num_kv_heads=2,
    head_dim=8, tie_embeddings=False, attention=AttentionForm(bias=True), mlp=MLPForm(bias=True),
)  # fmt: skip
SIZES = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("path", "spec"),
    [
        ("layers/self_attn/q_proj/kernel", (None, "fsdp", "tensor")),
        ("layers/self_attn/v_proj/bias", (None, "tensor")),
        ("layers/self_attn/o_proj/kernel", (None, "tensor", "fsdp")),
        ("layers/self_attn/o_proj/bias", ()),
        ("layers/mlp/up_proj/kernel", (None, "fsdp", "tensor")),
        ("layers/mlp/down_proj/kernel", (None, "tensor", "fsdp")),
        ("layers/input_layernorm/scale", ()),
        ("embed_tokens/embedding", (("tensor", "fsdp"),)),
        ("lm_head/kernel", ("fsdp", "tensor")),
        ("norm/scale", ()),
    ],
)
def test_rules_of_the_decoder(path, spec):
    assert leaf_shardings(param_shapes(DECODER), SIZES)[path].spec == PartitionSpec(*spec)


FUSED = replace(
    DECODER, layer_kinds=(LayerKind(rope=None),), position_offset=2,
    mlp=MLPForm("fused", bias=True),
    norm=NormForm("layer", after=True, heads=True),
    attention=AttentionForm(bias=True, fused=True),
)  # fmt: skip


@pytest.mark.parametrize(
    ("path", "spec"),
    [
        ("layers/self_attn/qkv_proj/kernel", (None, "fsdp", "tensor")),
        ("layers/self_attn/qkv_proj/bias", (None, "tensor")),
        ("layers/mlp/gate_up_proj/kernel", (None, "fsdp", "tensor")),
        ("layers/self_attn/q_norm/scale", ()),
        ("layers/post_feedforward_layernorm/bias", ()),
        ("embed_positions/embedding", ()),
    ],
)
def test_rules_of_fused_weights_and_learned_positions(path, spec):
    leaves = leaf_shardings(param_shapes(FUSED), SIZES)
    assert leaves[path].spec == PartitionSpec(*spec)
    assert all(leaf.because.startswith("rule ") for leaf in leaves.values())


EXPERTS = ExpertsForm(count=4, per_token=2, width=64, shared_width=64)
ROUTED = replace(DECODER, mlp=MLPForm(), experts=EXPERTS)


@pytest.mark.parametrize(
    ("path", "spec"),
    [
        ("layers/mlp/gate/kernel", (None, "fsdp")),
        ("layers/mlp/experts/gate_up_proj", (None, None, "fsdp", "tensor")),
        ("layers/mlp/experts/down_proj", (None, None, "tensor", "fsdp")),
        ("layers/mlp/shared_expert/down_proj/kernel", (None, "tensor", "fsdp")),
    ],
)
def test_rules_of_experts(path, spec):
    leaves = leaf_shardings(param_shapes(ROUTED), SIZES)
    assert leaves[path].spec == PartitionSpec(*spec)
    assert all(leaf.because.startswith("rule ") for leaf in leaves.values())


def test_factors_follow_their_weight_and_the_optimizer_follows_the_factors():
    params = {"up": jax.ShapeDtypeStruct((4, 8, 4, 6), jnp.float32)}
    config = lora.LoraConfig(rank=2, targets="up")
    plan = lora.plan_from_axes(params, config, {"up": "stack in out out"})
    adapter = {"up": lora.LoraPair(jnp.zeros((4, 8, 2)), jnp.zeros((4, 2, 4, 6)))}
    base = param_specs(params, SIZES, [Rule("up", ("data", "fsdp", "tensor", None))])
    factors = adapter_specs(adapter, plan, base)
    assert factors["up"].a == PartitionSpec("data", "fsdp")
    assert factors["up"].b == PartitionSpec("data", None, "tensor")
    specs = state_specs(init_state(adapter, optimizer()), adapter, factors)
    assert specs.adapter == factors
    assert specs.opt_state[1][0].mu == specs.opt_state[1][0].nu == factors
    assert specs.opt_state[1][0].count == specs.step == PartitionSpec()


def test_any_other_tree_is_split_along_its_largest_axis_and_the_rest_is_reported():
    params = {"w": np.zeros((9, 6, 4)), "odd": np.zeros((3, 5)), "one": np.float32(1)}
    leaves = leaf_shardings(params, {"fsdp": 2})
    assert leaves["w"].spec == PartitionSpec(None, "fsdp")
    assert leaves["odd"].spec == PartitionSpec()
    table = explain_sharding(params, {"fsdp": 2})
    assert table.count("no axis is divisible by fsdp=2") == 2
    assert "the largest axis divisible by fsdp=2" in table


def test_a_rule_that_does_not_divide_is_reported():
    leaf = leaf_shardings({"q_proj": {"kernel": np.zeros((6, 9))}}, SIZES)["q_proj/kernel"]
    assert leaf.spec == PartitionSpec("fsdp")
    assert "9 not divisible by tensor=2" in leaf.because


def test_wrong_rules_are_all_named():
    splits = {"v": (), "w": ("rows", None), "[w]": ("data", "data"), ".": (None,) * 3}
    rules = [Rule(*rule) for rule in splits.items()]
    with pytest.raises(InputError) as error:
        param_specs({"w": np.zeros((4, 4))}, SIZES, rules)
    for part in ("'v' matches no leaf", "names 'rows'", "over one mesh axis", "has 3 axes"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "sizes", [{"data": 3}, {"fsdp": 16}, {"fsdp": 0}, {"data": 8, "tensor": 2}]
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes):
    with pytest.raises(InputError, match="does not fit 8 devices"):
        make_mesh(**sizes)


def test_explicit_axes_are_refused(task):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Explicit,))
    with pytest.raises(InputError, match="fsdp is Explicit"):
        on_mesh(mesh, task.params, task.adapter, task.plan)


def test_a_batch_that_cannot_be_dealt_is_refused(task):
    place = on_replicas()
    with pytest.raises(InputError, match="have 12 micro-batches along"):
        place.put_batch(np.zeros((12, 3)))
    with pytest.raises(InputError, match="have 0 and 8"):
        place.put_batch(Batch(*[np.zeros((8, 2))] * 5, np.float32(0)))
