"""Tensor files against safetensors and torch themselves, and files that are damaged or hostile."""

import json
import os
import re
import resource
import time

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from interop import torch_io
from lora_jax.errors import InputError
from lora_jax.files import atomic_directory, write_text

DTYPES = [
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"),
]
SHAPES = {"matrix": (2, 3), "vector": (5,), "scalar": (), "empty": (0, 3)}


def tensors_of_every_kind():
    generator = np.random.default_rng(0)
    return {
        f"{name} é {dtype}": np.asarray(3 * generator.normal(size=shape)).astype(dtype)
        for dtype in DTYPES
        for name, shape in SHAPES.items()
    }


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert left[name].shape == right[name].shape
        assert left[name].tobytes() == right[name].tobytes(), name


def test_bytes_are_those_of_the_reference_writer(tmp_path):
    tensors = tensors_of_every_kind()
    torch_io.write(tmp_path / "a.safetensors", tensors)
    reference = safetensors.numpy.save(tensors, {"format": "pt"})
    assert (tmp_path / "a.safetensors").read_bytes() == reference


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = tensors_of_every_kind()
    torch_io.write(path, tensors)
    assert_same(torch_io.read(path), tensors)
    before = path.read_bytes()
    torch_io.write(path, torch_io.read(path))
    assert path.read_bytes() == before


def test_strided_and_big_endian_arrays_are_written_by_value(tmp_path):
    matrix = np.arange(12, dtype=np.float32).reshape(3, 4)
    tensors = {
        "transposed": matrix.T,
        "strided": matrix[::2, 1::2],
        "reversed": matrix[::-1],
        "broadcast": np.broadcast_to(np.float32(7), (2, 2)),
        "big_endian": matrix.astype(">f4"),
        "bfloat16": matrix.astype(ml_dtypes.bfloat16).T,
    }
    torch_io.write(tmp_path / "a.safetensors", tensors)
    read = safetensors.torch.load_file(tmp_path / "a.safetensors")
    for name, array in tensors.items():
        np.testing.assert_array_equal(read[name].float().numpy(), array.astype(np.float32), name)


def test_the_reference_writer_would_have_corrupted_them():
    matrix = np.arange(12, dtype=np.float32).reshape(3, 4)
    read = safetensors.numpy.load(safetensors.numpy.save({"x": matrix.T}))
    assert not np.array_equal(read["x"], matrix.T)


def test_bfloat16_of_torch_is_read(tmp_path):
    tensor = torch.randn(4, 5).to(torch.bfloat16)
    safetensors.torch.save_file({"x": tensor}, tmp_path / "a.safetensors")
    torch.save({"x": tensor}, tmp_path / "a.bin")
    for name in ("a.safetensors", "a.bin"):
        array = torch_io.read(tmp_path / name)["x"]
        assert array.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(array.astype(np.float32), tensor.float().numpy())


def test_no_tensors(tmp_path):
    torch_io.write(tmp_path / "a.safetensors", {})
    assert torch_io.read(tmp_path / "a.safetensors") == {}


def test_a_dtype_that_the_format_lacks_is_named_and_nothing_is_written(tmp_path):
    with pytest.raises(InputError, match="x is complex128"):
        torch_io.write(tmp_path / "a.safetensors", {"x": np.ones(2, complex)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_the_mode_follows_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        torch_io.write(tmp_path / "a.safetensors", {"x": np.ones(2)})
        with atomic_directory(tmp_path / "made"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.fixture
def full_disk():
    """Files of this process can't grow past a page."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, full_disk):
    path = tmp_path / "a.safetensors"
    torch_io.write(path, {"x": np.ones(2)})
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"can't write .*a\.safetensors: File too large"):
        torch_io.write(path, {"x": np.ones(10_000)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_an_input_error(tmp_path):
    write_text(tmp_path / "file", "")
    for place in (tmp_path / "missing" / "a.safetensors", tmp_path / "file" / "a.safetensors"):
        with pytest.raises(InputError, match=f"can't write {re.escape(str(place))}"):
            torch_io.write(place, {"x": np.ones(2)})


def test_a_file_cut_anywhere_is_refused_with_both_sizes(tmp_path):
    path = tmp_path / "whole.safetensors"
    torch_io.write(path, {"x": np.ones((4, 8), np.float32), "y": np.ones(3, np.float16)})
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    cut = tmp_path / "cut.safetensors"
    for size in range(len(whole)):
        cut.write_bytes(whole[:size])
        with pytest.raises(InputError, match=f"{re.escape(str(cut))} .*{size} bytes") as caught:
            torch_io.read(cut)
        if size >= header:
            assert f"its header asks for {len(whole)}" in str(caught.value)


HOSTILE = {
    "huge header": (1 << 60).to_bytes(8, "little") + b"{}",
    "not json": (4).to_bytes(8, "little") + b"abcd",
    "list": (2).to_bytes(8, "little") + b"[]",
    "not safetensors": b"GIF89a, and some more that is no header",
}


def with_header(entry):
    header = json.dumps({"x": entry}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(16)


HOSTILE |= {
    "negative shape": with_header({"dtype": "F32", "shape": [-1], "data_offsets": [0, 16]}),
    "overflowing shape": with_header(
        {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 16]}
    ),
    "outside": with_header({"dtype": "F32", "shape": [400], "data_offsets": [0, 1600]}),
    "unknown dtype": with_header({"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}),
    "hole": with_header({"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_files_are_refused_at_once(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    start = time.perf_counter()
    with pytest.raises(InputError, match=re.escape(str(path))):
        torch_io.read(path)
    assert time.perf_counter() - start < 0.2


class Payload:
    def __reduce__(self):
        return os.mkdir, (f"{os.environ['PAYLOAD_DIRECTORY']}/ran",)


def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PAYLOAD_DIRECTORY", str(tmp_path))
    torch.save({"x": Payload()}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"a\.pth .*can be read safely"):
        torch_io.read(tmp_path / "a.pth")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "a.pth", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "fault"),
    [({"x": 3, "y": torch.ones(1)}, "not tensors: x"), ([torch.ones(1)], "holds list")],
)
def test_pickles_of_something_else_are_refused(tmp_path, content, fault):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(InputError, match=fault):
        torch_io.read(tmp_path / "a.pt")


def test_a_cut_pickle_is_refused_with_its_size(tmp_path):
    torch.save({"x": torch.ones(100)}, tmp_path / "whole.bin")
    (tmp_path / "cut.bin").write_bytes((tmp_path / "whole.bin").read_bytes()[:-50])
    with pytest.raises(InputError, match=r"cut\.bin \(\d+ bytes\)"):
        torch_io.read(tmp_path / "cut.bin")


def test_an_old_torch_is_not_trusted_with_a_pickle(tmp_path, monkeypatch):
    torch.save({"x": torch.ones(1)}, tmp_path / "a.bin")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(InputError, match=r"torch 2\.9\.1\+cpu doesn't read pickles safely"):
        torch_io.read(tmp_path / "a.bin")


def test_an_unknown_suffix_and_a_missing_file_are_named(tmp_path):
    write_text(tmp_path / "a.npz", "")
    with pytest.raises(InputError, match=r"a\.npz: can't read tensors from this"):
        torch_io.read(tmp_path / "a.npz")
    with pytest.raises(InputError, match=r"b\.safetensors: no such file"):
        torch_io.read(tmp_path / "b.safetensors")


@pytest.fixture
def sharded(tmp_path):
    tensors = {f"t{n}": np.full((10, 10), n, np.float32) for n in range(7)}
    torch_io.write_directory(tmp_path, tensors, max_shard_bytes=1000)
    return tmp_path, tensors


def test_shards_hold_to_the_limit_and_read_back(sharded):
    directory, tensors = sharded
    shards = sorted(directory.glob("model-*.safetensors"))
    assert [shard.name[:20] for shard in shards] == [
        f"model-{n:05d}-of-00004"[:20] for n in (1, 2, 3, 4)
    ]
    assert all(sum(a.nbytes for a in torch_io.read(shard).values()) <= 1000 for shard in shards)
    assert_same(torch_io.read_directory(directory), tensors)


def test_one_file_by_default(tmp_path):
    torch_io.write_directory(tmp_path, {"x": np.ones(1000)})
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_missing_shard_is_named(sharded):
    directory, _ = sharded
    (directory / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(InputError, match="missing shards: model-00002-of-00004"):
        torch_io.read_directory(directory)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"t0": "../../outside.safetensors"}, r"shards outside its directory: \.\./\.\./outside"),
        ({"t0": "model-00002-of-00004.safetensors"}, "disagree about: t0 in model-00001"),
        ({"t9": "model-00002-of-00004.safetensors"}, "disagree about: t9 in model-00002"),
    ],
)
def test_an_index_that_lies_is_refused(sharded, change, fault):
    directory, _ = sharded
    index = directory / torch_io.SAFETENSORS_INDEX
    content = json.loads(index.read_text())
    content["weight_map"] |= change
    index.write_text(json.dumps(content))
    with pytest.raises(InputError, match=fault):
        torch_io.read_directory(directory)


def test_a_directory_without_weights_says_what_it_looked_for(tmp_path):
    with pytest.raises(InputError, match=r"holds no weights: expected one of model\.safetensors"):
        torch_io.read_directory(tmp_path)


def fill_and_fail(directory):
    with atomic_directory(directory) as target:
        write_text(target / "half", "")
        raise RuntimeError


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError):
        fill_and_fail(tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_holds_something_is_not_replaced(tmp_path):
    write_text(tmp_path / "kept", "kept")
    with pytest.raises(InputError, match="already exists"):
        fill_and_fail(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_an_empty_pickle_is_said_to_be_empty(tmp_path):
    (tmp_path / "a.pth").touch()
    with pytest.raises(InputError, match=r"read safely: it is empty or cut short$"):
        torch_io.read(tmp_path / "a.pth")
