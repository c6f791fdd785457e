"""kohya's files: their documented maths in torch, and names as sd-scripts writes them."""

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import lora_jax as lora
from interop import torch_io
from interop.adapter_file import FileAdapter
from interop.adapter_format import BaseModule, Given
from interop.adapter_formats import read, write
from interop.adapter_plan import base_modules, to_plan

from module_cases import pair
from unet_cases import FLAT, UNET, torch_weights, unet_params


@pytest.fixture(scope="module")
def params():
    return unet_params()


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
    assert torch_io.read_all(tmp_path / "back.safetensors")[1]["ss_network_dim"] == "3"


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
