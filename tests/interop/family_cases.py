"""Tiny models of every family, with random weights, and one case for each of its variants."""

import functools
from typing import NamedTuple

import jax
import numpy as np
import torch
import transformers

from interop import hf
from interop.families import FAMILIES, keymap_of
from interop.hf_config import from_attributes
from interop.keymaps import blocks_of
from lora_jax.models.config import DecoderConfig
from lora_jax.models.decoder import Decoder

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
OPT = {
    "vocab_size": 61,
    "hidden_size": 32,
    "ffn_dim": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
MOE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 12}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
SHORT, LONG = [1.0, 1.1, 1.3, 1.6], [1.0, 2.0, 4.0, 9.0]
LONGROPE = {"type": "longrope", "short_factor": SHORT, "long_factor": LONG}


# What isn't said above, so that every rotation shows.
ROPE = {"gpt2": {}, "opt": {}, "gemma3_text": {"rope_theta": 5e3, "rope_local_base_freq": 500.0}}


class Case(NamedTuple):
    """A family, and what a config of it says besides the sizes."""

    family: str
    said: dict

    @property
    def attributes(self):
        sizes = {"gpt2": GPT2, "opt": OPT}.get(self.family, SIZES)
        special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
        rope = ROPE.get(self.family, {"rope_theta": 500.0})
        return {"model_type": self.family, **sizes, **special, **rope, **self.said}


CASES = {
    "llama": Case("llama", {"tie_word_embeddings": True}),
    "llama biased": Case("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3.1": Case("llama", {"rope_scaling": LLAMA3}),
    "llama linear": Case("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "llama dynamic": Case("llama", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}),
    "mistral": Case("mistral", {"sliding_window": 7}),
    "mistral no window": Case("mistral", {"sliding_window": None, "num_key_value_heads": 4}),
    "qwen2": Case("qwen2", {"tie_word_embeddings": True}),
    "qwen2 late windows": Case(
        "qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    ),
    "qwen3": Case("qwen3", {"head_dim": 12}),
    "qwen3 yarn": Case("qwen3", {"rope_scaling": YARN, "attention_bias": True}),
    "qwen3 windows": Case(
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "mixtral": Case("mixtral", {"num_local_experts": 4}),
    "mixtral window": Case("mixtral", {"sliding_window": 5, "num_experts_per_tok": 1}),
    "qwen3_moe": Case("qwen3_moe", MOE),
    "qwen3_moe windows": Case(
        "qwen3_moe",
        {**MOE, "norm_topk_prob": True, "attention_bias": True}
        | {"use_sliding_window": True, "sliding_window": 5, "tie_word_embeddings": True},
    ),
    "smollm3": Case("smollm3", {"no_rope_layer_interval": 2}),
    "gemma": Case("gemma", {"num_key_value_heads": 1}),
    "gemma2": Case("gemma2", {"sliding_window": 5, "query_pre_attn_scalar": 11}),
    "gemma2 without caps": Case(
        "gemma2",
        {"final_logit_softcapping": None, "attn_logit_softcapping": None, "sliding_window": 6},
    ),
    "gemma3": Case("gemma3_text", {"sliding_window": 5, "sliding_window_pattern": 2}),
    "gemma3 stretched": Case(
        "gemma3_text",
        {"sliding_window": 5, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    "gpt2": Case("gpt2", {}),
    "gpt2 untied": Case("gpt2", {"tie_word_embeddings": False, "n_inner": 40}),
    "opt": Case("opt", {}),
    "opt without biases": Case("opt", {"enable_bias": False, "tie_word_embeddings": False}),
    "phi3": Case("phi3", {"sliding_window": 7}),
    "phi3 short rows": Case(
        "phi3",
        {"rope_scaling": LONGROPE, "original_max_position_embeddings": 32},
    ),
    "phi3 while it grows": Case(
        "phi3", {"rope_scaling": LONGROPE, "original_max_position_embeddings": 16}
    ),
    "phi3 part of each head": Case("phi3", {"partial_rotary_factor": 0.5}),
}

TOKENS = np.random.default_rng(1).integers(2, 61, (2, 24))


class Built(NamedTuple):
    model: transformers.PreTrainedModel
    config: DecoderConfig
    params: dict
    hidden: np.ndarray  # of transformers
    logits: np.ndarray


@functools.cache
def built(name):
    """A random torch model, what it computes, and the same model read here."""
    model_class = getattr(transformers, FAMILIES[CASES[name].family].architecture)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**CASES[name].attributes)).eval()
    with torch.no_grad():
        for path, weight in model.named_parameters():
            spread = 0.3 if weight.ndim == 1 else weight.shape[-1] ** -0.5
            one = weight.ndim == 1 and path.endswith("weight") and "gemma" not in name
            weight.normal_(1.0 if one else 0.0, spread)
    config = from_attributes(model.config.to_dict())
    tensors = {path: tensor.numpy() for path, tensor in model.state_dict().items()}
    return Built(model, config, hf.params_of(config, tensors), *torch_trace(model, config, TOKENS))


def torch_trace(model, config, tokens):
    """Outputs of every layer, and logits."""
    outputs = []
    blocks = model.get_submodule(blocks_of(keymap_of(config)))
    hooks = [b.register_forward_hook(lambda *call: outputs.append(call[-1])) for b in blocks]
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens), use_cache=False).logits.numpy()
    for hook in hooks:
        hook.remove()
    return torch.stack(outputs).numpy(), logits


def compiled(function, **settings):
    """The jitted function, built in half the time and run in more: tiny models run once."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0}, **settings)


@functools.partial(compiled, static_argnums=0)
def trace(config, params, tokens):
    """The same of ours."""
    (logits, _), sown = Decoder(config).apply({"params": params}, tokens, mutable=["intermediates"])
    return sown["intermediates"]["layers"]["hidden"], logits
