"""Tensor files that lie, cut, mutated or full of code: an InputError at once, and nothing ran."""

import io
import json
import os
import pickle
import resource
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from interop import torch_io
from interop.inspection import inspect
from lora_jax.cli.inspecting import as_json
from lora_jax.errors import InputError

from clocks import within

SECONDS = 1.0
BYTES = 64 << 20


def refused(path, fault, read=torch_io.read, seconds=SECONDS, watched=True):
    """Reading raises an InputError that names the file, in bounded time and memory."""
    if watched:
        tracemalloc.start()
    try:
        with pytest.raises(InputError, match=fault) as caught:
            within(seconds, lambda: read(path))
        assert not watched or tracemalloc.get_traced_memory()[1] < BYTES
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 3000
    assert str(caught.value).isprintable()


def with_header(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape=(4,), offsets=(0, 16), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


SIXTEEN, ENTRY_BYTES = bytes(16), json.dumps(entry()).encode()
HEADERS = {
    "length of 2^60": (struct.pack("<Q", 1 << 60) + b"{}", "cut short"),
    "length of 2^64 - 1": (struct.pack("<Q", (1 << 64) - 1) + b"{}" * 100, "cut short"),
    "no JSON": (with_header(b"abcd"), "not a safetensors file"),
    "a list": (with_header(b"[]"), "no object"),
    "a number of 5000 digits": (with_header(b'{"x":' + b"9" * 5000 + b"}"), "not a safetensors"),
    "nested": (with_header(b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "too deeply"),
    "nested in metadata": (with_header(b'{"__metadata__":' * 9_000), "safetensors"),
    "not UTF-8": (with_header(b'{"\xff\xfe": {}}'), "not a safetensors file"),
    "half a surrogate": (with_header(b'{"\\ud800":%s}' % ENTRY_BYTES, SIXTEEN), "corrupt"),
    "not finite": (with_header({"x": entry([float("nan")])}, SIXTEEN), "corrupt"),
    "negative shape": (with_header({"x": entry([-1])}, SIXTEEN), "corrupt"),
    "shape of 2^63": (with_header({"x": entry([1 << 63])}, SIXTEEN), "corrupt"),
    "shape that overflows": (with_header({"x": entry([1 << 62, 4])}, SIXTEEN), "corrupt"),
    "shape of fractions": (with_header({"x": entry([4.0])}, SIXTEEN), "corrupt"),
    "shape of words": (with_header({"x": entry(["4"])}, SIXTEEN), "corrupt"),
    "outside": (with_header({"x": entry([400], [0, 1600])}, SIXTEEN), "cut short"),
    "end before begin": (with_header({"x": entry([4], [16, 0])}, SIXTEEN), "corrupt"),
    "overlap": (with_header({"x": entry(), "y": entry([3], [4, 16])}, SIXTEEN), "corrupt"),
    "hole": (with_header({"x": entry([2], [8, 16])}, SIXTEEN), "corrupt"),
    "more data than said": (with_header({"x": entry([2], [0, 8])}, SIXTEEN), "corrupt"),
    "unknown dtype": (with_header({"x": entry(dtype="F99")}, SIXTEEN), "corrupt"),
    "dtype that NumPy lacks": (with_header({"x": entry([16], dtype="F8_E8M0")}, SIXTEEN), "dtypes"),
    "one key more": (with_header({"x": {**entry(), "extra": 1}}, SIXTEEN), "x has extra"),
    "a key of ours": (with_header({"x": {**entry(), "start": 1}}, SIXTEEN), "x has start"),
    "no entry": (with_header({"x": 3}, SIXTEEN), "corrupt"),
    "metadata of numbers": (with_header({"__metadata__": {"a": 1}, "x": entry()}, SIXTEEN),
                            "corrupt"),
    "a name twice": (
        with_header(f'{{"x":{json.dumps(entry())},"x":{json.dumps(entry())}}}'.encode(), SIXTEEN),
        "twice in its header: x",
    ),
    "20,000 names twice": (
        with_header(b"{" + b",".join(b'"%d":{}' % (n // 2) for n in range(40_000)) + b"}"),
        "0, 1, 2, 3, 4 and 19995 more",
    ),
    "a name of a megabyte": (
        with_header({"x" * 2**20: entry([16], dtype="F8_E8M0")}, SIXTEEN), "doesn't have: xxx"
    ),
    "an image": (b"GIF89a, and some more that is no header", "cut short"),
    "empty": (b"", "cut short"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "fault"), HEADERS.values(), ids=HEADERS.keys())
def test_a_header_that_lies_is_refused(tmp_path, content, fault):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    refused(path, fault)


def test_a_header_of_101_megabytes_is_refused_unread(tmp_path):
    path = tmp_path / "a.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 101 << 20))
        file.truncate(102 << 20)
    refused(path, "a header of 105906176 bytes", seconds=0.05)


@pytest.fixture(scope="module")
def hundred_thousand():
    count = 100_000
    entries = {f"model.layers.{n}.weight": entry([1], [4 * n, 4 * n + 4]) for n in range(count)}
    return with_header(entries, bytes(4 * count))


def test_a_hundred_thousand_tensors_are_read_in_a_second(tmp_path, hundred_thousand):
    path = tmp_path / "a.safetensors"
    path.write_bytes(hundred_thousand)
    assert len(within(SECONDS, lambda: torch_io.read(path))) == 100_000
    path.write_bytes(hundred_thousand[:-1])
    refused(path, "cut short", watched=False)


NAMES = ("../../outside", "/etc/passwd", "a\0b", "", "..", "C:\\x", "%s%n", "x" * 5000, "\x1b[31m")


def test_names_are_names_and_never_paths(tmp_path):
    place = tmp_path / "here" / "a.safetensors"
    place.parent.mkdir()
    tensors = {name: np.full(2, n, np.float32) for n, name in enumerate(NAMES)}
    for write in (torch_io.write, torch_io.write_pickle):
        path = place if write is torch_io.write else place.with_suffix(".pth")
        write(path, tensors)
        read = torch_io.read(path)
        assert {name: array.tolist() for name, array in read.items()} == {
            name: array.tolist() for name, array in tensors.items()
        }
    torch_io.write_directory(place.parent, tensors, max_shard_bytes=16)
    assert read.keys() == torch_io.read_directory(place.parent).keys()
    assert [entry.name for entry in tmp_path.iterdir()] == ["here"]
    assert not any(entry.is_dir() for entry in place.parent.iterdir())


def small_file(suffix):
    rng = np.random.default_rng(0)
    tensors = {"a.weight": rng.normal(size=(2, 3)).astype("f4"), "b": np.ones(3, np.float16)}
    buffer = io.BytesIO()
    if suffix == ".safetensors":
        return safetensors.numpy.save(tensors, {"format": "pt"})
    torch.save({name: torch.from_numpy(t) for name, t in tensors.items()}, buffer)
    return buffer.getvalue()


SMALL = {suffix: small_file(suffix) for suffix in (".safetensors", ".pth")}


def outcome(path):
    """What reading gives: tensors of bounded size, or an InputError and nothing else."""
    try:
        tensors = torch_io.read(path)
    except InputError as error:
        assert str(path) in str(error)  # noqa: PT017
        return None
    assert sum(array.nbytes for array in tensors.values()) <= path.stat().st_size
    return tensors


@pytest.mark.parametrize("suffix", SMALL)
def test_a_file_cut_anywhere_is_refused(tmp_path, suffix):
    path, whole = tmp_path / f"a{suffix}", SMALL[suffix]
    for size in range(0, len(whole), 1 if suffix == ".safetensors" else 17):
        path.write_bytes(whole[:size])
        assert outcome(path) is None, size


@pytest.fixture
def bounded_memory():
    """A gigabyte more than the process has: an allocation that a file asks for fails beyond."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + (1 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


few = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
MUTATIONS = st.lists(
    st.tuples(st.integers(0, 1 << 20), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4
)


@pytest.mark.parametrize("suffix", SMALL)
@few
@given(mutations=MUTATIONS, cut=st.integers(0, 40), more=st.binary(max_size=20))
def test_mutated_files_are_read_or_refused(tmp_path, bounded_memory, suffix, mutations, cut, more):
    content = bytearray(SMALL[suffix])
    for place, new in mutations:
        start = place % len(content)
        content[start : start + len(new)] = new
    path = tmp_path / f"a{suffix}"
    path.write_bytes(bytes(content[: len(content) - cut]) + more)
    outcome(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_keys_of_one_hash_are_refused_unread(tmp_path, zipped):
    path, shared = tmp_path / "a.bin", (1 << 61) - 1
    content = {n * shared: 0 for n in range(-150, 150)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    refused(path, "more than 256 integers beyond 61 bits")
    torch.save({n: 0 for n in range(300)}, path, _use_new_zipfile_serialization=zipped)
    refused(path, "not tensors")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A small PEFT directory: names and contents of its files."""
    rng = np.random.default_rng(0)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q", "v"],
              "rank_pattern": {"v": 1}, "alpha_pattern": {}, "bias": "none"}  # fmt: skip
    tensors = {
        f"base_model.model.h.0.{name}.lora_{factor}.weight": rng.normal(size=shape).astype("f4")
        for name, rank in (("q", 2), ("v", 1))
        for factor, shape in (("A", (rank, 3)), ("B", (4, rank)))
    }
    folder = tmp_path_factory.mktemp("adapter")
    torch_io.write(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@few
@given(mutations=MUTATIONS)
def test_mutated_adapters_are_inspected_or_refused(tmp_path, adapter, name, mutations):
    content = bytearray(adapter[name])
    for place, new in mutations:
        start = place % len(content)
        content[start : start + len(new)] = new
    for file, known in {**adapter, name: bytes(content)}.items():
        (tmp_path / file).write_bytes(known)
    try:
        found = inspect(tmp_path)
    except InputError:
        return
    assert found.format == "peft"
    assert as_json(found)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=3,
)
KEYS = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias",
        "target_modules", "target_parameters", "trainable_token_indices", "exclude_modules",
        "layers_to_transform", "modules_to_save", "base_model_name_or_path", "other")  # fmt: skip


@few
@given(changes=st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=3))
def test_configs_of_anything_are_inspected_or_refused(tmp_path, adapter, changes):
    config = json.loads(adapter["adapter_config.json"])
    changed = {**adapter, "adapter_config.json": json.dumps({**config, **changes}).encode()}
    for file, content in changed.items():
        (tmp_path / file).write_bytes(content)
    try:
        assert as_json(inspect(tmp_path))
    except InputError as error:
        assert len(str(error)) < 10_000  # noqa: PT017


NUMBERS = st.lists(st.integers(-1, 9) | JSON, max_size=3)
ENTRY = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "U8", "BF16", "F4", 3]), "shape": NUMBERS,
     "data_offsets": NUMBERS}
)  # fmt: skip


@few
@given(header=st.dictionaries(st.text(max_size=5), ENTRY | JSON, max_size=3) | JSON,
       data=st.binary(max_size=16))  # fmt: skip
def test_a_made_up_header_is_read_only_where_the_reference_reads_it(tmp_path, header, data):
    path = tmp_path / "a.safetensors"
    path.write_bytes(with_header(header, data))
    tensors = outcome(path)
    if tensors is not None:
        reference = safetensors.numpy.load_file(path) if tensors else {}
        assert tensors.keys() == reference.keys()


LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
UNSAFE = "holds no tensors that can be read safely|not tensors"


class Payload:
    def __reduce__(self):
        return os.mkdir, (os.environ["MARKER"],)


def payloads():
    nested = {"a": torch.ones(1), "b": [Payload()]}
    return {
        "a value": {"x": Payload()},
        "a key": {"a": torch.ones(1), "deep": nested},
        "an object array": {"x": np.array([Payload()], object)},
        "a module": torch.nn.Linear(2, 2),
        "an optimizer": torch.optim.AdamW(torch.nn.Linear(2, 2).parameters()).state_dict(),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", payloads())
def test_a_pickle_with_more_than_tensors_is_refused_and_nothing_runs(
    tmp_path, monkeypatch, kind, zipped
):
    marker = tmp_path / "ran"
    monkeypatch.setenv("MARKER", str(marker))
    path = tmp_path / "a.bin"
    torch.save(payloads()[kind], path, _use_new_zipfile_serialization=zipped)
    refused(path, UNSAFE)
    assert not marker.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_a_bare_pickle_is_refused_and_nothing_runs(tmp_path, monkeypatch, protocol):
    marker = tmp_path / "ran"
    monkeypatch.setenv("MARKER", str(marker))
    path = tmp_path / "a.pt"
    path.write_bytes(pickle.dumps({"x": Payload()}, protocol))
    refused(path, UNSAFE)
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists()


def rezipped(content, change, compression=zipfile.ZIP_STORED):
    made = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(made, "w", compression) as new,
    ):
        for name in old.namelist():
            new.writestr(*change(name, old.read(name)))
    return made.getvalue()


def test_an_archive_that_is_packed_is_refused_unpacked_nowhere(tmp_path):
    buffer = io.BytesIO()
    torch.save({"x": torch.zeros(8 << 20)}, buffer)
    path = tmp_path / "bomb.pth"
    path.write_bytes(rezipped(buffer.getvalue(), lambda *e: e, zipfile.ZIP_DEFLATED))
    assert path.stat().st_size < 100_000
    refused(path, "compressed entries")
    outside = rezipped(SMALL[".pth"], lambda name, data: (f"../../{name}", data))
    path.write_bytes(outside)
    outcome(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["bomb.pth"]


def doubling(levels):
    """A pickled dict whose key is a tuple of one tuple twice, and so on: a few bytes a level."""
    tuples = b"".join(b"q%ch%c\x86" % (n, n) for n in range(levels))
    return b"\x80\x02})" + tuples + b"K\x01s."


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_key_that_takes_for_ever_to_hash_is_refused(tmp_path, zipped):
    path = tmp_path / "a.pth"
    if zipped:
        hidden = rezipped(
            SMALL[".pth"], lambda n, data: (n, doubling(100) if n.endswith("data.pkl") else data)
        )
        path.write_bytes(hidden)
    else:
        torch.save({"x": torch.ones(1)}, path, _use_new_zipfile_serialization=False)
        head = b"".join(pickle.dumps(part, 2) for part in (LEGACY_MAGIC, 1001, {"little": True}))
        assert path.read_bytes().startswith(head[:10])
        path.write_bytes(head + doubling(100))
    refused(path, "nests tuples deeper than 8")


def test_a_pickle_of_a_million_operations_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(b"\x80\x02}" + b"K\x01K\x01s" * 400_000 + b".")
    refused(path, "over 400,000 operations", watched=False)


@pytest.mark.parametrize("said", [None, 3], ids=["said", "hidden"])
def test_an_archive_of_many_entries_is_refused(tmp_path, said):
    path = tmp_path / "a.bin"
    with zipfile.ZipFile(path, "w") as archive:
        for n in range(20_001):
            archive.writestr(f"a/data/{n}", b"")
    content = bytearray(path.read_bytes())
    if said is not None:  # the end of the archive has the number twice
        content[-14:-10] = said.to_bytes(2, "little") * 2
        path.write_bytes(content)
    refused(path, "holds 20,001 entries", watched=False)


def test_entries_of_one_name_are_refused(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        twice = rezipped(SMALL[".pth"], lambda name, data: (name.replace("/1", "/0"), data))
    (tmp_path / "a.pth").write_bytes(twice)
    refused(tmp_path / "a.pth", "entries of one name")


def test_a_central_directory_that_lies_about_sizes_is_refused(tmp_path):
    content = SMALL[".pth"]
    path = tmp_path / "a.pth"
    for start in range(len(content)):
        if content[start : start + 4] == b"PK\x01\x02":
            lies = struct.pack("<II", 1 << 31, 1 << 31)
            path.write_bytes(content[: start + 20] + lies + content[start + 28 :])
            assert outcome(path) is None


def test_a_tensor_that_asks_for_more_than_its_storage_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"x": torch.ones(1).expand(1 << 20, 1 << 20)}, path)
    refused(path, "larger than what the file holds of them: x")
    shared = torch.arange(6.0).reshape(2, 3)
    torch.save({"x": shared, "y": shared.t()}, path)
    assert torch_io.read(path)["y"].tolist() == shared.t().tolist()


@pytest.mark.parametrize("tensor", [torch.eye(2).to_sparse(), torch.empty(1 << 40, device="meta")])
def test_tensors_of_another_kind_are_refused_by_name(tmp_path, tensor):
    torch.save({"good": torch.ones(1), "odd one": tensor}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "odd one")


def test_keys_that_are_no_names_are_refused(tmp_path):
    torch.save({3: torch.ones(1), ("a",): torch.ones(1)}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "not tensors: a int, a tuple|not tensors: a")


@pytest.mark.parametrize("name", ["a.npz", "a.npy", "a.pkl", "a.zip", "a"])
def test_files_of_other_kinds_are_refused_unopened(tmp_path, name):
    path = tmp_path / name
    with open(path, "wb") as file:
        np.savez(file, x=np.array([[]], object)) if name == "a.npz" else file.write(b"x")
    refused(path, "can't read tensors from this")


def sharded(directory, weight_map, **more):
    directory.mkdir()
    torch_io.write(directory / "one.safetensors", {"x": np.ones(2, np.float32)})
    index = {"weight_map": weight_map, **more}
    (directory / torch_io.SAFETENSORS_INDEX).write_text(json.dumps(index))
    return directory


INDICES = {
    "outside": ({"x": "../out.safetensors"}, "outside its directory"),
    "absolute": ({"x": "/etc/passwd"}, "outside its directory"),
    "NUL": ({"x": "a\0b.safetensors"}, "outside its directory"),
    "dots": ({"x": ".."}, "outside its directory"),
    "nothing": ({"x": ""}, "outside its directory"),
    "long": ({"x": "x" * 5000}, "outside its directory"),
    "number": ({"x": 3}, "no weight_map"),
    "list": ({"x": ["one.safetensors"]}, "no weight_map"),
    "absent": ({"x": "two.safetensors"}, "missing shards: two.safetensors"),
    "another tensor": ({"y": "one.safetensors"}, "disagree about: x in one.safetensors, y in one"),
    "100,000 names": ({f"{n}": "one.safetensors" for n in range(100_000)}, "and 99996 more"),
    "100,000 shards": ({f"{n}": f"{n}.safetensors" for n in range(100_000)},
                       "missing shards: .* and 99995 more"),
}  # fmt: skip


@pytest.mark.parametrize(("weight_map", "fault"), INDICES.values(), ids=INDICES.keys())
def test_an_index_that_lies_is_refused(tmp_path, weight_map, fault):
    (tmp_path / "out.safetensors").write_bytes(SMALL[".safetensors"])
    directory, few = sharded(tmp_path / "here", weight_map), len(weight_map) < 1000
    refused(directory, fault, torch_io.read_directory, watched=few)


def test_shards_that_are_links_out_are_refused_but_for_the_hubs_own(tmp_path):
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "abc").write_bytes(safetensors.numpy.save({"y": np.ones(1)}))
    (tmp_path / "models--a--b" / "snapshots").mkdir()
    weight_map = {"x": "one.safetensors", "y": "two.safetensors"}
    snapshot = sharded(tmp_path / "models--a--b" / "snapshots" / "rev", weight_map)
    (snapshot / "two.safetensors").symlink_to("../../blobs/abc")
    assert torch_io.read_directory(snapshot).keys() == {"x", "y"}
    elsewhere = sharded(tmp_path / "here", weight_map)
    (elsewhere / "two.safetensors").symlink_to(blobs / "abc")
    refused(elsewhere, "links out of its directory: two", torch_io.read_directory)


def test_an_index_of_a_gigabyte_is_refused_unread(tmp_path):
    directory = sharded(tmp_path / "here", {})
    with open(directory / torch_io.SAFETENSORS_INDEX, "wb") as file:
        file.truncate(1 << 30)
    refused(directory, "more than the", torch_io.read_directory, 0.05)
