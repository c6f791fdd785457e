"""The LoRA in torch: against PEFT, its merge, its injection, the numbers of the tutorials."""

import copy
import pickle
import subprocess
import sys

import peft
import pytest
import torch
import transformers
from torch import nn
from torch_lora_models import (
    MLP,
    MODELS,
    VOCAB,
    WIDTH,
    Transformer,
    adapted,
    build,
    data,
    fill,
    torch_batches,
)

import lora_jax as lora
from interop.torch_lora import (
    LoRALinear,
    apply_lora,
    by_name,
    by_regex,
    factors,
    lora_layers,
    merge,
    movements,
    parameter_counts,
    square,
    trainable_summary,
    unload,
)
from interop.torch_training import (
    mean_cross_entropy,
)


def in_peft(model, make, dtype=torch.float32, **config):
    """The same base and factors in PEFT."""
    layers = lora_layers(model)
    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules=list(layers), **config)
    theirs = peft.get_peft_model(build(make).to(dtype), settings)
    for name, layer in layers.items():
        target = theirs.base_model.model.get_submodule(name)
        target.lora_A["default"].weight.data.copy_(layer.lora_A.data)
        target.lora_B["default"].weight.data.copy_(layer.lora_B.data)
    return theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_gradients_and_merge_are_pefts(name, dtype):
    make, _, select, _ = MODELS[name]
    model = build(make).to(dtype)
    apply_lora(model, select, rank=4, alpha=6)
    theirs = in_peft(fill(model), make, dtype)
    batch = torch_batches(data())[0]
    ours, reference, base = (m(batch.inputs) for m in (model, theirs, build(make).to(dtype)))
    assert ours.dtype == reference.dtype == dtype
    assert (ours - reference).abs().max() < 1e-6
    assert (ours - base).abs().max() > 0.1  # the adapter does something

    mean_cross_entropy(model, batch).backward()
    mean_cross_entropy(theirs, batch).backward()
    layers = lora_layers(model)
    for name, layer in layers.items():
        target = theirs.base_model.model.get_submodule(name)
        for own, other in ((layer.lora_A, target.lora_A), (layer.lora_B, target.lora_B)):
            expected = other["default"].weight.grad
            assert (own.grad - expected).abs().max() < 1e-6 < expected.abs().max()

    merge(model)
    merged = theirs.merge_and_unload()
    for name, layer in layers.items():
        expected = merged.get_submodule(name).weight
        assert (layer.original_layer.weight - expected).abs().max() < 1e-7


def test_dropout_acts_on_the_input_of_a_as_in_peft():
    model, _ = adapted(MLP, by_name("up"), dropout=0.5)
    theirs = in_peft(model, MLP, lora_dropout=0.5)
    tokens = torch.arange(VOCAB)

    def drawn(net, seed):
        torch.manual_seed(seed)
        return net(tokens)

    assert (drawn(model, 0) - drawn(theirs, 0)).abs().max() < 1e-6
    assert (drawn(model, 0) - drawn(model, 1)).abs().max() > 0.1
    assert torch.equal(drawn(model.eval(), 0), drawn(model, 1))


def test_the_summary_is_pefts(capsys):
    model, _ = adapted(*MODELS["transformer"][::2])
    in_peft(model, Transformer).print_trainable_parameters()
    assert capsys.readouterr().out.strip() == trainable_summary(model)


def test_a_fresh_layer_computes_the_base_and_starts_like_pefts():
    model, tokens = build(MLP), torch.arange(VOCAB)
    apply_lora(model, by_name("up", "down"), rank=4, alpha=6)
    assert torch.equal(model(tokens), build(MLP)(tokens))
    wide = LoRALinear(nn.Linear(512, 8), 256)
    assert wide.lora_A.abs().max().item() == pytest.approx(512**-0.5, rel=1e-3)
    assert wide.lora_A.std().item() == pytest.approx((3 * 512) ** -0.5, rel=2e-2)
    minimind = LoRALinear(nn.Linear(512, 8), 256, init_std=0.02)
    assert minimind.lora_A.std().item() == pytest.approx(0.02, rel=2e-2)
    assert minimind.scaling == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_merge_and_unmerge(dtype):
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(64, 48).to(dtype), 4, 8)
    x, weight = torch.randn(10, 64, dtype=dtype), layer.original_layer.weight.clone()
    nn.init.normal_(layer.lora_B)
    base, before = layer.original_layer(x), layer(x)
    layer.merge()
    once = layer.original_layer.weight.clone()
    layer.merge()
    assert torch.equal(layer.original_layer.weight, once)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float64: 1e-14}[dtype]
    assert (layer(x) - before).abs().max() < tolerance * before.abs().max()
    assert (base - before).abs().max() > 0.5 * before.abs().max()  # B is not zero
    layer.unmerge()
    layer.unmerge()
    assert torch.equal(layer.original_layer.weight, weight)
    assert torch.equal(layer(x), before)


def test_the_merge_check_can_fail():
    """A wrong scale is seen with a B that isn't zero, and can't be seen with a fresh one."""
    torch.manual_seed(0)
    layer, x = LoRALinear(nn.Linear(64, 48), 4, 8), torch.randn(10, 64)

    def gap_of_a_wrong_merge():
        before, right = layer(x), layer.scaling
        layer.scaling = 1.01 * right
        layer.merge()
        gap = (layer(x) - before).abs().max()
        layer.unmerge()
        layer.scaling = right
        return gap

    assert gap_of_a_wrong_merge() == 0
    nn.init.normal_(layer.lora_B)
    assert gap_of_a_wrong_merge() > 1e-2


class Notebook(nn.Module):
    """The three layers on which the notebook tries its injection."""

    def __init__(self):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(64, 512), nn.Linear(512, 512)
        self.linear3 = nn.Linear(512, 64)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embed.weight


SELECTED = {
    "name": (Transformer, by_name("1.q", "head"), ["layers.1.q", "head"]),
    "no part of a name": (Transformer, by_name("layers.0.q"), ["layers.0.q"]),
    "regex": (Transformer, by_regex(r".*\.1\.[qk]"), ["layers.1.q", "layers.1.k"]),
    "square": (Notebook, square, ["linear2"]),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 8), square, ["linear1", "linear2"]),
}


@pytest.mark.parametrize(("make", "select", "expected"), SELECTED.values(), ids=SELECTED)
def test_which_layers_are_adapted(make, select, expected):
    model = make()
    assert apply_lora(model, select, rank=2) == expected == list(lora_layers(model))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.lora_{factor}" for name in expected for factor in "AB"}


def test_gpt2s_conv1d_is_adapted_and_merged_as_in_peft():
    """Its weight is (in, out); c_proj is square, so that a wrong transpose has the right shape."""
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": VOCAB, "n_positions": 16}
    torch.manual_seed(0)
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    plain, tokens = copy.deepcopy(base), torch.arange(12)[None]
    model = copy.deepcopy(base)
    names = apply_lora(model, by_name("c_attn", "attn.c_proj"), rank=4, alpha=6)
    assert names == [
        f"transformer.h.{i}.attn.{part}" for i in (0, 1) for part in ("c_attn", "c_proj")
    ]
    fill(model)
    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules=names, fan_in_fan_out=True)
    theirs = peft.get_peft_model(base, settings)
    for name, layer in lora_layers(model).items():
        target = theirs.base_model.model.get_submodule(name)
        target.lora_A["default"].weight.data.copy_(layer.lora_A.data)
        target.lora_B["default"].weight.data.copy_(layer.lora_B.data)
    expected = theirs(tokens).logits
    assert (model(tokens).logits - expected).abs().max() < 1e-6
    assert (plain(tokens).logits - expected).abs().max() > 0.1
    unload(merge(model))
    assert (model(tokens).logits - expected).abs().max() < 1e-5
    assert set(model.state_dict()) == set(plain.state_dict())
    assert type(model) is type(plain)


def test_movements_say_which_factor_learns():
    model, _ = adapted(MLP, by_name("up", "down"))
    before = factors(model)
    model.up.lora_B.data += 0.5
    moved = movements(model, before)
    assert moved.pop("up.lora_B") == pytest.approx(0.5 * (2 * WIDTH * 4) ** 0.5)
    assert set(moved.values()) == {0.0}
    assert set(moved) == {"up.lora_A", "down.lora_A", "down.lora_B"}


def test_a_square_factor_is_not_adapted_in_its_turn():
    model = Notebook()
    assert apply_lora(model, square, rank=512) == ["linear2"]


BAD_INJECTION = {
    "named zz, q_: there are up, down": (MLP, by_name("up", "zz", "q_"), 2),
    "no linear layer is selected: there are up, down": (MLP, by_regex("u"), 2),
    "embed.weight and head.weight are one weight.*rank must be at least 1, got 0": (
        Tied,
        by_name("head"),
        0,
    ),
    "up.weight is no linear layer": (MLP, lambda linears: ["up", "up.weight"], 2),
}


@pytest.mark.parametrize(("message", "case"), BAD_INJECTION.items(), ids=map(str, BAD_INJECTION))
def test_what_injection_refuses(message, case):
    make, select, rank = case
    model = make()
    with pytest.raises(lora.InputError, match=message):
        apply_lora(model, select, rank=rank)
    assert not lora_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_layers_can_be_adapted_at_different_ranks():
    model, _ = adapted(MLP, by_name("up"))
    apply_lora(model, by_name("down"), rank=2)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(min(parameter.shape) for parameter in trained) == [2, 2, 4, 4]


def test_an_adapted_layer_is_not_adapted_again():
    model, _ = adapted(MLP, by_name("up", "down"))
    with pytest.raises(lora.InputError, match="named up: there is none that is not adapted"):
        apply_lora(model, by_name("up"))


def llama_like(cls, config, **sizes):
    return cls(config(tie_word_embeddings=True, vocab_size=6400, **sizes))


def minimind():
    """The notebook's model as a Llama: it has the same weights."""
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
    return llama_like(transformers.LlamaForCausalLM, transformers.LlamaConfig, **sizes, **heads)


def minimind_3():
    sizes = {"hidden_size": 768, "intermediate_size": 2432, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 96}
    return llama_like(transformers.Qwen3ForCausalLM, transformers.Qwen3Config, **sizes, **heads)


def opt_350m():
    config = transformers.OPTConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        ffn_dim=4096,
        num_attention_heads=16,
        word_embed_proj_dim=512,
        do_layer_norm_before=False,
    )
    return transformers.OPTForCausalLM(config)


def simple_transformer():
    ends = {f"{name}_proj": nn.Linear(768, 768) for name in "qkvo"}
    return nn.ModuleDict(
        {**ends, "ffn": nn.Sequential(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768))}
    )


COUNTS = {
    "minimind": (minimind, square, 16, 65_536, 8_980_992),
    "minimind-3": (minimind_3, square, 16, 393_216, 64_305_408),
    "opt-350m": (opt_350m, by_name("q_proj", "v_proj"), 8, 786_432, 331_982_848),
    "simple": (simple_transformer, by_name("q_proj", "v_proj"), 8, 24_576, 7_109_376),
    "one layer": (lambda: nn.Sequential(nn.Linear(768, 768)), square, 8, 12_288, 602_880),
}


@pytest.mark.parametrize(
    ("make", "select", "rank", "trained", "total"), COUNTS.values(), ids=COUNTS
)
def test_parameter_counts_of_the_tutorials(make, select, rank, trained, total):
    with torch.device("meta"):
        model = make()
        apply_lora(model, select, rank=rank)
    assert parameter_counts(model) == (trained, total)


def test_shares_of_the_tutorials():
    with torch.device("meta"):
        models = minimind(), opt_350m()
        names = apply_lora(models[0], square, rank=16)
        apply_lora(models[1], by_name("q_proj", "v_proj"), rank=8, alpha=32)
    assert names == [f"model.layers.{n}.self_attn.{p}_proj" for n in range(2) for p in "qo"]
    trained, total = parameter_counts(models[0])
    assert f"{100 * trained / total:.2f}%" == "0.73%"
    assert trainable_summary(models[0]).endswith("trainable%: 0.7297")
    assert trainable_summary(models[1]) == (
        "trainable params: 786,432 || all params: 331,982,848 || trainable%: 0.2369"
    )


@pytest.mark.parametrize(
    ("rank", "trained", "percent"),
    [
        (4, 32768, 0.20),
        (8, 65536, 0.39),
        (16, 131072, 0.78),
        (32, 262144, 1.56),
        (64, 524288, 3.12),
    ],
)
def test_table_of_ranks(rank, trained, percent):
    with torch.device("meta"):
        layer = LoRALinear(nn.Linear(4096, 4096, bias=False), rank)
    found, total = parameter_counts(layer)
    assert found == trained
    assert 100 * found / (total - found) == pytest.approx(percent, abs=6e-3)


def test_an_adapted_model_can_be_pickled():
    model, _ = adapted(MLP, by_name("up"))
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(torch.arange(VOCAB)), model(torch.arange(VOCAB)))
    assert isinstance(again.up, LoRALinear)


def test_importing_them_imports_neither_torch_nor_jax():
    code = (
        "import sys, interop.torch_lora, interop.torch_lora_files, interop.torch_training; "
        "print({'torch', 'jax'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
