"""llama.cpp adapter files that lie, and adapters that such a file can't hold."""

import contextlib
import dataclasses
import math
import re
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interop.adapter_file import FileAdapter, RowAdapter, delta_weight
from interop.gguf_adapter import read, read_for_inspection
from interop.gguf_adapter_writing import write
from lora_jax.errors import InputError

from clocks import within
from gguf_adapters import random_adapter, stored_factors, write_with_package
from small_models import SMALL

UNTIED = dataclasses.replace(SMALL, num_layers=2, tie_embeddings=False)
Q_PROJ = "model.layers.0.self_attn.q_proj"


def with_module(config=UNTIED, name=Q_PROJ, **changes):
    adapter = random_adapter(config)
    module = adapter.modules[name]._replace(**changes)
    return adapter._replace(modules=adapter.modules | {name: module}), config


def renamed(name):
    adapter = random_adapter(SMALL)
    return adapter._replace(modules={name: adapter.modules[Q_PROJ]}), SMALL


RANK_4 = np.ones((4, 64), np.float32)
UNWRITABLE = {
    "DoRA": (with_module(magnitude=np.ones(64)), f"'{Q_PROJ}' has a DoRA magnitude"),
    "bias": (with_module(bias=np.ones(64)), f"'{Q_PROJ}' has a bias on B"),
    "whole": (
        (
            FileAdapter("mine", random_adapter(UNTIED).modules, {"model.norm.weight": np.ones(64)}),
            UNTIED,
        ),
        "'model.norm.weight' is trained whole",
    ),
    "rows": (
        (
            random_adapter(UNTIED)._replace(
                rows={"model.embed_tokens": RowAdapter((3,), RANK_4[:1])}
            ),
            UNTIED,
        ),
        "rows of 'model.embed_tokens' are trained",
    ),
    "nothing": ((FileAdapter("mine", {}), UNTIED), "it has no low-rank pair"),
    "tied head": (renamed("lm_head"), "'lm_head' is of the table that embedding and head share"),
    "tied table": (renamed("model.embed_tokens"), "'model.embed_tokens' is of the table"),
    "unknown": (renamed("model.layers.0.q_proj"), "'model.layers.0.q_proj' is no linear layer"),
    "layer": (renamed("model.layers.3.self_attn.q_proj"), "is no linear layer or embedding"),
    "norm": (renamed("model.norm"), "'model.norm' is no linear layer"),
    "kind": (with_module(kind="conv"), "is conv in the adapter and linear in the model"),
    "shape": (
        with_module(a=np.ones((4, 63))),
        "has inputs and outputs (63, 64), the model has (64, 64)",
    ),
    "ranks": (with_module(a=np.ones((3, 64))), "of rank 3 and B (64, 4) of rank 4"),
    "values": (with_module(b=RANK_4.T * np.nan), f"B of '{Q_PROJ}' is not finite"),
    "scale": (with_module(scale=np.inf), "has scale inf"),
    "overflow": (
        with_module(scale=3e38, b=9 * RANK_4.T),
        "overflow float32: 'blk.0.attn_q.weight.lora_b'",
    ),
}


@pytest.mark.parametrize(("given_and_config", "fault"), UNWRITABLE.values(), ids=UNWRITABLE)
def test_what_can_not_be_written_is_named(tmp_path, given_and_config, fault):
    with pytest.raises(InputError, match=re.escape(fault)):
        write(tmp_path / "a", *given_and_config)
    assert not [*tmp_path.iterdir()]


A, B = (f"blk.0.attn_q.weight.lora_{part}" for part in "ab")
ONES = np.ones((4, 64), np.float32)
BAD_METADATA = {
    "a model": ({"general.type": "model"}, "general.type is 'model', expected 'adapter'"),
    "no type": ({"general.type": None}, "general.type is None"),
    "control vector": ({"adapter.type": "cvec"}, "adapter.type is 'cvec', expected 'lora'"),
    "a list": ({"adapter.type": ["lora"]}, "adapter.type is ['lora']"),
    "aLoRA": ({"adapter.alora.invocation_tokens": [1, 2]}, "invocation_tokens'=array([1, 2]"),
    "unknown": ({"adapter.lora.new": 1}, "'adapter.lora.new'=1 is not implemented"),
}
BAD_ALPHAS = {
    "NaN": (math.nan, "adapter.lora.alpha is nan, expected a finite float"),
    "infinite": (math.inf, "adapter.lora.alpha is inf"),
    "negative": (-1.0, "adapter.lora.alpha is -1.0"),
    "an integer": (16, "adapter.lora.alpha is 16"),
    "huge": (3.4e38, f"overflows float32: B of '{Q_PROJ}'"),
}
BAD_TENSORS = {
    "no B": ({B: None}, "'blk.0.attn_q.weight' has no lora_b"),
    "no A": ({A: None}, "'blk.0.attn_q.weight' has no lora_a"),
    "the base": ({A[:-7]: ONES}, "'blk.0.attn_q.weight' itself is in the file"),
    "extra": ({"blk.0.attn_q.bias": ONES[0]}, "'blk.0.attn_q.bias' is no tensor"),
    "layer": ({"blk.2.attn_q.weight.lora_a": ONES}, "'blk.2.attn_q.weight' is no tensor"),
    "path": ({"../../x.lora_a": ONES}, "'../../x' is no tensor"),
    "NUL": ({"a\0b": ONES}, r"'a\x00b' is no tensor"),
    "part": ({f"{A[:-1]}c": ONES}, "'blk.0.attn_q.weight.lora_c' is no tensor"),
    "no name": ({".lora_a": ONES}, "'.lora_a' is no tensor"),
    "shape": ({A: ONES[:, :63]}, "has (4, 63) and (64, 4), expected (4, 64) and (64, 4)"),
    "rank": ({A: ONES[:3]}, "has (3, 64) and (64, 4), expected (4, 64)"),
    "transposed": ({A: ONES.T, B: ONES}, "has (64, 4) and (4, 64), expected (64, 64)"),
    "vector": ({A: ONES[0]}, "has (64,) and (64, 4), expected (4, 64)"),
    "norm": ({"output_norm.weight": ONES}, "'output_norm.weight' has (4, 64), expected (64,)"),
    "values": ({A: ONES * np.inf}, f"A of '{Q_PROJ}' is not finite"),
    "integers": ({A: ONES.astype(np.int32)}, "tensor types that can't be read: I32"),
}
UNREADABLE = {
    "architecture": ({"architecture": "qwen2"}, "architecture is 'qwen2', expected 'llama'"),
    **{name: ({"metadata": values}, fault) for name, (values, fault) in BAD_METADATA.items()},
    **{f"alpha {name}": ({"alpha": value}, fault) for name, (value, fault) in BAD_ALPHAS.items()},
    **{name: ({"tensors": values}, fault) for name, (values, fault) in BAD_TENSORS.items()},
}


@pytest.mark.parametrize(("changes", "fault"), UNREADABLE.values(), ids=UNREADABLE)
def test_what_can_not_be_read_is_named(tmp_path, changes, fault):
    adapter, more = random_adapter(UNTIED), changes.get("tensors", {})
    adapter.modules[Q_PROJ].b[0] = 16
    tensors = stored_factors(adapter, UNTIED) | more
    kept = {name: array for name, array in tensors.items() if array is not None}
    path = write_with_package(tmp_path / "a.gguf", **{**changes, "tensors": kept})
    with pytest.raises(InputError, match=re.escape(fault)) as caught:
        read(path, UNTIED)
    assert str(path) in str(caught.value)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A file of one pair, its bytes, and its size without the padding at the end."""
    adapter = random_adapter(UNTIED, rank=1)
    path = tmp_path_factory.mktemp("tiny") / "a.gguf"
    write(path, adapter._replace(modules={Q_PROJ: adapter.modules[Q_PROJ]}), UNTIED)
    return path, path.read_bytes()


def test_a_file_cut_anywhere_is_refused(tiny, tmp_path):
    path, whole = tmp_path / "cut.gguf", tiny[1]
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=re.escape(str(path))):
            read(path, UNTIED)
    path.write_bytes(whole)
    assert [*read(path, UNTIED).modules] == [Q_PROJ]


@settings(deadline=None)
@given(st.data())
def test_a_damaged_file_is_read_or_refused(tiny, data):
    """Each number in the header is replaced by one that lies, and bytes by others."""
    path, whole = tiny[0].with_name("damaged.gguf"), tiny[1]
    header = whole.index(b"lora_b") + 30
    offset = data.draw(st.integers(0, header))
    lie = data.draw(
        st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]) | st.integers(0, 255)
    )
    width = data.draw(st.sampled_from([1, 4, 8]))
    raw = (lie % 256**width).to_bytes(width, "little")
    path.write_bytes(whole[:offset] + raw + whole[offset + width :])
    with contextlib.suppress(InputError):
        found = read(path, UNTIED)
        assert all(np.isfinite(delta_weight(module)).all() for module in found.modules.values())
    with contextlib.suppress(InputError):
        read_for_inspection(path)


def with_tensors(whole, names):
    """The file's metadata, and an entry of no bytes of its own for each name."""
    start, names = whole.index(b"blk.0") - 8, [name.encode() for name in names]
    rest = b"".join(
        len(n).to_bytes(8, "little") + n + struct.pack("<IQQIQ", 2, 64, 1, 0, 0) for n in names
    )
    return whole[:8] + struct.pack("<Q", len(names)) + whole[16:start] + rest + bytes(512)


@pytest.mark.parametrize(
    ("reads", "name", "count", "fault"),
    [
        (lambda path: read(path, UNTIED), "x{}.lora_b", 100_000, "100000 tensors"),
        (lambda path: read(path, UNTIED), "x{}.lora_b", 20_000, "and 19993 more"),
        (read_for_inspection, "blk.{}.attn_q.weight.lora_a", 20_000, "and 19993 more"),
    ],
)
def test_many_entries_are_refused_at_once(tiny, tmp_path, reads, name, count, fault):
    path = tmp_path / "many.gguf"
    path.write_bytes(with_tensors(tiny[1], map(name.format, range(count))))
    with pytest.raises(InputError, match=fault) as caught:
        within(1, lambda: reads(path))
    assert len(str(caught.value)) < 5000


def test_tensors_that_overlap_are_refused(tiny, tmp_path):
    names = [f"blk.{i}.attn_q.weight.lora_{part}" for i in range(40) for part in "ab"]
    path = tmp_path / "many.gguf"
    path.write_bytes(with_tensors(tiny[1], names))
    with pytest.raises(InputError, match="they overlap"):
        read_for_inspection(path)
