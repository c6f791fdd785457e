"""diffusers' files: their documented maths, and what is written as PEFT loads it for diffusers."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

import lora_jax as lora
from interop import torch_io
from interop.adapter_file import FileAdapter, delta_weight
from interop.adapter_formats import read, write

from module_cases import pair
from unet_cases import FLAT, torch_weights, unet_params


@pytest.fixture(scope="module")
def params():
    return unet_params()


OLD = {
    "unet.mid_block.attn.to_q": "unet.mid_block.attn.processor.to_q_lora.{}.weight",
    "unet.mid_block.attn.to_out.0": "unet.mid_block.attn.processor.to_out_lora.{}.weight",
    "unet.conv_in": "unet.conv_in.lora.{}.weight",
    "text_encoder.layers.0.self_attn.q_proj":
        "text_encoder.layers.0.self_attn.q_proj.lora_linear_layer.{}.weight",
}  # fmt: skip
OLDEST = OLD | {
    "text_encoder.layers.0.self_attn.q_proj":
        "text_encoder.layers.0.self_attn.to_q_lora.{}.weight",
}  # fmt: skip


def diffusers_case(params, names=None, ends=("lora_A", "lora_B")):
    """A file's tensors, and the update of every module."""
    torch.manual_seed(2)
    tensors, deltas = {}, {}
    for module, weight in torch_weights(params).items():
        out, inputs, *kernel = weight.shape
        a, b = torch.randn(3, inputs, *kernel), torch.randn(out, 3, *[1] * len(kernel))
        name = names[module] if names else module + ".{}.weight"
        tensors |= {name.format(ends[0]): a, name.format(ends[1]): b}
        deltas[module] = torch.tensordot(b.flatten(1), a, 1)
    return tensors, deltas


@pytest.mark.parametrize("names", [None, OLD, OLDEST], ids=["today", "old", "oldest"])
def test_files_of_diffusers_of_every_age(names, params, tmp_path):
    ends = ("down", "up") if names else ("lora_A", "lora_B")
    tensors, deltas = diffusers_case(params, names, ends)
    torch.save(tensors, tmp_path / "pytorch_lora_weights.bin")
    file = read(tmp_path)
    assert "neither alphas nor a config" in file.notes[0]
    for module, delta in deltas.items():
        assert delta.abs().max() > 0.1
        np.testing.assert_allclose(delta_weight(file.modules[module]), delta, 1e-5, 1e-5)
    with_alpha = tensors | {f"{module}.alpha": torch.tensor(1.5) for module in deltas}
    torch.save(with_alpha, tmp_path / "pytorch_lora_weights.bin")
    scaled = read(tmp_path)
    assert not scaled.notes
    assert {module.scale for module in scaled.modules.values()} == {0.5}


def config_of(**settings):
    return {f"unet.{key}": value for key, value in settings.items()}


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({"r": 3, "lora_alpha": 6}, (2.0, 2.0, 2.0)),
        ({"r": 3, "lora_alpha": 6, "use_rslora": True}, (6 / 3**0.5,) * 3),
        ({"r": 3, "lora_alpha": 6, "alpha_pattern": {"to_q": 1.5}}, (0.5, 2.0, 2.0)),
        ({"r": 8, "rank_pattern": {".*": 3}, "lora_alpha": 6}, (2.0, 2.0, 2.0)),
    ],
)
def test_the_config_in_the_header_gives_the_scales(config, scales, params, tmp_path):
    tensors, _ = diffusers_case(params)
    metadata = {"lora_adapter_metadata": json.dumps(config_of(**config))}
    save_file(tensors, tmp_path / "l.safetensors", metadata)
    file = read(tmp_path / "l.safetensors")
    found = [file.modules[name].scale for name in FLAT]
    assert found == pytest.approx([*scales, 1.0])
    assert "q_proj'" in file.notes[0]


def plain(**settings):
    return json.dumps(config_of(r=3, lora_alpha=3, **settings))


def test_a_config_of_peft_itself_is_understood(params, tmp_path):
    tensors, _ = diffusers_case(params)
    own = LoraConfig(r=3, lora_alpha=6, target_modules=["to_q"]).to_dict()
    text = json.dumps(config_of(**own | {"target_modules": ["to_q"]}))
    save_file(tensors, tmp_path / "l.safetensors", {"lora_adapter_metadata": text})
    file = read(tmp_path / "l.safetensors")
    assert [file.modules[name].scale for name in FLAT] == [2.0, 2.0, 2.0, 1.0]


def test_magnitudes_need_a_config_with_dora(params, tmp_path):
    tensors, _ = diffusers_case(params)
    names = [name.removesuffix(".lora_A.weight") for name in tensors if "unet" in name]
    for name in {name for name in names if not name.endswith("weight")}:
        out = tensors[f"{name}.lora_B.weight"].shape[0]
        tensors[f"{name}.lora_magnitude_vector"] = torch.ones(out)
    save_file(tensors, tmp_path / "l.safetensors", {"lora_adapter_metadata": plain()})
    with pytest.raises(lora.InputError, match=r"use_dora of unet is False, .*to_q'.* magnitudes"):
        read(tmp_path / "l.safetensors")
    told = {"lora_adapter_metadata": plain(use_dora=True)}
    save_file(tensors, tmp_path / "l.safetensors", told)
    assert read(tmp_path / "l.safetensors").modules["unet.conv_in"].magnitude is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alphas_beside_a_config_have_to_say_the_same(dtype, params, tmp_path):
    tensors, _ = diffusers_case(params)
    told = {"lora_adapter_metadata": plain()}
    alpha = {"unet.conv_in.alpha": torch.tensor(3.0, dtype=dtype)}
    save_file(tensors | alpha, tmp_path / "l.safetensors", told)
    assert read(tmp_path / "l.safetensors").modules["unet.conv_in"].scale == 1
    alpha = {"unet.conv_in.alpha": torch.tensor(1.5, dtype=dtype)}
    save_file(tensors | alpha, tmp_path / "l.safetensors", told)
    with pytest.raises(lora.InputError, match=r"conv_in has scale 0\.5 by its alpha, .* says 1"):
        read(tmp_path / "l.safetensors")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "holds list, not an object"),
        (json.dumps(config_of(r=0, lora_alpha="16")), "r is 0.*lora_alpha is '16'"),
        (json.dumps(config_of(r=3, lora_alpha=1e999)), "lora_alpha is inf"),
        (json.dumps(config_of(r=3, lora_alpha=3, rank_pattern={"a": "b"})), "rank_pattern is"),
        (json.dumps(config_of(r=3, lora_alpha=3, alpha_pattern={"(": 1})), "not a regular"),
        (json.dumps(config_of(r=4, lora_alpha=3)), "to_q has rank 3, its config says 4"),
        (plain(init_lora_weights="pissa"), "init_lora_weights is 'pissa', which changes the base"),
        (plain(init_lora_weights="loftq"), "init_lora_weights is 'loftq', expected one of"),
        (plain(use_qalora=True), "use_qalora is True, not supported: QALoRA"),
        (plain(layer_replication=[[0, 2]]), "layer_replication is .*, not supported"),
        (plain(use_rslora="no"), "use_rslora is 'no', expected true or false"),
        (plain(peft_type="LOHA"), "peft_type is 'LOHA', expected 'LORA'"),
        (plain(use_dora=True), "use_dora of unet is True, 'unet.*to_q'.* have no magnitudes"),
        (plain(target_parameters=["to_q.weight"]), "adapters of modules alone"),
        (plain(mine=1), "mine is 1, a key that is not known here"),
    ],
)
def test_headers_that_are_wrong_are_refused(text, message, params, tmp_path):
    tensors, _ = diffusers_case(params)
    save_file(tensors, tmp_path / "l.safetensors", {"lora_adapter_metadata": text})
    with pytest.raises(lora.InputError, match=message):
        read(tmp_path / "l.safetensors")


def test_a_config_of_an_absent_component_is_noted(params, tmp_path):
    tensors, _ = diffusers_case(params)
    config = json.loads(plain()) | {"text_encoder_2.r": 3, "text_encoder_2.lora_alpha": 3}
    told = {"lora_adapter_metadata": json.dumps(config)}
    save_file(tensors, tmp_path / "l.safetensors", told)
    assert "config of text_encoder_2, of which" in "; ".join(read(tmp_path / "l.safetensors").notes)


class Unet(nn.Module):
    """The modules of the component that PEFT adapts."""

    def __init__(self):
        super().__init__()
        self.mid_block = nn.Module()
        self.mid_block.attn = nn.Module()
        self.mid_block.attn.to_q = nn.Linear(8, 6)
        self.mid_block.attn.to_out = nn.ModuleList([nn.Linear(6, 8)])
        self.conv_in = nn.Conv2d(4, 5, 3)


@pytest.mark.parametrize("dora", [False, True])
def test_what_is_written_for_diffusers_peft_loads_as_diffusers_does(dora, tmp_path):
    modules = {
        "unet.mid_block.attn.to_q": pair(2, (8,), 6, 1.5, dora=dora),
        "unet.mid_block.attn.to_out.0": pair(2, (6,), 8, 2.0, dora=dora),
        "unet.conv_in": pair(3, (4, 3, 3), 5, 1.5, "conv", dora),
    }
    write(tmp_path / "l.safetensors", FileAdapter("mine", modules), "diffusers")
    tensors = load_file(tmp_path / "l.safetensors")
    config = json.loads(torch_io.read_all(tmp_path / "l.safetensors")[1]["lora_adapter_metadata"])
    own = {key.removeprefix("unet."): value for key, value in config.items()}
    torch.manual_seed(0)
    base, model = Unet(), Unet()
    model.load_state_dict(base.state_dict())
    model = inject_adapter_in_model(LoraConfig(**own), model)
    result = set_peft_model_state_dict(
        model, {name.removeprefix("unet."): t for name, t in tensors.items()}
    )
    assert not result.unexpected_keys
    for name, module in modules.items():
        inner = name.removeprefix("unet.")
        weight = base.get_submodule(inner).weight.detach().numpy()
        total = weight + delta_weight(module)
        if dora:
            norm = np.linalg.norm(total.reshape(len(total), -1), axis=1)
            total *= (module.magnitude / norm).reshape(-1, *[1] * (total.ndim - 1))
        layer = model.get_submodule(inner)
        layer.merge()
        assert np.abs(total - weight).max() > 0.1
        np.testing.assert_allclose(layer.base_layer.weight.detach(), total, 1e-4, 1e-5)


def test_what_diffusers_files_cannot_hold(tmp_path):
    modules = {
        "model.q": pair(1, (2,), 2), "unet.a": pair(1, (2,), 2, dora=True),
        "unet.b": pair(1, (2,), 2), "unet.wte": pair(1, (2,), 2, kind="embedding"),
    }  # fmt: skip
    with pytest.raises(lora.InputError, match=r"'unet\.wte', which are of kinds.*'model\.q' are in "
                       r"no component.*'unet' has DoRA in some"):  # fmt: skip
        write(tmp_path / "l.safetensors", FileAdapter("mine", modules), "diffusers")
    shapes = {"unet.a.lora_A.weight": (1, 2), "unet.a.lora_B.weight": (2, 1),
              "b.lora_A.weight": (1, 2), "b.lora_B.weight": (2, 1)}  # fmt: skip
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "l.safetensors")
    with pytest.raises(lora.InputError, match="'b' are in no component"):
        read(tmp_path / "l.safetensors")
