"""What holds of every format of adapter files: stable bytes, exact values, clear refusals."""

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import lora_jax as lora
from interop import torch_io
from interop.adapter_file import FileAdapter, delta_weight
from interop.adapter_format import BaseModule, Content
from interop.adapter_formats import FORMATS, format_of, open_content, read, write

from format_samples import SAMPLES, TOLD, bytes_of, sample, told

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
