"""The table of PEFT adapters: kinds of layer x what a config can say, each made by real PEFT."""

import copy
import functools
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import peft as reference
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from peft_attentions import ATTENTION_KINDS
from peft_families import FAMILY_KINDS
from peft_models import params_of, torch_model, torch_outputs
from peft_nets import NETS

KINDS = {**NETS, **ATTENTION_KINDS, **FAMILY_KINDS}


class Case(NamedTuple):
    """One adapter."""

    kind: str
    config: dict[str, Any]
    inits: Any = False
    """PEFT's init_lora_weights; False leaves neither factor at zero."""
    wrong: str = ""
    """What the note says, where PEFT computes something else than W + s·B·A, or nothing at all."""


QKV = ["q_proj", "k_proj", "v_proj"]
TIE = dict(ensure_weight_tying=True)
TWICE = "mha: PEFT adds the update of its out_proj twice"
GPT2_LINEAR = ["c_attn", "c_proj", "c_fc"]
EXPERT_WEIGHTS = ["experts.gate_up_proj", "experts.down_proj"]

CASES = {
    # A plain network.
    "linear": Case("mlp", dict(target_modules=["0", "4"])),
    "linear, every layer by a word": Case("mlp", dict(target_modules="all-linear")),
    "linear, by a pattern": Case("mlp", dict(target_modules="[02]")),
    "linear, all but one": Case("mlp", dict(target_modules=["0", "2", "4"], exclude_modules=["2"])),
    "linear, rslora": Case("mlp", dict(target_modules=["0", "2"], use_rslora=True)),
    "linear, ranks and alphas": Case("mlp", dict(
        target_modules=["0", "2", "4"], rank_pattern={"2": 3}, alpha_pattern={"0": 1.5, "4": 20},
    )),
    "linear, ranks and alphas, rslora": Case("mlp", dict(
        target_modules=["0", "2"], rank_pattern={"2": 3}, alpha_pattern={"0": 5}, use_rslora=True,
    )),
    "linear, dora": Case("mlp", dict(target_modules=["0", "2"], use_dora=True)),
    "linear, a bias on B": Case("mlp", dict(target_modules=["0", "4"], lora_bias=True)),
    "linear, a bias on B, ranks": Case("mlp", dict(
        target_modules=["0", "4"], lora_bias=True, rank_pattern={"4": 1},
    )),
    "linear, biases of the adapted": Case("mlp", dict(target_modules=["0"], bias="lora_only")),
    "linear, all biases": Case("mlp", dict(target_modules=["0"], bias="all")),
    "linear, one saved": Case("mlp", dict(target_modules=["0"], modules_to_save=["4"])),
    "linear, by the parameter": Case("mlp", dict(
        target_modules=[], target_parameters=["2.weight"],
    )),
    "linear, dropout": Case("mlp", dict(target_modules=["2"], lora_dropout=0.1)),
    "linear, pissa": Case("mlp", dict(target_modules=["0", "2"]), "pissa"),
    "linear, pissa, ranks, rslora": Case("mlp", dict(
        target_modules=["0", "2"], rank_pattern={"0": 1}, use_rslora=True,
    ), "pissa"),
    "linear, pissa with dora": Case("mlp", dict(target_modules=["2"], use_dora=True), "pissa"),
    "linear, olora": Case("mlp", dict(target_modules=["0", "4"]), "olora"),
    "linear, pissa, ranks above a side": Case("mlp", dict(
        target_modules=["0", "4"], r=9, use_dora=True,
    ), "pissa"),
    "linear, mica": Case("mlp", dict(target_modules=["0"]), "mica"),
    "linear, orthogonal": Case("mlp", dict(target_modules=["2"], r=4), "orthogonal"),
    "heads": Case("mlp with heads", dict(target_modules=["0", "2", "4"])),
    "heads, dora and biases": Case("mlp with heads", dict(
        target_modules=["0", "2"], use_dora=True, bias="all",
    )),
    "heads, a bias on B": Case("mlp with heads", dict(target_modules=["0", "2"], lora_bias=True)),
    "heads, pissa": Case("mlp with heads", dict(target_modules=["0", "2"]), "pissa"),
    # Layers, in one leaf or each in its own.
    "stacked": Case("stacked", dict(target_modules=["fc"])),
    "stacked, some layers": Case("stacked", dict(
        target_modules=["fc"], layers_to_transform=[0, 2], layers_pattern="layers",
    )),
    "stacked, ranks and alphas": Case("stacked", dict(
        target_modules=["fc", "head"], rank_pattern={r"layers\.1\.fc": 3, "head": 1},
        alpha_pattern={"layers.2.fc": 1.25},
    )),
    "stacked, dora": Case("stacked", dict(
        target_modules=["fc"], use_dora=True, rank_pattern={r"layers\.1\.fc": 1},
    )),
    "stacked, a bias on B in some layers": Case("stacked", dict(
        target_modules=["layers.0.fc", "layers.2.fc"], lora_bias=True,
        alpha_pattern={"layers.0.fc": 3},
    )),
    "stacked, norms and head saved": Case("stacked", dict(
        target_modules=["fc"], modules_to_save=["norm", "head"],
    )),
    "stacked, all biases": Case("stacked", dict(target_modules=["fc"], bias="all")),
    "stacked, olora in one layer": Case("stacked", dict(
        target_modules=["layers.1.fc", "head"], rank_pattern={"head": 4},
    ), "olora"),
    "stacked, olora, ranks above a side": Case("stacked", dict(
        target_modules=["fc", "head"], r=9, rank_pattern={"layers.1.fc": 2}, use_rslora=True,
    ), "olora"),
    "unrolled": Case("unrolled", dict(
        target_modules=["fc"], rank_pattern={r"layers\.1\.fc": 3}, modules_to_save=["1.norm"],
        bias="lora_only",
    )),
    # Convolutions.
    "conv1d": Case("conv1d", dict(target_modules=["first", "second"])),
    "conv1d, dora": Case("conv1d", dict(target_modules=["first", "second"], use_dora=True)),
    "conv2d": Case("conv2d", dict(target_modules=["first", "second", "head"])),
    "conv2d, dora, ranks": Case("conv2d", dict(
        target_modules=["first", "second"], use_dora=True, rank_pattern={"first": 2},
    )),
    "conv2d, a bias on B": Case("conv2d", dict(target_modules=["first"], lora_bias=True)),
    "conv2d, saved beside": Case("conv2d", dict(
        target_modules=["second"], modules_to_save=["first"], bias="lora_only",
    )),
    "conv2d, strided": Case("strided conv2d", dict(target_modules=["first"], use_rslora=True)),
    "conv2d in Flax's layout": Case("conv2d of Flax", dict(target_modules=["first", "second"])),
    "conv2d in Flax's layout, dora": Case("conv2d of Flax", dict(
        target_modules=["first", "head"], use_dora=True, modules_to_save=["second"],
    )),
    "conv2d, dilated": Case(
        "dilated conv2d", dict(target_modules=["first", "second"]), wrong="neither dilation",
    ),
    "conv1d, reflecting": Case(
        "reflecting conv1d", dict(target_modules=["first"]), wrong="nor padding mode",
    ),
    "conv3d": Case("conv3d", dict(target_modules=["first", "second"])),
    "conv3d, dora": Case("conv3d", dict(target_modules=["first"], use_dora=True)),
    # Embeddings.
    "embedding": Case("bag of words", dict(target_modules=["words", "out"])),
    "embedding, rslora": Case("bag of words", dict(target_modules=["words"], use_rslora=True)),
    "embedding, dora": Case("bag of words", dict(target_modules=["words", "out"], use_dora=True)),
    "embedding, pissa beside": Case("bag of words", dict(target_modules=["words", "out"]), "pissa"),
    "embedding, saved": Case("bag of words", dict(
        target_modules=["out"], modules_to_save=["words"],
    )),
    "embedding, tokens": Case("bag of words", dict(
        target_modules=["out"], trainable_token_indices={"words": [3, 11, 7]},
    )),
    # Attention, whose two weights PEFT adapts together.
    "attention": Case("attention", dict(target_modules=["mha"]), wrong=TWICE),
    "attention, ranks, beside a layer": Case("attention", dict(
        target_modules=["mha", "out"], rank_pattern={"mha": 3}, alpha_pattern={"mha": 5},
    ), wrong=TWICE),
    "attention, biases beside": Case("attention", dict(
        target_modules=["mha", "out"], bias="lora_only",
    ), wrong=TWICE),
    "attention, saved": Case("attention", dict(target_modules=["out"], modules_to_save=["mha"])),
    # Experts.
    "experts": Case("experts", dict(target_modules=[], target_parameters=EXPERT_WEIGHTS)),
    "experts, named the other way round": Case("experts", dict(
        target_modules=[], target_parameters=EXPERT_WEIGHTS[::-1], use_rslora=True,
    )),
    "experts, one of their weights": Case("experts", dict(
        target_modules=["router"], target_parameters=["experts.down_proj"], bias="all",
    )),
    "experts, router of another rank": Case("experts", dict(
        target_modules=["router"], target_parameters=EXPERT_WEIGHTS, rank_pattern={"router": 2},
    )),
    "transposed experts": Case("transposed experts", dict(
        target_modules=[], target_parameters=EXPERT_WEIGHTS,
    )),
    "expert by expert": Case("expert by expert", dict(target_modules=["up", "down", "router"])),
    "expert by expert, dora": Case("expert by expert", dict(
        target_modules=["up"], use_dora=True, rank_pattern={"up": 2},
    )),
    "expert by expert, a bias on B": Case("expert by expert", dict(
        target_modules=["down"], lora_bias=True,
    )),
    # GPT-2, by its own names.
    "GPT-2": Case("GPT-2", dict(target_modules=["c_attn"])),
    "GPT-2, every layer": Case("GPT-2", dict(target_modules=GPT2_LINEAR, use_dora=True)),
    "GPT-2, ranks by layer": Case("GPT-2", dict(
        target_modules=GPT2_LINEAR, rank_pattern={r"h\.1\.mlp\.c_proj": 2}, bias="all",
        alpha_pattern={"c_attn": 3},
    )),
    "GPT-2, a bias on B": Case("GPT-2", dict(target_modules=["c_fc"], lora_bias=True)),
    "GPT-2, pissa": Case("GPT-2", dict(target_modules=["c_attn", "c_fc"]), "pissa"),
    "GPT-2, positions": Case("GPT-2", dict(target_modules=["wpe", "c_attn"])),
    "GPT-2, tied embedding": Case("GPT-2", dict(target_modules=["lm_head", "wpe"], **TIE)),
    "GPT-2, tied embedding is saved": Case("GPT-2", dict(
        target_modules=["c_attn"], modules_to_save=["lm_head"], **TIE,
    )),
    "GPT-2, tokens": Case("GPT-2", dict(
        target_modules=["c_attn"], trainable_token_indices={"wte": [2, 5]},
    )),
    # Llama, stacked.
    "Llama": Case("Llama", dict(target_modules=["q_proj", "v_proj"])),
    "Llama, patterns": Case("Llama", dict(
        target_modules=["q_proj", "k_proj", "down_proj", "lm_head"],
        rank_pattern={"self_attn.q_proj": 2, r"model\.layers\.\d+\.mlp\.down_proj": 6},
        alpha_pattern={"q_proj": 3.5, "^lm_head": 1},
    )),
    "Llama, patterns over layers": Case("Llama", dict(
        target_modules=QKV, rank_pattern={r"layers\.0\.self_attn\.q_proj": 2, "v_proj": 6},
        alpha_pattern={r"layers\.[12]\.self_attn\.k_proj": 1.5},
    )),
    "Llama, patterns over layers, rslora": Case("Llama", dict(
        target_modules=QKV, rank_pattern={r"layers\.0\.self_attn\.q_proj": 9}, use_rslora=True,
    )),
    "Llama, one layer": Case("Llama", dict(target_modules=QKV, layers_to_transform=1)),
    "Llama, a full name beside layers": Case("Llama", dict(
        target_modules=["k_proj", "model.layers.0.self_attn.q_proj", "lm_head"],
        layers_to_transform=[1],
    )),
    "Llama, layers by a pattern": Case("Llama", dict(
        target_modules=QKV, layers_to_transform=[1], layers_pattern=["h", "layers"],
    )),
    "Llama, some layers by name": Case("Llama", dict(
        target_modules=r"model\.layers\.[0]\.mlp\..*_proj",
    )),
    "Llama, ranks by layer, dora": Case("biased Llama", dict(
        target_modules=QKV, use_dora=True, rank_pattern={r"layers\.1\..*": 1},
    )),
    "Llama, head saved": Case("Llama", dict(target_modules=QKV, modules_to_save=["lm_head"])),
    "Llama, every linear layer, dora": Case("Llama", dict(
        target_modules="all-linear", use_dora=True,
    )),
    "Llama, embedding": Case("Llama", dict(target_modules=["embed_tokens", "q_proj"])),
    "Llama, tied embedding": Case("tied Llama", dict(
        target_modules=["embed_tokens", "q_proj"], **TIE,
    )),
    "Llama, tied embedding of another rank and scale": Case("tied Llama", dict(
        target_modules=["embed_tokens", *QKV], rank_pattern={"embed_tokens|lm_head": 3},
        alpha_pattern={"lm_head": 8, "embed_tokens": 8}, **TIE,
    )),
    "Llama, any ending is saved": Case("Llama", dict(target_modules=QKV, modules_to_save=["norm"])),
    "Llama, a block is saved": Case("biased Llama", dict(
        target_modules=["up_proj", *QKV], modules_to_save=["self_attn"],
    )),
    "Llama, tied embedding is saved": Case("tied Llama", dict(
        target_modules=QKV, modules_to_save=["embed_tokens"], **TIE,
    )),
    "Llama, biases of the adapted": Case("biased Llama", dict(
        target_modules=["q_proj"], bias="lora_only",
    )),
    "Llama, a bias on B": Case("biased Llama", dict(target_modules=["q_proj"], lora_bias=True)),
    "Llama, tokens": Case("Llama", dict(target_modules=QKV, trainable_token_indices=[7, 3])),
    "Llama, tokens of a tied table": Case("tied Llama", dict(
        target_modules=QKV, trainable_token_indices={"embed_tokens": [7, 3]},
    )),
    "Llama, pissa": Case("Llama", dict(target_modules=["q_proj", "down_proj"]), "pissa"),
    "Llama, olora of unequal ranks": Case("Llama", dict(
        target_modules=QKV, rank_pattern={r"layers\.1\..*": 2},
    ), "olora"),
    "Llama, several at once": Case("biased Llama", dict(
        target_modules=QKV, use_dora=True, modules_to_save=["lm_head", "model.norm"], bias="all",
        trainable_token_indices=[39], rank_pattern={r"layers\.1.*v_proj": 1},
    )),
    # Other families, stacked.
    "stacked GPT-2": Case("stacked GPT-2", dict(target_modules=GPT2_LINEAR, use_rslora=True)),
    "stacked GPT-2, dora, ranks by layer": Case("stacked GPT-2", dict(
        target_modules=GPT2_LINEAR, use_dora=True, rank_pattern={r"h\.1\.mlp\.c_proj": 1},
    )),
    "stacked GPT-2, a bias on B in one layer": Case("stacked GPT-2", dict(
        target_modules=["c_attn"], lora_bias=True, layers_to_transform=[1],
    )),
    "OPT": Case("OPT", dict(target_modules=["q_proj", "v_proj", "out_proj"])),
    "OPT, all biases": Case("OPT", dict(target_modules=["fc1", "fc2"], bias="all")),
    "OPT, tied embedding": Case("OPT", dict(target_modules=["embed_tokens", "fc1"], **TIE)),
    "OPT, positions and norms saved": Case("OPT", dict(
        target_modules=["k_proj"], modules_to_save=["embed_positions", "layer_norm"],
    )),
    "Qwen3": Case("Qwen3", dict(target_modules="all-linear")),
    "Qwen3, norms of heads saved": Case("Qwen3", dict(
        target_modules=["q_proj", "k_proj"], modules_to_save=["q_norm", "k_norm"], use_dora=True,
    )),
    "Qwen3, pissa": Case("Qwen3", dict(target_modules=["gate_proj", "o_proj"]), "pissa"),
    "Gemma 3": Case("Gemma 3", dict(target_modules=QKV, alpha_pattern={r".*\.0\..*": 7})),
    "Gemma 3, tied and scaled embedding": Case("Gemma 3", dict(
        target_modules=["embed_tokens", "o_proj"], **TIE,
    )),
    "Gemma 3, tokens": Case("Gemma 3", dict(
        target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 1]},
    )),
    "Mixtral": Case("Mixtral", dict(target_modules=QKV)),
    "Mixtral, experts": Case("Mixtral", dict(
        target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )),
    "Mixtral, experts, router and attention": Case("Mixtral", dict(
        target_modules=["q_proj"], rank_pattern={"q_proj": 3},
        target_parameters=["gate.weight", "experts.down_proj"],
    )),
    "Mixtral, experts by the names of old": Case("Mixtral", dict(
        target_modules=["q_proj", "w1", "w2", "w3"],
    )),
    "Qwen3-MoE, experts beside attention": Case("Qwen3-MoE", dict(
        target_modules=["o_proj"], target_parameters=["experts.gate_up_proj"], use_rslora=True,
    )),
    "BERT": Case("BERT", dict(target_modules=["query", "value"])),
    "BERT, a classifier trained": Case("BERT", dict(
        target_modules=["query", "key"], task_type="SEQ_CLS",
    )),
    "BERT, every linear layer, dora": Case("BERT", dict(
        target_modules="all-linear", use_dora=True,
    )),
    "BERT, words and a bias on B": Case("BERT", dict(
        target_modules=["word_embeddings", "pooler.dense"], modules_to_save=["classifier"],
        bias="lora_only",
    )),
}  # fmt: skip


@functools.cache
def base_model(kind: str) -> nn.Module:
    return torch_model(KINDS[kind])


@functools.cache
def base_params(kind: str) -> Any:
    return params_of(KINDS[kind])


def jitted(function: Any) -> Any:
    """Built in half the time and run in more: small models run once."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def compiled(kind: str) -> Any:
    return jitted(KINDS[kind].function)


@functools.cache
def base_outputs(kind: str) -> np.ndarray:
    return outputs_of(kind, base_params(kind))


def outputs_of(kind: str, params: Any) -> np.ndarray:
    return np.asarray(compiled(kind)(params, *KINDS[kind].inputs))


def save_with_peft(case: Case, directory: Path, **kwargs: Any) -> nn.Module:
    """A directory from PEFT, in whose adapter nothing is as it was at the start."""
    model = copy.deepcopy(base_model(case.kind))
    torch.manual_seed(1)
    config = {"r": 2, "lora_alpha": 3, **case.config, "init_lora_weights": case.inits}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = reference.get_peft_model(model, reference.LoraConfig(**config)).eval()
        for name, parameter in model.named_parameters():
            factor = re.search("lora_(embedding_)?[AB].*weight|lora_embedding", name)
            if parameter.requires_grad and not (factor and case.inits is False):
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.create_or_update_model_card = lambda directory: None  # Takes longer than the rest.
        model.save_pretrained(directory, **{"save_embedding_layers": False, **kwargs})
    return model


def outputs_by_the_formula(case: Case, model: nn.Module) -> np.ndarray:
    """What the base computes in torch with s·B·A added to each weight, once."""
    base = copy.deepcopy(base_model(case.kind))
    state = {
        n.replace(".base_layer", ""): t for n, t in model.base_model.model.state_dict().items()
    }
    for name, tensor in base.state_dict().items():  # Biases, which are trained in place.
        tensor.copy_(state[name])
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            a, b = (getattr(module, f"lora_{x}")["default"].weight for x in "AB")
            update = module.scaling["default"] * torch.einsum("or,r...->o...", b.flatten(1), a)
            inner = base.get_submodule(name.replace(".base_layer", ""))
            weight = getattr(inner, "in_proj_weight", None)
            (inner.weight if weight is None else weight).data += update.detach()
    return torch_outputs(base, KINDS[case.kind])


def outputs_there(case: Case, model: nn.Module) -> np.ndarray:
    """What torch computes."""
    return torch_outputs(model, KINDS[case.kind])


def load_with_peft(kind: str, directory: Path) -> nn.Module:
    """A directory in real PEFT; every warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # What PEFT calls in transformers, whatever the adapter.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        model = reference.PeftModel.from_pretrained(copy.deepcopy(base_model(kind)), directory)
    return model.eval()


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
