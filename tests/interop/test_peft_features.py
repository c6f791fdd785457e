"""What is not one adapter of the table: conversions, versions, folders, notes, and refusals."""

import copy
import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft as reference
import pytest
import torch

import lora_jax as lora
from interop import peft, peft_file, torch_io
from interop.keymaps import Keymap, Rule
from interop.peft import CONFIG, PICKLED_WEIGHTS, WEIGHTS

from peft_cases import edit_config, edit_tensors, moved
from peft_table import (
    CASES,
    KINDS,
    TIE,
    Case,
    base_model,
    base_outputs,
    base_params,
    load_with_peft,
    outputs_of,
    outputs_there,
    relative,
    save_with_peft,
)


def read(kind, directory, params=None, **kwargs):
    given = base_params(kind) if params is None else params
    return peft.read(directory, given, keymap=KINDS[kind].keymap, **kwargs)


def notes(kind, directory):
    return "; ".join(peft.notes(directory, base_params(kind), keymap=KINDS[kind].keymap))


def refusal(call, *args, **kwargs):
    with pytest.raises(lora.InputError) as raised:
        call(*args, **kwargs)
    return str(raised.value)


def merged_outputs(kind, adapter, plan):
    return outputs_of(kind, lora.merge(base_params(kind), adapter, plan))


@pytest.mark.parametrize(("init", "use_rslora"), [("pissa", False), ("olora", True)])
def test_what_peft_converted_is_a_plain_adapter(tmp_path, init, use_rslora):
    config = reference.LoraConfig(
        r=2, lora_alpha=3, target_modules=["0", "2"], init_lora_weights=init, use_rslora=use_rslora
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = reference.get_peft_model(copy.deepcopy(base_model("mlp")), config).eval()
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "start")
        model.peft_config["default"].init_lora_weights = init
        for name, parameter in model.named_parameters():
            parameter.data += 0.1 * torch.randn_like(parameter) if "lora_" in name else 0
        theirs = outputs_there(Case("mlp", {}), model)
        start = str(tmp_path / "start")
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=start)
    adapter, plan = read("mlp", tmp_path / "plain")
    assert {site.rank for site in plan.sites} == {4}
    assert relative(merged_outputs("mlp", adapter, plan), theirs) < 1e-5
    assert "twice the rank" not in notes("mlp", tmp_path / "plain")


def test_what_peft_converted_from_lora_ga_is_a_plain_adapter_too(tmp_path):
    """Its config keeps what it started from."""
    save_with_peft(CASES["linear"], tmp_path)
    edit_config(tmp_path, lora_ga_config={"direction": "ArB2r"}, corda_config={"verbose": True})
    read("mlp", tmp_path)


def test_an_unconverted_start_needs_values_and_says_what_was_done(tmp_path):
    save_with_peft(CASES["linear, pissa"], tmp_path)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), base_params("mlp")
    )
    assert "give params, not shapes" in refusal(read, "mlp", tmp_path, shapes)
    assert "plain one of twice the rank" in notes("mlp", tmp_path)


@pytest.mark.parametrize("init", ["Gaussian", "OLoRA", "MiCA", None])
def test_a_start_is_spelt_as_peft_takes_it(tmp_path, init):
    case = Case("mlp", dict(target_modules=["0"]), init)
    theirs = outputs_there(case, save_with_peft(case, tmp_path))
    assert json.loads((tmp_path / CONFIG).read_text())["init_lora_weights"] == init
    assert relative(merged_outputs("mlp", *read("mlp", tmp_path)), theirs) < 1e-5


def test_ranks_that_a_start_leaves_out_are_no_fault_of_the_file(tmp_path):
    save_with_peft(CASES["linear, pissa, ranks above a side"], tmp_path)
    told = peft_file.read(tmp_path).adapter.notes
    assert not any("ranks that differ" in note for note in told)
    edit_config(tmp_path, init_lora_weights=True)
    told = peft_file.read(tmp_path).adapter.notes
    assert any("ranks that differ" in note and "4 has 6" in note for note in told)


def test_a_start_that_the_values_do_not_determine_is_refused(tmp_path):
    save_with_peft(CASES["linear, pissa"], tmp_path)
    equal = {**base_params("mlp"), "2.weight": jnp.eye(16)}
    message = refusal(read, "mlp", tmp_path, equal)
    assert "base_model.model.2: its singular values 2 and 3 are equal" in message


def test_a_start_that_peft_has_no_right_form_of_is_refused(tmp_path):
    save_with_peft(CASES["GPT-2"], tmp_path)
    edit_config(tmp_path, init_lora_weights="olora")
    message = refusal(read, "GPT-2", tmp_path)
    assert "'olora', which PEFT has no form of for 'transformer.h.0.attn.c_attn.weight'" in message


SQUARE = Keymap((Rule("e.w", "e.w", (), "parameter"), Rule("t.w", "t.w", (), "parameter_in_out")))
PARAMS = {"e.w": jnp.zeros((3, 4, 4)), "t.w": jnp.zeros((3, 4, 4))}


@pytest.mark.parametrize(
    ("version", "e_swapped", "t_swapped"),
    [("0.17.1", True, False), ("0.18.0", True, False), ("0.19.0", True, True),
     ("0.19.1", False, False), ("0.21.2+@abc", False, False)],
)  # fmt: skip
def test_the_sides_of_stacked_experts_go_by_version(tmp_path, version, e_swapped, t_swapped):
    rng = np.random.default_rng(0)
    stored = {name: rng.normal(size=shape).astype("f4") for name, shape in
              (("A", (6, 4)), ("B", (4, 6)))}  # fmt: skip
    torch_io.write(tmp_path / WEIGHTS, {
        f"base_model.model.{module}.lora_{factor}.weight": tensor
        for module in "et" for factor, tensor in stored.items()
    })  # fmt: skip
    config = dict(peft_type="LORA", r=2, lora_alpha=2, target_parameters=["e.w", "t.w"])
    (tmp_path / CONFIG).write_text(json.dumps({**config, "peft_version": version}))
    adapter, plan = peft.read(tmp_path, PARAMS, keymap=SQUARE)
    merged = lora.merge(PARAMS, adapter, plan)
    # (first, second) of the weight's own axes, by the einsum of the release that wrote it.
    a, b = stored["A"].reshape(3, 2, 4), stored["B"].reshape(4, 2, 3)
    second_in = np.einsum("ore,eri->eoi", b, a)
    first_in = np.einsum("ore,eri->eio", b, a)
    np.testing.assert_allclose(merged["e.w"], first_in if e_swapped else second_in, atol=1e-5)
    expected = second_in if t_swapped else first_in
    np.testing.assert_allclose(merged["t.w"], expected, atol=1e-5)
    found = "; ".join(peft.notes(tmp_path, PARAMS, keymap=SQUARE))
    assert ("e.w: written by PEFT" in found) == e_swapped
    (tmp_path / CONFIG).write_text(json.dumps(config))
    assert "'e.w' is square, and peft_version is None" in refusal(
        peft.read, tmp_path, PARAMS, keymap=SQUARE
    )


def test_unequal_sides_of_an_old_file_go_by_shape(tmp_path):
    new, old = tmp_path / "new", tmp_path / "old"
    save_with_peft(CASES["experts"], new)
    shutil.copytree(new, old)

    def swap(tensors):
        for module in ("experts.base_layer", "experts"):
            a, b = (f"base_model.model.{module}.lora_{factor}.weight" for factor in "AB")
            tensors[a], tensors[b] = (
                tensors[b].reshape(-1, 2, 3).transpose(2, 1, 0).reshape(6, -1),
                tensors[a].reshape(3, 2, -1).transpose(2, 1, 0).reshape(-1, 6),
            )

    edit_tensors(old, swap)
    edit_config(old, peft_version="0.18.0")
    jax.tree.map(np.testing.assert_array_equal, read("experts", new)[0], read("experts", old)[0])
    assert "experts.gate_up_proj: written by PEFT 0.18.0" in notes("experts", old)


def test_several_adapters_in_one_folder(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = reference.get_peft_model(
            copy.deepcopy(base_model("mlp")),
            reference.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False),
            adapter_name="first",
        )
        config = reference.LoraConfig(r=3, target_modules=["2"], init_lora_weights=False)
        model.add_adapter("second", config)
        model.save_pretrained(tmp_path)
    model.set_adapter("second")
    adapter, plan = read("mlp", tmp_path, adapter_name="second")
    theirs = outputs_there(Case("mlp", {}), model)
    assert relative(merged_outputs("mlp", adapter, plan), theirs) < 1e-5
    assert relative(base_outputs("mlp"), theirs) > 1e-2
    assert [*read("mlp", tmp_path, adapter_name="first")[1]] == ["0.weight"]
    assert "no adapter of its own: in its folders are ['first', 'second']" in refusal(
        read, "mlp", tmp_path
    )
    assert "no adapter 'third'" in refusal(read, "mlp", tmp_path, adapter_name="third")
    for name in ("../second", "/etc", "", ".", "..", "a/b", "x\0", "é", "s" * 65):
        assert "letters, digits" in refusal(read, "mlp", tmp_path, adapter_name=name)


def test_pickled_weights_of_other_layers(tmp_path):
    save_with_peft(CASES["conv2d, dora, ranks"], tmp_path / "bin", safe_serialization=False)
    save_with_peft(CASES["conv2d, dora, ranks"], tmp_path / "safe")
    assert (tmp_path / "bin" / PICKLED_WEIGHTS).exists()
    safe, pickled = (read("conv2d", tmp_path / name)[0] for name in ("safe", "bin"))
    jax.tree.map(np.testing.assert_array_equal, safe, pickled)


SPELLINGS = {
    "without the prefix": (lambda n: n.removeprefix("base_model.model."), "without the prefix"),
    "compiled": (lambda n: n.replace("model.0", "model._orig_mod.0"), "'_orig_mod.'"),
    "of FSDP": (lambda n: n.replace("0.lora", "0._fsdp_wrapped_module.lora"), "'_fsdp_wrapped"),
    "with a name": (lambda n: n.replace("lora_A.w", "lora_A.default.w"), "the adapter's name"),
}


@pytest.mark.parametrize(("respell", "hint"), SPELLINGS.values(), ids=SPELLINGS)
def test_other_spellings_are_recognised(tmp_path, respell, hint):
    save_with_peft(CASES["linear"], tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({respell(n): t.pop(n) for n in [*t]}))
    assert hint in refusal(read, "mlp", tmp_path)


def test_a_convolution_in_groups_is_refused_by_name(tmp_path):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv1d(4, 6, 3, groups=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = reference.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        reference.get_peft_model(net, config).save_pretrained(tmp_path)
    keymap = Keymap((Rule("w", "0.weight", (), "conv"),))
    message = refusal(peft.read, tmp_path, {"w": jnp.zeros((6, 2, 3))}, keymap=keymap)
    assert "0.lora_A.weight reads every channel, as PEFT has it for a convolution in groups" in (
        message
    )


BIASED = {
    "no bias": ("stacked", dict(target_modules=["head"]), "'head', which has none here"),
    "embedding": ("bag of words", dict(target_modules=["words"]), "'words' has no bias on B"),
    "attention": ("attention", dict(target_modules=["mha"]), "leaves it out of the attention"),
    "parameter": (
        "experts", dict(target_modules=[], target_parameters=["experts.down_proj"]),
        "'experts.down_proj' has no bias on B",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "config", "text"), BIASED.values(), ids=BIASED)
def test_a_bias_on_b_without_a_place_is_refused(tmp_path, kind, config, text):
    save_with_peft(Case(kind, config), tmp_path)
    edit_config(tmp_path, lora_bias=True)
    assert text in refusal(read, kind, tmp_path)


def test_a_layer_updated_and_trained_has_one_claim(tmp_path):
    save_with_peft(CASES["linear, a bias on B"], tmp_path)
    edit_config(tmp_path, bias="lora_only")
    assert "'0.bias' is trained whole and updated by lora_bias" in refusal(read, "mlp", tmp_path)


@pytest.mark.parametrize("name", ["attention", "experts"])
def test_magnitudes_that_peft_does_not_have_are_refused(tmp_path, name):
    save_with_peft(CASES[name], tmp_path)
    edit_config(tmp_path, use_dora=True)
    assert "has no magnitude in PEFT" in refusal(read, CASES[name].kind, tmp_path)


def test_experts_of_one_layer_that_differ_are_refused(tmp_path):
    keymap = Keymap((Rule("up", "h.{i}.experts.{e}.up.weight", (1, 0), "linear"),))
    config = dict(peft_type="LORA", r=2, lora_alpha=2, target_modules=["up"],
                  rank_pattern={r"h\.1\.experts\.2\.up": 3})  # fmt: skip
    (tmp_path / CONFIG).write_text(json.dumps(config))
    torch_io.write(tmp_path / WEIGHTS, {"x": np.zeros(1, "f4")})
    params = {"up": jnp.zeros((2, 3, 4, 6))}
    assert "'up' has experts of layer 1 at different ranks" in refusal(
        peft.read, tmp_path, params, keymap=keymap
    )


SHARED = Keymap(
    (Rule("words", "words.weight", (), "embedding"), Rule("a", "a.weight", (), "linear")),
    copies={"head.weight": "words.weight", "b.weight": "a.weight"},
)
"""Modules that share a weight and have no row of their own."""


@pytest.mark.parametrize(
    ("target", "fields", "other"),
    [("words", ("lora_embedding_A", "lora_embedding_B"), "head"),
     ("a", ("lora_A.weight", "lora_B.weight"), "b")],
)  # fmt: skip
def test_an_adapter_of_one_of_those_that_share_a_weight_is_refused(tmp_path, target, fields, other):
    params = {name: jnp.ones((6, 6)) for name in ("words", "a")}
    stored = {f"base_model.model.{target}.{field}": np.ones(shape, "f4")
              for field, shape in zip(fields, ((2, 6), (6, 2)), strict=True)}  # fmt: skip
    torch_io.write(tmp_path / WEIGHTS, stored)
    config = dict(peft_type="LORA", r=2, lora_alpha=2, target_modules=[target])
    (tmp_path / CONFIG).write_text(json.dumps(config))
    text = f"{target!r} is also the weight of {other}"
    assert text in refusal(peft.read, tmp_path, params, keymap=SHARED)
    plan = lora.plan_from_axes(params, lora.LoraConfig(rank=2, targets="a"), {".*": "out in"})
    given = {"keymap": SHARED, "params": params}
    assert "'a' is also the weight of b" in refusal(peft.require_writable, plan, **given)


@pytest.mark.parametrize("trained", [dict(target_modules=["wte"]), dict(modules_to_save=["wte"])])
def test_a_table_that_peft_did_not_tie_is_refused_with_what_ties_it(tmp_path, trained):
    config = dict(target_modules=["c_attn"]) | trained | TIE
    save_with_peft(Case("GPT-2", config), tmp_path)
    message = refusal(read, "GPT-2", tmp_path)
    assert "'transformer.wte.weight' is also the weight of lm_head, which this adapter" in message
    assert "name lm_head in place of the table, with ensure_weight_tying=True" in message


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_tied_head_of_another_scale_is_refused(tmp_path, key):
    """PEFT gives it the scale of its own name."""
    tied = dict(target_modules=["embed_tokens"], ensure_weight_tying=True)
    save_with_peft(Case("tied Llama", {**tied, key: {"embed_tokens": 4}}), tmp_path)
    own = {"rank_pattern": "0.75", "alpha_pattern": "2"}[key]
    message = refusal(read, "tied Llama", tmp_path)
    assert f"has the scale {own}, and lm_head, to which it is tied, has 1.5" in message


NOTED = {
    "an order that decides": (
        "stacked", dict(target_modules=["fc"], alpha_pattern={"fc": 1, "layers.1.fc": 5}),
        "layers.1.fc: several entries of alpha_pattern match it, with the values [1, 5]",
    ),
    "a target that matches nothing": (
        "mlp", dict(target_modules=["0", "7"]), "target_modules: '7' match nothing",
    ),
    "a projection alone": (
        "attention", dict(target_modules=["out_proj"]), "PEFT ignores an adapter of the output",
    ),
    "a tied table": (
        "tied Llama", dict(target_modules=["embed_tokens"], ensure_weight_tying=True),
        "merges its update twice into the weight that it shares with lm_head",
    ),
    "rows of a tied table": (
        "tied Llama", dict(target_modules=["q_proj"], trainable_token_indices=[3]),
        "its trained rows count in lm_head too, as PEFT has it in models of transformers alone",
    ),
    "two layouts": (
        "GPT-2", dict(target_modules=["lm_head", "c_fc"], **TIE), "PEFT warns of fan_in_fan_out",
    ),
    "a pattern of experts alone": (
        "experts", dict(
            target_modules=["router"], alpha_pattern={"experts.down_proj": 5, "router": 4},
            target_parameters=["experts.down_proj", "experts.gate_up_proj"],
        ), "PEFT warns that experts.down_proj match no module",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "config", "text"), NOTED.values(), ids=NOTED)
def test_what_a_reader_should_know_is_noted(tmp_path, kind, config, text):
    save_with_peft(Case(kind, config), tmp_path)
    read(kind, tmp_path)
    found = notes(kind, tmp_path)
    assert text in found
    assert ("match nothing" in found) == ("match nothing" in text)


def test_of_a_plain_adapter_there_is_nothing_to_say(tmp_path):
    save_with_peft(CASES["linear"], tmp_path)
    assert notes("mlp", tmp_path) == ""


def planned(kind, *targets, rank=2, alpha=3.0):
    params = base_params(kind)
    config = lora.LoraConfig(rank=rank, alpha=alpha, targets=targets)
    return lora.plan(KINDS[kind].function, params, *KINDS[kind].inputs, config=config)


UNWRITABLE = {
    "half of an attention": (
        "attention", ("mha.in_proj_weight",), "'mha' has Setting(rank=2, scale=1.5) and its out_pr"
    ),
    "a bias of another scale": (
        "mlp", ("0.weight", lora.Rule("0.bias", variant="bias", alpha=9)),
        "the bias of '0' has scale 4.5, its pair has 1.5",
    ),
    "one bias of two": (
        "mlp", ("[02].weight", lora.Rule("0.bias", variant="bias")),
        "'2' has a pair and no update of its bias",
    ),
    "a bias without a pair": (
        "mlp", ("0.weight", lora.Rule("[02].bias", variant="bias")), "the bias of '2' has scale 1.5"
    ),
    "a bias that is none": (
        "mlp", ("0.weight", lora.Rule("2.weight", variant="bias")), "'2.weight' is not the bias"
    ),
    "a bias beside dora": (
        "mlp", (lora.Rule("0.weight", variant="dora"), lora.Rule("0.bias", variant="bias")),
        "variant 'bias' of '0.bias' beside 'dora' of '0.weight'",
    ),
    "a magnitude of experts": (
        "experts", (lora.Rule("experts.down_proj", variant="dora"),), "has a DoRA magnitude, which"
    ),
    "experts of unequal ranks": (
        "experts", (lora.Rule("experts.down_proj", rank=(1, 2, 1)),), "along its 3 experts"
    ),
    "OPT's positions": (
        "OPT", ("embed_positions/embedding", "layers/mlp/up_proj/kernel"),
        "'embed_positions/embedding' is not the weight of a linear layer or an embedding",
    ),
    "rows of OPT's positions": (
        "OPT", (lora.Rule("embed_positions/.*", variant="rows", rows=(1,)), ".*/up_proj/kernel"),
        "'embed_positions/embedding' is not an embedding table",
    ),
    "a weight of an attention whole": (
        "attention", ("out.weight", lora.Rule("mha.in_proj_weight", variant="full")),
        "also mha.in_proj_bias, mha.out_proj.bias, mha.out_proj.weight: train these too",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "targets", "text"), UNWRITABLE.values(), ids=UNWRITABLE)
def test_plans_that_peft_has_no_form_for_are_refused(kind, targets, text):
    given = {"keymap": KINDS[kind].keymap, "params": base_params(kind)}
    assert text in refusal(peft.require_writable, planned(kind, *targets), **given)


@pytest.mark.parametrize("router", [(1, 3.0), (2, 5.0)])
def test_experts_of_other_ranks_and_scales_load_beside_a_module_without_a_warning(tmp_path, router):
    params, keymap = base_params("experts"), KINDS["experts"].keymap
    targets = (
        lora.Rule("experts.gate_up_proj", alpha=1.0, rank=3),
        lora.Rule("experts.down_proj", alpha=5.0),
        lora.Rule("router.weight", *router),
    )
    config = lora.LoraConfig(rank=2, alpha=4, targets=targets)
    axes = {"experts.gate_up_proj": "stack out in", "experts.down_proj": "stack out in"}
    plan = lora.plan_from_axes(params, config, {**axes, "router.weight": "out in"})
    adapter = moved(params, plan)
    peft.write(tmp_path / "a", adapter, plan, keymap=keymap, params=params)
    theirs = outputs_there(Case("experts", {}), load_with_peft("experts", tmp_path / "a"))
    assert relative(merged_outputs("experts", adapter, plan), theirs) < 1e-5
    assert read("experts", tmp_path / "a")[1] == plan
    assert notes("experts", tmp_path / "a") == ""


def test_endings_that_mean_more_are_written_as_patterns(tmp_path):
    keymap = Keymap((
        Rule("head", "head.weight", (), "linear"), Rule("inner", "tower.head.weight", (), "linear"),
    ))  # fmt: skip
    params = {"head": jnp.ones((4, 4)), "inner": jnp.ones((4, 4))}
    config = lora.LoraConfig(rank=2, targets="head")
    plan = lora.plan_from_axes(params, config, {".*": "out in"})
    adapter = lora.init(jax.random.key(0), params, plan)
    peft.write(tmp_path / "a", adapter, plan, keymap=keymap, params=params)
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["target_modules"] == "head"
    assert [*peft.read(tmp_path / "a", params, keymap=keymap)[1]] == ["head"]


@pytest.mark.parametrize("kind", ["mlp", "GPT-2"])
def test_the_task_is_written_as_it_was_given_or_guessed(tmp_path, kind):
    plan = planned(kind, ".*(0|c_fc).weight")
    adapter = lora.init(jax.random.key(0), base_params(kind), plan)
    given = {"keymap": KINDS[kind].keymap, "params": base_params(kind)}
    peft.write(tmp_path / "a", adapter, plan, **given)
    peft.write(tmp_path / "b", adapter, plan, task_type="FEATURE_EXTRACTION", **given)
    tasks = [json.loads((tmp_path / n / CONFIG).read_text())["task_type"] for n in "ab"]
    assert tasks == [{"mlp": None, "GPT-2": "CAUSAL_LM"}[kind], "FEATURE_EXTRACTION"]


def test_conv1d_is_served_and_an_attention_is_not(tmp_path):
    plan = planned("GPT-2", ".*c_fc.weight", lora.Rule(".*c_attn.weight", rank=3))
    adapter = lora.init(jax.random.key(0), base_params("GPT-2"), plan)
    given = {"keymap": KINDS["GPT-2"].keymap, "params": base_params("GPT-2")}
    assert "filled up with zeros to 3" in str(
        peft.write(tmp_path / "a", adapter, plan, for_serving=True, **given)
    )
    plan = planned("attention", "mha.in_proj_weight", "mha.out_proj.weight")
    adapter = lora.init(jax.random.key(0), base_params("attention"), plan)
    given = {"keymap": KINDS["attention"].keymap, "params": base_params("attention")}
    message = refusal(peft.write, tmp_path / "c", adapter, plan, for_serving=True, **given)
    assert "'mha.in_proj_weight' is a weight of MultiheadAttention: servers load" in message
    plan = planned("bag of words", "words.weight", lora.Rule("out.bias", variant="full"))
    adapter = lora.init(jax.random.key(0), base_params("bag of words"), plan)
    given = {"keymap": KINDS["bag of words"].keymap, "params": base_params("bag of words")}
    message = refusal(peft.write, tmp_path / "b", adapter, plan, for_serving=True, **given)
    assert "'words.weight' is embedding" in message
    assert "'out.bias' is full" in message


def test_kernels_of_heads_are_served(tmp_path):
    kind = "mlp with heads"
    plan = planned(kind, "up/kernel", lora.Rule("(mid|down)/kernel", rank=3))
    adapter = moved(base_params(kind), plan)
    given = {"keymap": KINDS[kind].keymap, "params": base_params(kind)}
    assert peft.write(tmp_path / "a", adapter, plan, for_serving=True, **given)
    theirs = outputs_there(Case(kind, {}), load_with_peft(kind, tmp_path / "a"))
    assert relative(merged_outputs(kind, adapter, plan), theirs) < 1e-5


def test_scales_of_rslora_come_back_to_the_last_bit(tmp_path):
    case = Case("mlp", dict(target_modules=["0"], r=5, lora_alpha=2, use_rslora=True))
    save_with_peft(case, tmp_path / "theirs")
    given = {"keymap": KINDS["mlp"].keymap, "params": base_params("mlp")}
    adapter, plan = read("mlp", tmp_path / "theirs")
    peft.write(tmp_path / "ours", adapter, plan, **given)
    assert read("mlp", tmp_path / "ours")[1] == plan
    config = json.loads((tmp_path / "ours" / CONFIG).read_text())
    assert (config["use_rslora"], config["lora_alpha"]) == (True, 2)
    peft.write(tmp_path / "served", adapter, plan, for_serving=True, **given)
    assert "use_rslora" not in json.loads((tmp_path / "served" / CONFIG).read_text())
