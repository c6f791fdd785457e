"""What holds of every format of adapter files: stable bytes, exact values, and hostile files."""

import contextlib
import json
import os
import pickle
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_jax as lora
from interop import torch_io
from interop.adapter_file import FileAdapter, delta_weight
from interop.adapter_format import CONFIG, BaseModule, Content, Given
from interop.adapter_formats import FORMATS, format_of, open_content, read, write
from interop.adapter_plan import to_plan
from interop.keymaps import Keymap, Rule

from module_cases import pair

LAYERS = [f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "o_proj")]
UNET = ["unet.mid.attn.to_q", "unet.mid.attn.to_out.0", "text_encoder.layers.0.q_proj"]
TOLD = Given(alpha=6, head_dim=4)
# By format: a file's suffix, names, and whether it holds DoRA, kernels and tables.
SAMPLES = {
    "loralib": (".pt", LAYERS, ("conv", "embedding")),
    "lora_layer": (".pth", LAYERS, ()),
    "minimind": (".pth", LAYERS, ()),
    "kohya": (".safetensors", UNET, ("dora", "conv")),
    "diffusers": (".safetensors", UNET, ("dora", "conv")),
    "mlx": ("", LAYERS, ("dora", "embedding")),
    "torchtune": (".safetensors", LAYERS, ("dora",)),
}


def sample(format, feature="", dtype=np.float32):
    """An adapter that the format holds."""
    _, names, _ = SAMPLES[format]
    dora = feature == "dora"
    modules = {name: pair(3, (8,), 8, 2.0, dora=dora, dtype=dtype) for name in names}
    if feature == "conv":
        modules["unet.conv_in"] = pair(3, (4, 3, 3), 8, 2.0, "conv", dtype=dtype)
    if feature == "embedding":
        modules["model.embed_tokens"] = pair(3, (11,), 8, 2.0, "embedding", dtype=dtype)
    if format == "minimind":
        modules = {name: module._replace(scale=1.0) for name, module in modules.items()}
    return FileAdapter("mine", modules)


def told(file):
    """What readers of the sample have to know: its modules too."""
    shapes = {
        name: (m.b.shape[0], *m.a.shape[1:]) if m.kind != "embedding" else (11, 8)
        for name, m in file.modules.items()
    }
    base = {name: BaseModule(file.modules[name].kind, shape) for name, shape in shapes.items()}
    return TOLD._replace(base=base)


def bytes_of(path):
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [(file.name if path.is_dir() else "", file.read_bytes()) for file in files]


PAIRS = [(format, feature) for format, (*_, features) in SAMPLES.items() for feature in
         ("", *features)]  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=str)
@pytest.mark.parametrize(("format", "feature"), PAIRS)
def test_writing_what_was_read_gives_the_same_bytes(format, feature, dtype, tmp_path):
    file = sample(format, feature, dtype)
    first, second = (tmp_path / f"{name}{SAMPLES[format][0]}" for name in ("a", "b"))
    write(first, file, format, TOLD)
    again = read(first, told(file))
    assert again.format == format
    assert again.modules.keys() == file.modules.keys()
    for name, module in file.modules.items():
        found = again.modules[name]
        assert (found.scale, found.kind) == (module.scale, module.kind)
        assert found.b.dtype == dtype
        assert np.array_equal(delta_weight(found), delta_weight(module))
        assert np.array_equal(np.ravel(found.magnitude), np.ravel(module.magnitude))
        if (format, module.kind) != ("loralib", "conv"):  # which has a rank for each piece there
            assert np.array_equal(found.a, module.a)
            assert np.array_equal(found.b, module.b)
    write(second, again, format, TOLD)
    assert bytes_of(first) == bytes_of(second)
    shuffled = file._replace(modules=dict(reversed(file.modules.items())))
    third = tmp_path / f"c{SAMPLES[format][0]}"
    write(third, shuffled, format, TOLD)
    assert bytes_of(first) == bytes_of(third)


@pytest.mark.parametrize("format", SAMPLES)
def test_files_are_told_by_content_and_have_the_mode_of_the_umask(format, tmp_path):
    path = tmp_path / f"a{SAMPLES[format][0]}"
    old = os.umask(0o027)
    try:
        write(path, sample(format), format, TOLD)
    finally:
        os.umask(old)
    assert format_of(open_content(path)) == format
    file = path / "adapters.safetensors" if path.is_dir() else path
    assert file.stat().st_mode & 0o777 == 0o640
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("format", SAMPLES)
def test_what_a_dtype_cannot_hold_is_not_written(format, tmp_path):
    file = sample(format)
    name = next(iter(file.modules))
    wide = file.modules[name]._replace(a=np.full((3, 8), 1e6, np.float32))
    path = tmp_path / f"a{SAMPLES[format][0]}"
    with pytest.raises(lora.InputError, match="is not finite in float16"):
        write(path, file._replace(modules={name: wide}), format, TOLD._replace(dtype="float16"))
    with pytest.raises(lora.InputError, match="dtype is 'int8', expected one of float32"):
        write(path, file, format, TOLD._replace(dtype="int8"))
    with pytest.raises(lora.InputError, match="the adapter is empty"):
        write(path, FileAdapter("mine", {}), format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("path", "tensors", "message"),
    [
        ("a.zip", {}, "can't read tensors from this"),
        ("a.safetensors", {}, "its format is none that is known"),
        ("a.safetensors", {"weight": np.ones(2)}, r"its tensors: weight"),
        ("a.safetensors", {"a.lora_A": np.ones(2), "a.lora_a": np.ones(2)},
         "may be loralib or mlx: say which"),
    ],
)  # fmt: skip
def test_files_of_no_known_format_are_refused(path, tensors, message, tmp_path):
    torch_io.write(tmp_path / path, tensors)
    with pytest.raises(lora.InputError, match=message):
        read(tmp_path / path)


def test_what_is_asked_for_has_to_exist(tmp_path):
    with pytest.raises(lora.InputError, match="no such file"):
        read(tmp_path / "a.safetensors")
    with pytest.raises(lora.InputError, match=r"holds none of adapters\.safetensors"):
        read(tmp_path)
    with pytest.raises(lora.InputError, match="no adapter format 'zip'"):
        write(tmp_path / "a.pt", sample("loralib"), "zip")
    with pytest.raises(lora.InputError, match="can't write tensors to this"):
        write(tmp_path / "a.zip", sample("loralib"), "loralib")


A, B = np.ones((3, 8), "f4"), np.ones((8, 3), "f4")
TWICE = {
    "diffusers": {
        "unet.q.lora_A.weight": A, "unet.q.lora.down.weight": A, "unet.q.lora_B.weight": B,
    },
    "kohya": {
        f"lora_{part}_q.lora_{end}.weight": array
        for part in ("unet", "transformer") for end, array in (("down", A), ("up", B))
    },
    "minimind": {
        f"{name}.lora.{end}.weight": array
        for name in ("layers.0.attention.wo", "model.layers.0.self_attn.o_proj")
        for end, array in (("A", A), ("B", B))
    },
    "mlx": {
        "mlp.experts.0.up.lora_a": A.T, "mlp.experts.0.up.lora_b": B.T,
        "mlp.switch_mlp.up.lora_a": A[None], "mlp.switch_mlp.up.lora_b": B[None],
    },
}  # fmt: skip


@pytest.mark.parametrize("format", TWICE)
def test_modules_that_are_named_twice_are_refused(format):
    config = {"lora_parameters": {"rank": 3, "scale": 1.0}}
    known = TOLD._replace(base={"q": BaseModule("linear", (8, 8))}) if format == "kohya" else TOLD
    with pytest.raises(lora.InputError, match=r"twice|two names"):
        FORMATS[format].read(Content(Path("a"), TWICE[format], {}, config), known)


@pytest.mark.parametrize("alpha", ["6", 0, -1, float("nan"), True])
@pytest.mark.parametrize("format", ["loralib", "lora_layer", "torchtune"])
def test_an_alpha_that_is_no_number_is_refused_both_ways(format, alpha, tmp_path):
    path = tmp_path / f"a{SAMPLES[format][0]}"
    with pytest.raises(lora.InputError, match="expected a positive finite number"):
        write(path, sample(format), format, TOLD._replace(alpha=alpha))
    write(path, sample(format), format, TOLD)
    with pytest.raises(lora.InputError, match="expected a positive finite number"):
        read(path, TOLD._replace(alpha=alpha))


@pytest.mark.parametrize("head_dim", [0, -2, 3, 5, 6])
@pytest.mark.parametrize("format", ["minimind", "torchtune"])
def test_a_head_dim_that_does_not_fit_is_refused(format, head_dim):
    name = {"minimind": "layers.0.attention.wq.lora.{}.weight",
            "torchtune": "layers.0.attn.q_proj.lora_{}.weight"}[format]  # fmt: skip
    ends = "AB" if format == "minimind" else "ab"
    tensors = dict(zip(map(name.format, ends), (A, B), strict=True))
    with pytest.raises(lora.InputError, match=r"head_dim is|no heads of 6"):
        FORMATS[format].read(Content(Path("a"), tensors), TOLD._replace(head_dim=head_dim))


@pytest.mark.parametrize("format", [format for format in SAMPLES if format != "kohya"])
def test_a_scale_of_zero_is_kept_in_effect(format, tmp_path):
    file = sample(format)
    off = next(iter(file.modules))
    modules = {**file.modules, off: file.modules[off]._replace(scale=0.0)}
    path = tmp_path / f"a{SAMPLES[format][0]}"
    write(path, file._replace(modules=modules), format, TOLD)
    again = read(path, told(file)).modules
    assert not delta_weight(again[off]).any()
    assert all(delta_weight(again[name]).any() for name in modules if name != off)


# Hostile files.


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
    one = next(iter(whole.tensors.values()))
    many = {f"unet.m{k}{end}": one for k in range(100_000)}
    start = time.process_time()
    with pytest.raises(lora.InputError, match="and 99992 more"):
        FORMATS[format].read(whole._replace(tensors=many), TOLD)
    assert time.process_time() - start < 2


def test_a_torch_file_of_a_long_archive_is_refused_unread(tmp_path):
    end = b"PK\x05\x06" + bytes(4) + b"\xff\xff" * 2 + bytes(10)
    (tmp_path / "a.pth").write_bytes(bytes(100) + end)
    with pytest.raises(lora.InputError, match="holds 65535 entries or more: convert it"):
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
