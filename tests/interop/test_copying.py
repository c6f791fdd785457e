"""Copies between orders in memory give the values of NumPy's own, and hold next to nothing."""

import itertools
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from interop import torch_io
from interop.conversion import flatten, from_torch, to_torch
from interop.copying import copy_into, in_pieces
from interop.keymaps import Keymap, Rule

DTYPES = ("bool", "int8", "float16", "bfloat16", "float32", "float64", "complex128")
ORDERS = {
    "transposed": lambda x: x.reshape(300, 520).T,
    "stack": lambda x: x.reshape(3, 100, 520).transpose(0, 2, 1),
    "rolled": lambda x: x.reshape(60, 5, 520).transpose(2, 0, 1),
    "convolution": lambda x: x.reshape(3, 4, 130, 100).transpose(3, 2, 0, 1),
    "reversed": lambda x: x.reshape(300, 520).T[::-1, ::-1],
    "strided": lambda x: x.reshape(300, 520)[::2, ::3].T,
    "one column": lambda x: x.reshape(-1, 1).T,
    "scalar": lambda x: x[0].reshape(()),
    "empty": lambda x: x[:0].reshape(0, 40).T,
    "same order": lambda x: x.reshape(300, 520),
}


def values(dtype):
    drawn = np.random.default_rng(0).integers(0, 100, 300 * 520)
    return drawn.astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))


def scratches(size):
    return itertools.repeat(np.empty(size, np.uint8))


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_those_of_a_plain_copy(dtype, order):
    source = order(values(dtype))
    target = np.empty(source.shape, source.dtype)
    copy_into(target, source)
    np.testing.assert_array_equal(target, source)
    pieces = [piece.copy() for piece in in_pieces(source, 10_000, scratches(10_000))]
    joined = np.concatenate(pieces) if pieces else source.reshape(-1)
    assert joined.tobytes() == source.tobytes()


def test_a_copy_may_cast_and_swap_bytes():
    source = values("float32").reshape(300, 520)
    for dtype in (">f4", np.float64, ml_dtypes.bfloat16):
        target = np.empty((520, 300), dtype)
        copy_into(target, source.T)
        np.testing.assert_array_equal(target, source.T.astype(dtype))
    swapped = source.astype(">f4").T
    assert b"".join(p.tobytes() for p in in_pieces(swapped, 999, scratches(999))) == (
        np.ascontiguousarray(source.T).tobytes()
    )


TABLE = Keymap((Rule("layers/kernel", "layers.{i}.weight", (1, 0), "linear"),))
SHAPE = (4, 1024, 1024)


def peak_of(run):
    tracemalloc.start()
    try:
        result = run()
        return result, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_conversions_hold_at_most_one_tensor_beyond_source_and_target(tmp_path):
    leaf = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    tensor = leaf[0].nbytes
    path = tmp_path / "a.safetensors"
    _, peak = peak_of(lambda: torch_io.write(path, to_torch({"layers": {"kernel": leaf}}, TABLE)))
    assert 0.1 * tensor < peak < tensor  # the lower bound: arrays are counted at all
    read, peak = peak_of(lambda: from_torch(torch_io.read(path), TABLE, {"layers/kernel": SHAPE}))
    assert leaf.nbytes < peak < leaf.nbytes + tensor
    np.testing.assert_array_equal(flatten(read)["layers/kernel"], leaf)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gigabyte_is_converted_at_a_third_of_memcpys_speed(dtype):
    from lora_jax.cli.bench_convert import Options
    from lora_jax.cli.convert_times import conversions

    report = conversions(Options(dtype=dtype))
    memcpy, _, *converted = report.rows[:6]
    assert report.gigabytes > 1
    assert [row.name for row in converted] == [
        "state dict -> leaves",
        "leaves -> state dict",
        "safetensors -> leaves",
        "leaves -> safetensors",
    ]
    for row in converted:
        assert row.rate > memcpy.rate / 3, report
        assert row.beyond is None or row.beyond < report.largest, report
