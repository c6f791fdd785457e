"""PEFT directories read without their model, against what PEFT itself computes."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from interop import peft_file, torch_io
from interop.adapter_file import FileAdapter, ModuleAdapter, delta_weight
from interop.comparison import compare
from interop.inspection import inspect
from interop.spectra import singular_values
from lora_jax.errors import InputError


class Experts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Parameter(torch.randn(3, 6, 4))
        self.down = torch.nn.Parameter(torch.randn(3, 4, 6))

    def forward(self, x):
        return sum(x @ up.T @ down.T for up, down in zip(self.up, self.down, strict=True))


class Model(torch.nn.Module):
    """A layer of each kind."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(11, 4)
        self.blocks = torch.nn.ModuleList(
            torch.nn.ModuleDict({"fc": torch.nn.Linear(4, 6), "out": torch.nn.Linear(6, 4)})
            for _ in range(2)
        )
        self.conv = torch.nn.Conv2d(3, 5, (2, 3))
        self.experts = Experts()
        self.norm = torch.nn.LayerNorm(4)


LAYERS = ["fc", "out", "conv", "table"]
CONFIGS = {
    "plain": {"target_modules": LAYERS},
    "rslora": {"target_modules": LAYERS, "use_rslora": True},
    "patterns": {
        "target_modules": LAYERS,
        "rank_pattern": {"blocks.0.fc": 2, "^table": 5},
        "alpha_pattern": {r"blocks\.\d\.out": 3, "conv": 1.5},
    },
    "pattern of targets": {"target_modules": r"blocks\.\d\.(fc|out)"},
    "a layer": {"target_modules": ["fc"], "layers_to_transform": [1], "layers_pattern": "blocks"},
    "dora": {"target_modules": ["fc", "conv"], "use_dora": True},
    "biased": {"target_modules": ["fc"], "lora_bias": True},
    "saved": {"target_modules": ["fc"], "modules_to_save": ["norm"], "bias": "lora_only"},
    "experts": {"target_modules": [], "target_parameters": ["experts.up", "experts.down"]},
    "experts of two ranks": {
        "target_modules": [],
        "target_parameters": ["experts.up", "experts.down"],
        "rank_pattern": {"experts.up": 5},
        "alpha_pattern": {"experts.down": 4},
    },
    "tokens": {"target_modules": ["fc"], "trainable_token_indices": {"table": [3, 7]}},
}


def saved(directory, *, pickled=False, **config):
    """A real adapter in a directory, and the PeftModel that it was saved from."""
    torch.manual_seed(0)
    model = get_peft_model(
        Model(), LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, **config)
    )
    model.save_pretrained(directory, safe_serialization=not pickled)
    return model


def updates(model):
    """PEFT's own ΔW of each adapted module, by name."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().numpy()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and "default" in module.scaling
    }


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.filterwarnings("ignore")
def test_updates_are_those_of_peft(tmp_path, config, pickled):
    model = saved(tmp_path, pickled=pickled, **config)
    expected, file = updates(model), peft_file.read(tmp_path).adapter
    assert file.modules.keys() == expected.keys()
    report = {module.name: module for module in inspect(tmp_path).modules}
    for name, module in file.modules.items():
        found = delta_weight(module)
        assert np.abs(expected[name]).max() > 1e-2
        assert report[name].shape == found.shape
        if module.kind == "conv":
            found = found.reshape(expected[name].shape)
        np.testing.assert_allclose(found, expected[name], atol=1e-5)
        np.testing.assert_allclose(report[name].norm_delta, np.linalg.norm(found), rtol=1e-4)
    held = {"dora": "magnitude", "biased": "bias"}
    extras = {extra for module in report.values() for extra in module.extras}
    assert extras == {held[key] for key in held if config is CONFIGS[key]}
    if config is CONFIGS["saved"]:
        assert {*file.whole} == {"norm.weight", "norm.bias", "blocks.0.fc.bias", "blocks.1.fc.bias"}
    if config is CONFIGS["tokens"]:
        assert file.rows["table"].indices == (3, 7)


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.filterwarnings("ignore")
def test_experts_of_several_ranks_or_scales_are_those_of_peft(tmp_path, key):
    config = {"target_modules": ["fc"], "target_parameters": ["experts.down", "experts.up"]}
    model = saved(tmp_path, **config, **{key: {"experts.down": 5}})
    expected, file = updates(model), peft_file.read(tmp_path).adapter
    assert file.modules.keys() == expected.keys() >= {"experts.base_layer", "experts"}
    for name, module in file.modules.items():
        found = delta_weight(module)
        np.testing.assert_allclose(found, expected[name].reshape(found.shape), atol=1e-5)
    assert any("in this order" in note for note in file.notes) == (key == "alpha_pattern")


def test_names_with_the_adapters_own_name_are_read(tmp_path):
    saved(tmp_path, target_modules=["fc"])
    weights = tmp_path / "adapter_model.safetensors"
    named = {
        name.replace(".weight", ".default.weight"): np.array(tensor)
        for name, tensor in torch_io.read(weights).items()
    }
    torch_io.write(weights, named)
    assert {*peft_file.read(tmp_path).adapter.modules} == {"blocks.0.fc", "blocks.1.fc"}


@pytest.mark.parametrize(
    ("known", "again"),
    [
        ("base_model.model.blocks.0.fc.lora_A.weight", "blocks.0.fc.lora_A.default.weight"),
        ("base_model.model.blocks.0.fc.lora_B.weight", "blocks.0.fc.lora_B.weight"),
        ("base_model.model.norm.weight", "norm.base_layer.weight"),
    ],
)
def test_a_tensor_under_two_names_is_refused(tmp_path, known, again):
    saved(tmp_path, target_modules=["fc"], modules_to_save=["norm"])
    weights = tmp_path / "adapter_model.safetensors"
    tensors = {name: np.array(tensor) for name, tensor in torch_io.read(weights).items()}
    torch_io.write(weights, {**tensors, again: tensors[known] * 2})
    with pytest.raises(InputError, match="under two names: ") as caught:
        peft_file.read(tmp_path)
    assert known in str(caught.value)
    assert again in str(caught.value)


def test_what_peft_stores_of_the_base_is_told_and_not_trained(tmp_path):
    saved(tmp_path / "peft", target_modules=["fc", "table"])
    bare = peft_file.read(tmp_path / "peft").adapter
    weights = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = {name: np.array(tensor) for name, tensor in torch_io.read(weights).items()}
    tensors["base_model.model.table.base_layer.weight"] = np.ones((11, 4), np.float32)
    tensors["base_model.model.norm.weight"] = np.ones(4, np.float32)
    torch_io.write(weights, tensors)
    found = peft_file.read(tmp_path / "peft").adapter
    assert not found.whole
    assert compare(bare, found).beyond(1e-6) == []
    assert "the base's own weights beside its adapter: table.weight" in found.notes
    assert any("config doesn't train" in n and "norm.weight" in n for n in found.notes)
    torch_io.write(weights, tensors | {"base_model.model.norm.weight": np.zeros(4, np.float32)})
    other = peft_file.read(tmp_path / "peft").adapter
    assert compare(found, other).beyond(1e-6) == ["norm.weight of the base"]


def test_factors_of_another_adapter_are_no_weights_of_the_base(tmp_path):
    saved(tmp_path, target_modules=["fc"])
    bare, weights = peft_file.read(tmp_path).adapter, tmp_path / "adapter_model.safetensors"
    tensors = {name: np.array(tensor) for name, tensor in torch_io.read(weights).items()}
    torch_io.write(weights, {**tensors, "base_model.model.fc.lora_A.other.weight": np.ones(3)})
    found = peft_file.read(tmp_path).adapter
    assert compare(bare, found).beyond(1e-6) == ["fc.lora_A.other.weight"]


def test_default_is_taken_out_of_its_own_place_alone(tmp_path):
    saved(tmp_path, target_modules=["fc"])
    weights = tmp_path / "adapter_model.safetensors"
    names = {"blocks.0.fc": "m.default_proj.q", "blocks.1.fc": "m_proj.q"}
    tensors = torch_io.read(weights)
    for old, new in names.items():
        tensors = {name.replace(old, new): np.array(tensor) for name, tensor in tensors.items()}
    torch_io.write(weights, tensors)
    modules = peft_file.read(tmp_path).adapter.modules
    assert {*modules} == {*names.values()}
    for name, module in modules.items():
        assert np.array_equal(module.a, tensors[f"base_model.model.{name}.lora_A.weight"])


@pytest.mark.parametrize("parameter", ["experts.up", "up"])
def test_only_what_target_parameters_name_is_experts(tmp_path, parameter):
    saved(tmp_path, target_modules=["fc"], target_parameters=[parameter])
    weights = tmp_path / "adapter_model.safetensors"
    twice = {
        name: np.concatenate([tensor] * 2, axis=int("lora_B" in name)) if ".fc." in name else tensor
        for name, tensor in torch_io.read(weights).items()
    }
    torch_io.write(weights, twice)
    modules = peft_file.read(tmp_path).adapter.modules
    kinds = {name: (module.kind, module.rank) for name, module in modules.items()}
    plain = {f"blocks.{n}.fc": ("linear", 6) for n in range(2)}
    assert kinds == {**plain, "experts": ("experts", 3)}


def test_a_link_to_weights_somewhere_else_is_refused(tmp_path):
    weights = tmp_path / "a" / "adapter_model.safetensors"
    saved(tmp_path / "a", target_modules=["fc"])
    weights.rename(tmp_path / "secret")
    weights.symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="is a link to"):
        inspect(tmp_path / "a")


def test_the_links_of_a_hubs_cache_are_followed(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b/snapshots/123", tmp_path / "models--a--b/blobs"
    saved(snapshot, target_modules=["fc"])
    blobs.mkdir()
    for file in [*snapshot.iterdir()]:
        file.rename(blobs / file.name)
        file.symlink_to(f"../../blobs/{file.name}")
    assert len(inspect(snapshot).modules) == 2


def test_a_directory_is_looked_at_before_its_folder_adapter(tmp_path):
    saved(tmp_path, target_modules=["fc"])
    saved(tmp_path / "adapter", target_modules=["out"])
    found = {module.name for module in inspect(tmp_path).modules}
    assert found == {"blocks.0.fc", "blocks.1.fc"}
    (tmp_path / "adapter_config.json").unlink()
    found = {module.name for module in inspect(tmp_path).modules}
    assert found == {"blocks.0.out", "blocks.1.out"}


FC = "base_model.model.blocks.0.fc.lora_"
BROKEN = {
    "no B": (lambda t: t.pop(f"{FC}B.weight"), r"without both A and B: blocks\.0\.fc"),
    "another rank": (
        lambda t: t.update({f"{FC}B.weight": np.ones((6, 2), "f4")}),
        r"blocks\.0\.fc has A \(3, 4\) and B \(6, 2\)",
    ),
    "a vector": (lambda t: t.update({f"{FC}A.weight": np.ones(3, "f4")}), r"has A \(3,\)"),
    "a number": (lambda t: t.update({f"{FC}A.weight": np.float32(3)}), r"has A \(\)"),
    "integers": (lambda t: t.update({f"{FC}A.weight": np.ones((3, 4), "i4")}), "A of int32"),
    "nothing": (lambda t: t.update({f"{FC}A.weight": np.ones((3, 0), "f4")}), "fc has A"),
}


@pytest.mark.parametrize(("change", "fault"), BROKEN.values(), ids=BROKEN.keys())
def test_factors_that_are_none_are_refused_by_name(tmp_path, change, fault):
    saved(tmp_path, target_modules=["fc"])
    weights = tmp_path / "adapter_model.safetensors"
    tensors = {name: np.array(tensor) for name, tensor in torch_io.read(weights).items()}
    change(tensors)
    torch_io.write(weights, tensors)
    with pytest.raises(InputError, match=fault):
        inspect(tmp_path)


@pytest.mark.parametrize("key", ["r", "lora_alpha"])
@pytest.mark.parametrize(
    "value",
    [
        "16",
        None,
        0,
        -1,
        float("nan"),
        float("inf"),
        True,
        [8],
        pytest.param(10**400, id="401 digits"),
    ],
)
def test_a_config_without_usable_rank_or_alpha_is_refused(tmp_path, key, value):
    saved(tmp_path, target_modules=["fc"])
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), key: value}))
    if (key, value) in (("lora_alpha", 0), ("lora_alpha", -1)):
        assert "it can't be used here: lora_alpha is" in inspect(tmp_path).notes[0]
        return
    with pytest.raises(InputError, match=f"{key} is"):
        inspect(tmp_path)


SHAPES = {
    "linear": ((3, 7), (9, 3)),
    "wide rank": ((5, 4), (3, 5)),
    "conv": ((3, 4, 2, 3), (9, 3)),
    "experts": ((2, 3, 7), (2, 9, 3)),
    "embedding": ((3, 11), (4, 3)),
}


def drawn(kind, seed=0):
    rng = np.random.default_rng(seed)
    a, b = (rng.normal(size=shape).astype("f4") for shape in SHAPES[kind])
    return ModuleAdapter(a, b, -1.5, "linear" if kind == "wide rank" else kind)


@pytest.mark.parametrize("kind", SHAPES)
def test_spectra_are_those_of_the_whole_update(kind):
    module = drawn(kind)
    dense = delta_weight(module).astype(np.float64)
    dense = dense.reshape(dense.shape[0], -1) if kind == "conv" else dense
    expected = np.linalg.svd(dense, compute_uv=False)[..., : module.rank]
    found = singular_values({"x": module})["x"][..., : expected.shape[-1]]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("dtype", "size"), [("f2", 6e4), ("f4", 1e38), ("f8", 1e200)])
def test_spectra_of_extreme_values_overflow_nowhere(dtype, size):
    module = drawn("linear")
    large = module._replace(a=np.sign(module.a).astype(dtype) * np.array(size, dtype))
    found = singular_values({"x": large})["x"]
    expected = singular_values({"x": module._replace(a=np.sign(module.a))})["x"] * size
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    both = large._replace(b=np.sign(module.b).astype(dtype) * np.array(size, dtype))
    assert not np.isnan(singular_values({"x": both})["x"]).any()
    assert compare(FileAdapter("a", {"x": both}), FileAdapter("b", {"x": large})).beyond(1e-6)


@pytest.mark.parametrize("kind", SHAPES)
def test_differences_are_those_of_the_whole_updates(kind):
    one, two = drawn(kind), drawn(kind, 1)._replace(scale=0.5)
    x, y = (delta_weight(module).astype(np.float64) for module in (one, two))
    (found,) = compare(FileAdapter("a", {"x": one}), FileAdapter("b", {"x": two})).modules
    norms = np.linalg.norm(x), np.linalg.norm(y)
    assert found.relative == pytest.approx(np.linalg.norm(x - y) / max(norms), rel=1e-5)
    assert found.largest == pytest.approx(np.abs(x - y).max(), rel=1e-5)
    assert found.cosine == pytest.approx((x * y).sum() / np.prod(norms), rel=1e-5)
    turned = one._replace(a=2 * one.a, b=one.b / 4, scale=2 * one.scale)
    (same,) = compare(FileAdapter("a", {"x": one}), FileAdapter("b", {"x": turned})).modules
    assert same.worst < 1e-7
    assert same.scales == (-1.5, -3.0)


def test_a_large_update_is_bounded_and_not_formed(monkeypatch):
    monkeypatch.setattr("interop.comparison._ENTRIES", 10)
    one, two = drawn("linear"), drawn("linear", 1)
    x, y = delta_weight(one), delta_weight(two)
    (found,) = compare(FileAdapter("a", {"x": one}), FileAdapter("b", {"x": two})).modules
    assert found.largest == pytest.approx(np.linalg.norm(x - y, 2), rel=1e-5)
    assert found.largest > np.abs(x - y).max()


def test_other_shapes_and_values_that_are_not_finite_differ():
    one = drawn("linear")
    for other in (drawn("embedding"), one._replace(a=one.a * np.nan)):
        (found,) = compare(FileAdapter("a", {"x": one}), FileAdapter("b", {"x": other})).modules
        assert found.worst == np.inf
        assert np.isnan(found.cosine)
