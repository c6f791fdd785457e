"""Hostile adapter files of every format: refused by name, at once, and nothing of them is run."""

import contextlib
import json
import os
import pickle
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_jax as lora
from interop.adapter_file import delta_weight
from interop.adapter_format import CONFIG, Content, Given
from interop.adapter_formats import FORMATS, open_content, read, write
from interop.adapter_plan import to_plan
from interop.keymaps import Keymap, Rule

from clocks import within
from format_samples import SAMPLES, TOLD, many_entries, sample, told


def contents(format, tmp_path):
    path = tmp_path / f"a{SAMPLES[format][0]}"
    if not path.exists():
        write(path, sample(format, "dora" if "dora" in SAMPLES[format][2] else ""), format, TOLD)
    content = open_content(path)
    return content._replace(tensors={n: np.array(t) for n, t in content.tensors.items()})


ORDERS = {"linear": (1, 0), "embedding": (), "conv": (3, 2, 0, 1)}


def tree_of(file):
    """A tree of zeros that the sample fits, and its table."""
    base = told(file).base
    rules = [Rule(name, f"{name}.weight", ORDERS[m.kind], m.kind) for name, m in base.items()]
    shapes = {rule.path: leaf_shape(rule, base[rule.path].shape) for rule in rules}
    return {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}, Keymap((*rules,))


def leaf_shape(rule, shape):
    """The shape of a leaf, from its tensor's."""
    return tuple(shape[rule.order.index(k)] for k in range(len(shape))) if rule.order else shape


def _renamed(tensors, name, new):
    return {new if key == name else key: tensor for key, tensor in tensors.items()}


NAMES = st.sampled_from(
    ["", ".", "..", "/etc/passwd", "a\0b.lora_A", "../x.lora_B.weight", ".lora_A", "lora_a",
     "unet.", "x" * 5000 + ".lora_A", "unet.x.lora_A.weight", "lora_unet_.alpha", "ü.lora_a.weight"]
)  # fmt: skip
SHAPES = st.lists(st.integers(0, 4), max_size=5).map(tuple)
DTYPES = st.sampled_from([np.int32, np.uint8, np.bool_, np.float64, np.float16,
                          ml_dtypes.float8_e4m3fn])  # fmt: skip
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("drop"), st.just(None)),
        st.tuples(st.just("rename"), NAMES),
        st.tuples(st.just("shape"), SHAPES),
        st.tuples(st.just("dtype"), DTYPES),
        st.tuples(st.just("value"), st.sampled_from([np.nan, np.inf, 1e38, 1e300])),
        st.tuples(st.just("add"), NAMES),
        st.tuples(st.just("turn"), st.just(None)),
    ),
    min_size=1,
    max_size=4,
)


def changed(tensors, kind, value, pick):
    """One tensor of a file made otherwise."""
    name = sorted(tensors)[pick % len(tensors)] if tensors else ""
    made = {
        "drop": lambda: {key: t for key, t in tensors.items() if key != name},
        "rename": lambda: _renamed(tensors, name, value),
        "shape": lambda: {**tensors, name: np.ones(value, np.float32)},
        "dtype": lambda: {**tensors, name: tensors[name].astype(value)},
        "value": lambda: {**tensors, name: np.full(tensors[name].shape, value)},
        "add": lambda: {**tensors, value: np.ones((3, 8), np.float32)},
        "turn": lambda: {**tensors, name: tensors[name].T},
    }
    return made[kind]() if tensors else tensors


@pytest.mark.parametrize("format", SAMPLES)
def test_mutated_tensors_are_read_or_refused_by_name(format, tmp_path):
    whole, (tree, table) = contents(format, tmp_path), tree_of(sample(format))
    assert to_plan(FORMATS[format].read(whole, told(sample(format))), tree, table)

    @settings(max_examples=60, deadline=1000)
    @given(CHANGES, st.integers(0, 50), st.booleans())
    def check(changes, pick, knows_base):
        tensors = whole.tensors
        for k, (kind, value) in enumerate(changes):
            tensors = changed(tensors, kind, value, pick + k)
        given_to = told(sample(format)) if knows_base else TOLD
        with contextlib.suppress(lora.InputError):
            file = FORMATS[format].read(whole._replace(tensors=tensors), given_to)
            assert all(delta_weight(module).size for module in file.modules.values())
            adapter, _ = to_plan(file, tree, table)
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(adapter))

    check()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@settings(max_examples=80, deadline=1000)
@given(st.sampled_from(["fine_tune_type", "lora_parameters", "scale", "rank", "num_layers"]), JSON)
def test_any_config_of_mlx_is_read_or_refused(key, value):
    inner = {"rank": 3, "scale": 2.0}
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": inner}
    config = {**config, "lora_parameters": {**inner, key: value}} if key in inner else {
        **config, key: value
    }  # fmt: skip
    tensors = {"a.lora_a": np.ones((4, 3), "f4"), "a.lora_b": np.ones((3, 4), "f4")}
    with contextlib.suppress(lora.InputError):
        assert FORMATS["mlx"].read(Content(Path("a"), tensors, {}, config), Given()).modules


@settings(max_examples=40, deadline=2000)
@given(st.sampled_from(["r", "lora_alpha", "rank_pattern", "use_rslora", "target_modules"]), JSON)
def test_any_config_of_diffusers_is_read_or_refused(key, value):
    config = {"unet.r": 3, "unet.lora_alpha": 3, f"unet.{key}": value}
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    tensors = {"unet.a.lora_A.weight": np.ones((3, 4)), "unet.a.lora_B.weight": np.ones((4, 3))}
    with contextlib.suppress(lora.InputError):
        assert FORMATS["diffusers"].read(Content(Path("a"), tensors, metadata), Given()).modules


@pytest.mark.parametrize("format", ["loralib", "kohya", "mlx"])
def test_damaged_bytes_are_read_or_refused(format, tmp_path):
    source = tmp_path / f"a{SAMPLES[format][0]}"
    write(source, sample(format), format, TOLD)
    source = source / "adapters.safetensors" if source.is_dir() else source
    whole, rng = source.read_bytes(), np.random.default_rng(0)
    damaged = tmp_path / f"b{source.suffix}"
    for position in rng.integers(0, len(whole), 40).tolist():
        flipped = bytearray(whole)
        flipped[position] ^= 1 << (position % 8)
        for content in (bytes(flipped), whole[:position]):
            damaged.write_bytes(content)
            with contextlib.suppress(lora.InputError):
                read(damaged, TOLD, format=format)


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_payloads_in_pickles_are_not_run(suffix, protocol, tmp_path):
    source, target = tmp_path / f"a{suffix}", tmp_path / "touched"
    source.write_bytes(pickle.dumps({"a.lora_A": Payload(target)}, protocol))
    with pytest.raises(lora.InputError, match="read safely"):
        read(source, TOLD)
    torch.save({"a.lora_A": Payload(target)}, source, pickle_protocol=protocol or 2)
    with pytest.raises(lora.InputError, match="read safely"):
        read(source, TOLD)
    assert not target.exists()


@pytest.mark.parametrize("format", SAMPLES)
def test_a_hundred_thousand_entries_are_refused_at_once(format, tmp_path):
    whole = contents(format, tmp_path)
    end = sorted(whole.tensors)[0][len(sorted(SAMPLES[format][1])[0]) :]
    (tmp_path / "many.safetensors").write_bytes(many_entries(f"unet.m{{}}{end}"))

    def opened_and_read():
        content = open_content(tmp_path / "many.safetensors")._replace(config=whole.config)
        return FORMATS[format].read(content, TOLD)

    with pytest.raises(lora.InputError, match="and 99995 more"):
        within(1, opened_and_read)


def test_a_torch_file_of_a_long_archive_is_refused_unread(tmp_path):
    end = b"PK\x05\x06" + bytes(4) + b"\xff\xff" * 2 + bytes(10)
    (tmp_path / "a.pth").write_bytes(bytes(100) + end)
    with pytest.raises(lora.InputError, match="holds 65,535 entries or more: it would"):
        read(tmp_path / "a.pth", TOLD)


def test_a_config_of_any_size_is_refused(tmp_path):
    write(tmp_path / "mlx", sample("mlx"), "mlx")
    with open(tmp_path / "mlx" / CONFIG, "wb") as file:
        file.truncate(2**30)
    with pytest.raises(lora.InputError, match="more than the 1048576 it may have"):
        read(tmp_path / "mlx")
    (tmp_path / "mlx" / CONFIG).write_text("[" * 10_000)
    with pytest.raises(lora.InputError, match=r"nested too deeply|not JSON"):
        read(tmp_path / "mlx")
