"""loralib's files compute here what loralib computes, and what is written here it loads."""

import jax
import jax.numpy as jnp
import loralib
import numpy as np
import pytest
import torch
from torch import nn

import lora_jax as lora
from interop.adapter_format import Given
from interop.adapter_formats import read, write
from interop.adapter_plan import base_modules, from_plan, to_plan
from interop.conversion import from_torch
from interop.keymaps import Keymap, Rule

LINEAR = Keymap((
    Rule("fc/kernel", "fc.weight", (1, 0), "linear"), Rule("fc/bias", "fc.bias"),
))  # fmt: skip
TABLE = Keymap((Rule("fc/table", "fc.weight", (), "embedding"),))
CONV = Keymap((
    Rule("fc/kernel", "fc.weight", (2, 3, 1, 0), "conv"), Rule("fc/bias", "fc.bias"),
))  # fmt: skip
CONV = Keymap((Rule("fc/kernel", "fc.weight", (3, 2, 0, 1), "conv"), Rule("fc/bias", "fc.bias")))


def linear(params, x):
    return x @ params["fc"]["kernel"] + params["fc"]["bias"]


def lookup(params, ids):
    return params["fc"]["table"][ids]


def convolution(params, x):
    kernel, groups = params["fc"]["kernel"], x.shape[1] // params["fc"]["kernel"].shape[2]
    dims = ("NCHW", "HWIO", "NCHW")
    out = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "VALID", dimension_numbers=dims, feature_group_count=groups
    )
    return out + params["fc"]["bias"][:, None, None]


X = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
IMAGE = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
MASK = {"fc": (True, False, True)}
KEEP = {"r": 2, "lora_alpha": 6, "merge_weights": False}
# The module, its table, our function, its input, and what the reader has to be told.
CASES = {
    "linear": (lambda: loralib.Linear(12, 9, **KEEP), LINEAR, linear, X, {}),
    "fan_in_fan_out": (
        lambda: loralib.Linear(12, 9, fan_in_fan_out=True, **KEEP), LINEAR, linear, X, {},
    ),
    "embedding": (
        lambda: loralib.Embedding(11, 6, **KEEP), TABLE, lookup, torch.arange(11), {},
    ),
    "merged": (
        lambda: loralib.MergedLinear(12, 9, enable_lora=[True, False, True], **KEEP),
        LINEAR, linear, X, {"enable_lora": MASK},
    ),
    "merged, fan_in_fan_out, one slot": (
        lambda: loralib.MergedLinear(
            12, 9, enable_lora=[False, True, False], fan_in_fan_out=True, **KEEP
        ),
        LINEAR, linear, X, {"enable_lora": {"fc": (False, True, False)}},
    ),
    "conv": (lambda: loralib.Conv2d(4, 6, 3, **KEEP), CONV, convolution, IMAGE, {}),
    "conv of one": (lambda: loralib.Conv2d(4, 6, 1, **KEEP), CONV, convolution, IMAGE, {}),
    "conv in groups": (
        lambda: loralib.Conv2d(4, 6, 3, groups=2, **KEEP), CONV, convolution, IMAGE, {},
    ),
}  # fmt: skip


def random_model(case):
    """The module as ``fc`` of a model, with random factors."""
    torch.manual_seed(1)
    model = nn.Module()
    model.fc = CASES[case][0]()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return model.eval()


def base_params(model, case):
    """Our parameters with the module's weights, without its adapter."""
    table = CASES[case][1]
    inner = getattr(model.fc, "conv", model.fc)
    weight = inner.weight.detach().numpy()
    state = {"fc.weight": weight.T if getattr(inner, "fan_in_fan_out", False) else weight}
    if getattr(inner, "bias", None) is not None:
        state["fc.bias"] = inner.bias.detach().numpy()
    shapes = {rule.path: _leaf_shape(rule, state[rule.name].shape) for rule in table.rules}
    return jax.tree.map(jnp.asarray, from_torch(state, table, shapes))


def _leaf_shape(rule, shape):
    return tuple(shape[rule.order.index(k)] for k in range(len(shape))) if rule.order else shape


def told(case, params):
    _, table, *_, extra = CASES[case]
    return Given(alpha=6, base=base_modules(params, table), **extra)


@pytest.mark.parametrize("case", CASES)
def test_files_of_loralib_compute_what_it_computes(case, tmp_path):
    _, table, function, x, _ = CASES[case]
    model = random_model(case)
    torch.save(loralib.lora_state_dict(model), tmp_path / "lora.pt")
    params = base_params(model, case)
    adapter, plan = to_plan(read(tmp_path / "lora.pt", told(case, params)), params, table)
    ours = lora.adapt(function, plan)(params, adapter, jnp.asarray(x.numpy()))
    theirs = model.fc(x).detach().numpy()
    without = function(params, jnp.asarray(x.numpy()))
    assert np.abs(without - theirs).max() > 0.1 * np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("case", [case for case in CASES if case != "conv in groups"])
def test_what_is_written_loralib_loads(case, tmp_path):
    _, table, _, x, _ = CASES[case]
    model = random_model(case)
    torch.save(loralib.lora_state_dict(model), tmp_path / "lora.pt")
    params = base_params(model, case)
    given = told(case, params)
    adapter, plan = to_plan(read(tmp_path / "lora.pt", given), params, table)
    file = from_plan(adapter, plan, table, params=params)
    notes = write(tmp_path / "back.pt", file, "loralib", given)
    assert any("alpha=6" in note for note in notes)
    stored = torch.load(tmp_path / "back.pt", weights_only=True)
    original = torch.load(tmp_path / "lora.pt", weights_only=True)
    assert stored.keys() == original.keys()
    assert all(torch.equal(stored[name], original[name]) for name in stored)
    other = random_model(case)
    for name, parameter in other.named_parameters():
        if "lora_" in name:
            nn.init.zeros_(parameter)
    assert not torch.allclose(other.fc(x), model.fc(x), atol=0.1)
    assert not other.load_state_dict(stored, strict=False).unexpected_keys
    torch.testing.assert_close(other.fc(x), model.fc(x))


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_biases_are_trained_whole(bias, tmp_path):
    model = random_model("linear")
    before = base_params(model, "linear")
    nn.init.normal_(model.fc.bias)
    torch.save(loralib.lora_state_dict(model, bias), tmp_path / "lora.pt")
    file = read(tmp_path / "lora.pt", Given(alpha=6))
    assert list(file.whole) == ([] if bias == "none" else ["fc.bias"])
    adapter, plan = to_plan(file, before, LINEAR)
    ours = lora.adapt(linear, plan)(before, adapter, jnp.asarray(X.numpy()))
    expected = model.fc(X) - (model.fc.bias - torch.tensor(before["fc"]["bias"].tolist())) * (
        bias == "none"
    )
    np.testing.assert_allclose(ours, expected.detach(), rtol=1e-5, atol=1e-5)
    write(tmp_path / "back.pt", file, "loralib", Given(alpha=6))
    again = read(tmp_path / "back.pt", Given(alpha=6))
    assert again.whole.keys() == file.whole.keys()


def test_a_convolutions_bias_stands_one_module_further_down(tmp_path):
    model = random_model("conv")
    torch.save(loralib.lora_state_dict(model, "all"), tmp_path / "lora.pt")
    given = told("conv", base_params(model, "conv"))
    file = read(tmp_path / "lora.pt", given)
    assert list(file.whole) == ["fc.bias"]
    write(tmp_path / "back.pt", file, "loralib", given)
    stored = torch.load(tmp_path / "back.pt", weights_only=True)
    assert "fc.conv.bias" in stored
    assert not model.load_state_dict(stored, strict=False).unexpected_keys


def test_a_convolution_of_any_factors_is_written_exactly(tmp_path):
    rng = np.random.default_rng(0)
    params = base_params(random_model("conv"), "conv")
    pair = lora.LoraPair(
        *(jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 3, 4, 5), (5, 6)))
    )
    site = lora.plan_from_axes(
        params,
        lora.LoraConfig(rank=5, alpha=10, targets="fc/kernel"),
        {"fc/kernel": "in in in out"},
    )
    file = from_plan({"fc/kernel": pair}, site, CONV, params=params)
    write(tmp_path / "lora.pt", file, "loralib")
    model = nn.Module()
    model.fc = loralib.Conv2d(4, 6, 3, r=5, lora_alpha=10, merge_weights=False)
    stored = torch.load(tmp_path / "lora.pt", weights_only=True)
    model.load_state_dict(stored, strict=False)
    model.fc.conv.load_state_dict(random_model("conv").fc.conv.state_dict())
    ours = lora.adapt(convolution, site)(params, {"fc/kernel": pair}, jnp.asarray(IMAGE.numpy()))
    np.testing.assert_allclose(ours, model.fc(IMAGE).detach(), rtol=1e-4, atol=1e-4)


def test_what_a_file_of_loralib_leaves_out_has_to_be_told(tmp_path):
    model = random_model("merged")
    torch.save(loralib.lora_state_dict(model), tmp_path / "lora.pt")
    with pytest.raises(lora.InputError, match=r"don't hold alpha: give it \(--alpha\)"):
        read(tmp_path / "lora.pt")
    with pytest.raises(lora.InputError, match="different ranks: of a MergedLinear give its enable"):
        read(tmp_path / "lora.pt", Given(alpha=6))
    with pytest.raises(lora.InputError, match="no factors for enable_lora"):
        read(tmp_path / "lora.pt", Given(alpha=6, enable_lora={"fc": (True, False, False)}))
    with pytest.raises(lora.InputError, match="enable_lora names no module of it: 'attn'"):
        read(tmp_path / "lora.pt", Given(alpha=6, enable_lora={**MASK, "attn": (True,)}))
    with pytest.raises(lora.InputError, match="enables nothing"):
        read(tmp_path / "lora.pt", Given(alpha=6, enable_lora={"fc": (False,)}))


def test_a_whole_state_dict_may_be_merged_and_is_refused(tmp_path):
    torch.save(random_model("linear").state_dict(), tmp_path / "lora.pt")
    with pytest.raises(lora.InputError, match=r"'fc\.weight': a state_dict\(\) taken in eval\(\)"):
        read(tmp_path / "lora.pt", Given(alpha=6))


def test_several_alphas_are_folded_into_one(tmp_path):
    model = random_model("linear")
    torch.save(loralib.lora_state_dict(model), tmp_path / "lora.pt")
    file = read(tmp_path / "lora.pt", Given(alpha=6))
    other = file.modules["fc"]._replace(scale=0.7)
    both = file._replace(modules={"fc": file.modules["fc"], "fd": other, "fe": other})
    notes = write(tmp_path / "both.pt", both, "loralib")
    assert notes[0] == "scale multiplied into B: 'fc'"
    again = read(tmp_path / "both.pt", Given(alpha=1.4))
    for name, module in both.modules.items():
        found = again.modules[name]
        np.testing.assert_allclose(
            found.scale * found.b @ found.a, module.scale * module.b @ module.a, rtol=1e-5
        )
