"""kohya's and diffusers' files: their documented maths in torch, and names as they write them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

import lora_jax as lora
from interop import torch_io
from interop.adapter_file import FileAdapter, delta_weight
from interop.adapter_format import BaseModule, Given
from interop.adapter_formats import format_of, open_content, read, write
from interop.adapter_plan import base_modules, to_plan
from interop.keymaps import Keymap, Rule

from module_cases import pair

UNET = Keymap((
    Rule("attn/to_q/kernel", "unet.mid_block.attn.to_q.weight", (1, 0), "linear"),
    Rule("attn/to_out/kernel", "unet.mid_block.attn.to_out.0.weight", (1, 0), "linear"),
    Rule("conv_in/kernel", "unet.conv_in.weight", (3, 2, 0, 1), "conv"),
    Rule("text/kernel", "text_encoder.layers.0.self_attn.q_proj.weight", (1, 0), "linear"),
))  # fmt: skip
FLAT = {
    "unet.mid_block.attn.to_q": "lora_unet_mid_block_attn_to_q",
    "unet.mid_block.attn.to_out.0": "lora_unet_mid_block_attn_to_out_0",
    "unet.conv_in": "lora_unet_conv_in",
    "text_encoder.layers.0.self_attn.q_proj": "lora_te_layers_0_self_attn_q_proj",
}
SHAPES = {"attn/to_q": (8, 6), "attn/to_out": (6, 8), "conv_in": (3, 3, 4, 5), "text": (6, 6)}


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    leaves = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in SHAPES.items()}
    return {
        "attn": {name: {"kernel": leaves[f"attn/{name}"]} for name in ("to_q", "to_out")},
        "conv_in": {"kernel": leaves["conv_in"]},
        "text": {"kernel": leaves["text"]},
    }


def torch_weights(params):
    """The base's weights by module, as torch has them."""
    conv = np.asarray(params["conv_in"]["kernel"]).transpose(3, 2, 0, 1)
    linears = (params["attn"]["to_q"], params["attn"]["to_out"], params["text"])
    q, out, text = (torch.tensor(np.asarray(each["kernel"]).T) for each in linears)
    return dict(zip(FLAT, (q, out, torch.tensor(conv.copy()), text), strict=True))


def kohya_tensors(params, alpha, dora=False, tucker=False):
    """A file as sd-scripts and LyCORIS write it."""
    torch.manual_seed(0)
    tensors = {}
    for module, weight in torch_weights(params).items():
        out, inputs, *kernel = weight.shape
        flat, rank = FLAT[module], 3
        ones = [1] * len(kernel)
        tensors[f"{flat}.lora_down.weight"] = torch.randn(rank, inputs, *kernel)
        tensors[f"{flat}.lora_up.weight"] = torch.randn(out, rank, *ones)
        if alpha is not None:
            tensors[f"{flat}.alpha"] = torch.tensor(alpha)
        if dora:
            tensors[f"{flat}.dora_scale"] = torch.rand(out, 1, *ones) + 1
        if tucker and kernel:
            tensors[f"{flat}.lora_down.weight"] = torch.randn(rank, inputs, *ones)
            tensors[f"{flat}.lora_mid.weight"] = torch.randn(rank, rank, *kernel)
    return tensors


def kohya_outputs(params, tensors, x, image):
    """Outputs of every module, by the modules that sd-scripts and LyCORIS run."""
    found = {}
    for module, weight in torch_weights(params).items():
        at = {k.partition(".")[2]: t for k, t in tensors.items() if k.startswith(FLAT[module])}
        down, up = at["lora_down.weight"], at["lora_up.weight"]
        rank = down.shape[0]
        scale = float(at.get("alpha", 0) or rank) / rank
        apply = F.conv2d if weight.ndim == 4 else F.linear
        inputs = image if weight.ndim == 4 else x[:, : weight.shape[1]]
        if "dora_scale" in at:
            total = weight + scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
            norm = total.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1))
            found[module] = apply(inputs, total * at["dora_scale"] / norm)
            continue
        hidden = apply(inputs, down)
        if "lora_mid.weight" in at:
            hidden = apply(hidden, at["lora_mid.weight"])
        found[module] = apply(inputs, weight) + scale * apply(hidden, up)
    return found


def our_outputs(tree, x, image):
    dims = ("NCHW", "HWIO", "NCHW")
    kernel = tree["conv_in"]["kernel"]
    leaves = (tree["attn"]["to_q"], tree["attn"]["to_out"], tree["text"])
    linears = [x[:, : leaf["kernel"].shape[0]] @ leaf["kernel"] for leaf in leaves]
    conv = jax.lax.conv_general_dilated(image, kernel, (1, 1), "VALID", dimension_numbers=dims)
    return dict(zip(FLAT, (*linears[:2], conv, linears[2]), strict=True))


KOHYA = {
    "alpha": ({"alpha": 2.0}, ""),
    "no alpha": ({"alpha": None}, "no alpha, or 0"),
    "alpha of 0": ({"alpha": 0.0}, "no alpha, or 0"),
    "whole alpha": ({"alpha": 2}, ""),
    "dora": ({"alpha": 1.5, "dora": True}, ""),
    "tucker": ({"alpha": 1.5, "tucker": True}, "Tucker form"),
}


@pytest.mark.parametrize("case", KOHYA)
def test_files_of_kohya_compute_what_it_computes(case, params, tmp_path):
    options, note = KOHYA[case]
    tensors = kohya_tensors(params, **options)
    save_file(tensors, tmp_path / "lora.safetensors", {"ss_network_dim": "3"})
    file = read(tmp_path / "lora.safetensors", Given(base=base_modules(params, UNET)))
    assert file.modules.keys() == FLAT.keys()
    assert any(note in each for each in file.notes) if note else not file.notes
    adapter, plan = to_plan(file, params, UNET)
    x, image = torch.randn(5, 8), torch.randn(2, 4, 6, 6)
    ours = our_outputs(lora.merge(params, adapter, plan), x.numpy(), image.numpy())
    base = our_outputs(params, x.numpy(), image.numpy())
    for module, expected in kohya_outputs(params, tensors, x, image).items():
        assert np.abs(base[module] - expected.numpy()).max() > 0.1
        np.testing.assert_allclose(ours[module], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["alpha", "no alpha", "dora"])
def test_what_is_written_for_kohya_is_what_it_reads(case, params, tmp_path):
    tensors = kohya_tensors(params, **KOHYA[case][0])
    save_file(tensors, tmp_path / "lora.safetensors")
    file = read(tmp_path / "lora.safetensors", Given(base=base_modules(params, UNET)))
    write(tmp_path / "back.safetensors", file, "kohya")
    stored = load_file(tmp_path / "back.safetensors")
    assert {n for n in stored if "alpha" not in n} == {n for n in tensors if "alpha" not in n}
    assert all(torch.equal(stored[n], t) for n, t in tensors.items())
    x, image = torch.randn(5, 8), torch.randn(2, 4, 6, 6)
    first, second = (kohya_outputs(params, each, x, image) for each in (tensors, stored))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch_io.metadata(tmp_path / "back.safetensors")["ss_network_dim"] == "3"


def test_flattened_names_stay_where_no_base_is_known(params, tmp_path):
    save_file(kohya_tensors(params, 1.0), tmp_path / "lora.safetensors")
    file = read(tmp_path / "lora.safetensors")
    assert sorted(file.modules) == sorted(FLAT.values())
    assert "names are flattened" in file.notes[-1]
    write(tmp_path / "back.safetensors", file, "kohya")
    assert (
        load_file(tmp_path / "back.safetensors").keys()
        == load_file(tmp_path / "lora.safetensors").keys()
    )


def test_scales_survive_alphas_of_any_kind(tmp_path):
    scales = (2.0, 1 / 3, 16 / 8**0.5, 0.1)
    modules = {f"unet.{k}": pair(3 + k, (4,), 6, s) for k, s in enumerate(scales)}
    write(tmp_path / "lora.safetensors", FileAdapter("mine", modules), "kohya")
    base = {name: BaseModule("linear", (6, 4)) for name in modules}
    again = read(tmp_path / "lora.safetensors", Given(base=base))
    for name, module in modules.items():
        assert again.modules[name].scale == pytest.approx(module.scale, rel=1e-15)


def two(name, down=(1, 2), up=(2, 1), **more):
    """The shapes of one module's tensors."""
    pair_of_it = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    return pair_of_it | {f"{name}.{field}": shape for field, shape in more.items()}


AMBIGUOUS = {name: BaseModule("linear", (2, 2)) for name in ("unet.a.b_c", "unet.a_b.c")}
REFUSED = {
    "ambiguous": (two("lora_unet_a_b_c"), r"may be 'unet\.a\.b_c' or 'unet\.a_b\.c'"),
    "unknown": (two("lora_unet_x"), "no module for 'lora_unet_x'"),
    "half": ({"lora_unet_a.lora_down.weight": (1, 2)}, r"without '\.lora_up\.weight'"),
    "loha": ({"lora_unet_a.hada_w1_a": (1, 2)}, "belong to LoHa"),
    "lokr": ({"lora_unet_a.lokr_w1": (1, 2)}, "belong to LoKr"),
    "kernel in up": (two("lora_unet_a", (1, 2, 3, 3), (2, 1, 3, 3)), "which don't fit"),
    "several alphas": (two("lora_unet_a", alpha=(2,)), r"alpha 2\.0 \(2,\)"),
    "magnitude of inputs": (
        two("lora_unet_a", (1, 3), dora_scale=(1, 3)),
        "that of inputs is not implemented",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_kohya_files_are_refused_for(case, tmp_path):
    shapes, message = REFUSED[case]
    save_file({n: torch.ones(shape) for n, shape in shapes.items()}, tmp_path / "l.safetensors")
    known = AMBIGUOUS if case in ("ambiguous", "unknown") else None
    with pytest.raises(lora.InputError, match=message):
        read(tmp_path / "l.safetensors", Given(base=known))


def test_what_kohya_files_cannot_hold(tmp_path):
    modules = {
        "unet.a_b": pair(1, (2,), 2), "unet.a.b": pair(1, (2,), 2, 0.0),
        "wte": pair(1, (2,), 2, kind="embedding"),
    }  # fmt: skip
    with pytest.raises(lora.InputError, match=r"'wte', which are.*'unet.a_b', 'unet.a.b' would all "
                       r"be called 'lora_unet_a_b'.*'unet.a.b' has a scale of 0"):  # fmt: skip
        write(tmp_path / "l.safetensors", FileAdapter("mine", modules), "kohya")
    assert not list(tmp_path.iterdir())


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
    ],
)
def test_headers_that_are_wrong_are_refused(text, message, params, tmp_path):
    tensors, _ = diffusers_case(params)
    save_file(tensors, tmp_path / "l.safetensors", {"lora_adapter_metadata": text})
    with pytest.raises(lora.InputError, match=message):
        read(tmp_path / "l.safetensors")


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
    config = json.loads(torch_io.metadata(tmp_path / "l.safetensors")["lora_adapter_metadata"])
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


def test_formats_are_told_apart_by_content(params, tmp_path):
    save_file(kohya_tensors(params, 1.0), tmp_path / "a.safetensors")
    save_file(diffusers_case(params)[0], tmp_path / "b.safetensors")
    assert format_of(open_content(tmp_path / "a.safetensors")) == "kohya"
    assert format_of(open_content(tmp_path / "b.safetensors")) == "diffusers"
