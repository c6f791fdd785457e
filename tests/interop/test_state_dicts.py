"""State dicts of torch modules against the same function here, and who shares memory with whom."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import linen, nnx
from jax.sharding import NamedSharding, PartitionSpec

from interop.dlpack import as_jax, as_numpy, as_torch
from interop.keymap_rows import keymap
from interop.keymaps import Rule
from interop.state_dicts import from_torch, to_torch
from lora_jax.errors import InputError

DTYPES = (
    "bool",
    "uint8",
    "int32",
    "float8_e4m3fn",
    "float8_e5m2",
    "float16",
    "bfloat16",
    "float32",
)


class Net(linen.Module):
    """What `net` is in torch."""

    @linen.compact
    def __call__(self, x):
        x = jnp.tanh(linen.Conv(5, (3, 3), padding="VALID", name="conv")(x))
        return linen.Dense(3, name="head")(x.mean((1, 2)))


TABLE = keymap(
    ("conv/kernel", "0.weight", "conv2d"),
    ("conv/bias", "0.bias"),
    ("head/kernel", "4.weight", "linear"),
    ("head/bias", "4.bias"),
    ignored=[r".*\.num_batches_tracked"],
)


def net():
    torch.manual_seed(0)
    pool = torch.nn.AdaptiveAvgPool2d(1)
    layers = torch.nn.Conv2d(2, 5, 3), torch.nn.Tanh(), pool, torch.nn.Flatten()
    return torch.nn.Sequential(*layers, torch.nn.Linear(5, 3))


def test_a_module_computes_the_same_here_and_there_and_back():
    images = np.random.default_rng(0).normal(size=(4, 9, 8, 2)).astype(np.float32)
    model, module = Net(), net()
    fresh = model.init(jax.random.key(0), images)["params"]
    params = from_torch(module.state_dict(), TABLE, fresh)
    with torch.no_grad():
        expected = module(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(model.apply({"params": params}, images), expected, atol=1e-6)
    assert not np.allclose(model.apply({"params": fresh}, images), expected, atol=1e-2)
    other = net()
    other.load_state_dict(to_torch(fresh, TABLE))
    with torch.no_grad():
        back = other(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(model.apply({"params": fresh}, images), back, atol=1e-6)


def test_any_tree_of_leaves_will_do():
    state = nnx.state(nnx.Linear(4, 6, rngs=nnx.Rngs(0)), nnx.Param)
    table = keymap(("kernel", "weight", "linear"), Rule("bias", "bias"))
    module = torch.nn.Linear(4, 6)
    module.load_state_dict(to_torch(state, table))
    read = from_torch(module.state_dict(), table, state)
    assert jax.tree.structure(read) == jax.tree.structure(state)
    assert jax.tree.all(jax.tree.map(np.array_equal, read, state))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtypes_are_kept_and_memory_is_shared(dtype):
    params = {"layers": {"kernel": jnp.arange(24, dtype=dtype).reshape(2, 3, 4)}}
    table = keymap(("layers/kernel", "h.{i}.weight", "linear"))
    state = to_torch(params, table)
    kernel = params["layers"]["kernel"]
    assert {tensor.dtype for tensor in state.values()} == {getattr(torch, dtype)}
    assert state["h.0.weight"].data_ptr() == kernel.unsafe_buffer_pointer()
    assert state["h.1.weight"].data_ptr() == kernel.unsafe_buffer_pointer() + kernel[0].nbytes
    read = from_torch(state, table, params)["layers"]["kernel"]
    assert read.dtype == kernel.dtype
    assert read.tobytes() == np.asarray(kernel).tobytes()
    assert not np.shares_memory(read, as_numpy(state["h.0.weight"]))


@pytest.mark.parametrize("row", [("a",), ("a", "b", "liner"), ("a", "b", "linear", "c"), ("a", 3)])
def test_rows_that_mean_nothing_are_refused(row):
    with pytest.raises(InputError, match=r"rows of a keymap are .*got: \('a'"):
        keymap(("fine", "fine"), row)


FUSED = (
    Rule("w", "gate.weight", (1, 0), "linear", (0, 2)),
    Rule("w", "up.weight", (1, 0), "linear", (1, 2)),
)


@pytest.mark.parametrize(
    ("rows", "shape", "fault"),
    [
        (FUSED[:1], (4, 6), r"w \(4, 6\) is filled by part 0 of 2 \(gate\.weight\), expected each"),
        ((("w", "a"), ("w", "b")), (4, 6), r"part 0 of 1 \(a\), part 0 of 1 \(b\), expected each"),
        (FUSED, (4, 7), r"w \(4, 7\) can't be cut into 2 equal parts"),
        ((("v", "a"),), (4, 6), r"w \(4, 6\) has no rule|no tensor name for w"),
        ((("w", "a", "linear"),), (4,), r"has 1 axes below its stack, and a orders \(1, 0\)"),
        ((Rule("w", "a", (0, 0)),), (4, 6), r"has 2 axes below its stack, and a orders \(0, 0\)"),
        ((("w", "h.{i}.a.{e}.b"),), (4,), r"doesn't have the 2 stack axes of h\.{i}\.a\.{e}\.b"),
        ((("w", "h.{i}.a"),), (0, 6), r"stacks nothing that h\.{i}\.a could be"),
        ((("w", "a.{e}.h.{i}.b"),), (4, 6), r"needs {i} for the layer, then {e} .* in a\.{e}\.h"),
        ((("w", "h.{layer}.a"),), (4, 6), r"needs {i} for the layer, then {e} .* in h\.{layer}"),
    ],
)
def test_tables_that_would_leave_a_leaf_unfilled_are_refused(rows, shape, fault):
    with pytest.raises(InputError, match=fault):
        from_torch({}, keymap(*rows), {"w": np.zeros(shape)})
    with pytest.raises(InputError, match=fault):
        to_torch({"w": np.zeros(shape)}, keymap(*rows))


def test_no_part_of_a_leaf_is_rounded_to_another_dtype():
    whole = np.float32([[1.001, 2.002]])
    state = to_torch({"w": whole}, keymap(*FUSED))
    assert from_torch(state, keymap(*FUSED), {"w": whole})["w"].tobytes() == whole.tobytes()
    state["gate.weight"] = state["gate.weight"].bfloat16()
    with pytest.raises(InputError, match=r"gate\.weight, up\.weight is bfloat16 and float32"):
        from_torch(state, keymap(*FUSED), {"w": whole})


def test_two_leaves_of_one_tensor_have_to_agree():
    table = keymap(("embed", "wte.weight", "embedding"), ("head", "wte.weight", "linear"))
    embed = drawn("float32")
    assert set(to_torch({"embed": embed, "head": embed.T}, table)) == {"wte.weight"}
    with pytest.raises(InputError, match=r"would be one tensor: wte\.weight"):
        to_torch({"embed": embed, "head": embed.T + 1}, table)


def test_leaves_that_are_no_arrays_are_named():
    tree, table = {"w": np.zeros((4, 6)), "activation": jnp.tanh}, keymap(("w", "weight"))
    for call in (lambda: to_torch(tree, table), lambda: from_torch({}, table, tree)):
        with pytest.raises(InputError, match=r"no arrays: leave them out, .*: activation"):
            call()


def drawn(dtype):
    values = np.random.default_rng(0).integers(0, 2, (4, 6))
    return values.astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_and_tensors_are_one_memory(dtype):
    array = drawn(dtype)
    tensor = as_torch(array)
    assert str(tensor.dtype) == f"torch.{dtype}"
    assert tensor.data_ptr() == array.ctypes.data
    for view, same in (
        (tensor, array),
        (tensor.t(), array.T),
        (tensor[::2, 1::2], array[::2, 1::2]),
    ):
        back = as_numpy(view)
        assert back.dtype == array.dtype
        assert np.shares_memory(back, array)
        np.testing.assert_array_equal(back.astype("f4"), same.astype("f4"))
    aligned = tensor.clone()  # NumPy's memory need not be as XLA wants it
    for view in (aligned, aligned.t(), aligned[:0]):
        there = as_jax(view)
        assert there.unsafe_buffer_pointer() == view.data_ptr()
        assert there.dtype == array.dtype
        assert as_torch(there).data_ptr() in (view.data_ptr(), 0)


def test_what_cannot_be_shared_is_copied_with_its_values():
    array = drawn("float32")
    array.flags.writeable = False
    for there in (array, array[::-1], array.astype(">f4")):
        tensor = as_torch(there)
        tensor += 1
        np.testing.assert_array_equal(tensor.numpy() - 1, there.astype("f4"))
    tensor = torch.arange(24.0).reshape(4, 6)
    for view in (tensor[::2, 1::2], tensor[:1].expand(3, 6), tensor.reshape(-1)[1:]):
        np.testing.assert_array_equal(as_jax(view), view.numpy())


@pytest.mark.parametrize("dtype", ["int64", "uint64", "float64", "complex128"])
def test_jax_is_not_given_what_it_would_halve(dtype):
    with pytest.raises(InputError, match=f"a tensor of torch.{dtype}, which JAX holds in half"):
        as_jax(torch.ones(2, dtype=getattr(torch, dtype)))
    with jax.enable_x64(True):
        assert as_jax(torch.ones(2, dtype=getattr(torch, dtype))).dtype == dtype


def test_a_complex_number_of_two_halves_is_no_wide_one():
    tensor = torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex64)
    there = as_jax(tensor)
    assert there.dtype == "complex64"
    np.testing.assert_array_equal(there, tensor.numpy())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("spec", [PartitionSpec("x"), PartitionSpec()], ids=["split", "everywhere"])
def test_arrays_on_several_devices_are_gathered(dtype, spec):
    whole = jnp.arange(24, dtype=dtype).reshape(4, 6)
    kernel = jax.device_put(whole, NamedSharding(jax.make_mesh((2,), ("x",)), spec))
    assert len(kernel.devices()) == 2
    state = to_torch({"kernel": kernel}, keymap(("kernel", "weight", "linear")))
    assert state["weight"].dtype == getattr(torch, dtype)
    np.testing.assert_array_equal(state["weight"].float(), np.asarray(whole, "f4").T)


def test_tensors_without_a_numpy_form_are_named():
    for tensor in (torch.eye(3).to_sparse(), torch.empty(3, device="meta")):
        with pytest.raises(InputError, match="has no NumPy form"):
            as_numpy(tensor)
