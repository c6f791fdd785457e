"""A random transformers Llama beside the parameter tree that should compute the same."""

import functools
from typing import NamedTuple

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lora_jax.models.config import DecoderConfig

PROJECTIONS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


class Reference(NamedTuple):
    torch_model: LlamaForCausalLM
    params: dict


def _torch_llama(config: DecoderConfig, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.norm.eps,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": config.layer_kinds[0].rope.theta,
            },
            tie_word_embeddings=config.tie_embeddings,
            attention_bias=config.attention.bias,
            mlp_bias=config.mlp.bias,
            max_position_embeddings=config.max_positions,
            attn_implementation="eager",
        )
    )
    with torch.no_grad():  # large enough that attention is not uniform and every leaf matters
        for name, weight in model.named_parameters():
            scale = 0.5 if weight.ndim == 1 else weight.shape[-1] ** -0.5
            weight.normal_(1.0 if "norm" in name else 0.0, scale)
    return model.eval()


def _parameter_tree(model: LlamaForCausalLM, config: DecoderConfig) -> dict:
    def leaf(name: str) -> np.ndarray:
        return model.get_parameter(name).detach().numpy().T.copy()

    def stacked(name: str) -> np.ndarray:
        return np.stack([leaf(f"model.layers.{i}.{name}") for i in range(config.num_layers)])

    def projection(name: str, biased: bool) -> dict:
        parts = {"kernel": stacked(f"{name}.weight")}
        return parts | ({"bias": stacked(f"{name}.bias")} if biased else {})

    biased = {"self_attn": config.attention.bias, "mlp": config.mlp.bias}
    layers = {
        part: {name: projection(f"{part}.{name}", biased[part]) for name in names}
        for part, names in PROJECTIONS.items()
    }
    for norm in ("input_layernorm", "post_attention_layernorm"):
        layers[norm] = {"scale": stacked(f"{norm}.weight")}
    params = {
        "embed_tokens": {"embedding": leaf("model.embed_tokens.weight").T},
        "layers": layers,
        "norm": {"scale": leaf("model.norm.weight")},
    }
    head = {"lm_head": {"kernel": leaf("lm_head.weight")}}
    return params if config.tie_embeddings else params | head


@pytest.fixture(scope="session")
def llama():
    """A function of a config: the same random weights as a torch model and as our tree."""

    @functools.cache
    def build(config: DecoderConfig, seed: int = 0) -> Reference:
        model = _torch_llama(config, seed)
        return Reference(model, _parameter_tree(model, config))

    return build
