"""Small models of transformers and the same in this project: more rows of kinds."""

import functools
from typing import Any

import jax
import transformers

from interop import encoder_hf, hf
from interop.encoder_keymaps import encoder_keymap, encoder_shapes
from interop.families import FAMILIES, keymap_of
from interop.hf_config import from_attributes
from lora_jax.models.decoder import Decoder
from lora_jax.models.encoder import Encoder, init_encoder
from lora_jax.models.encoder_config import EncoderConfig

from peft_models import TOKENS, Kind

_SIZES = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16},
    "opt": {"ffn_dim": 24, "max_position_embeddings": 16},
}
_ROPE = {"gpt2": {}, "opt": {}, "gemma3_text": {"rope_theta": 5e3, "rope_local_base_freq": 500.0}}
GEMMA_LAYERS = ["sliding_attention", "full_attention"]


def family(name: str, **said: Any) -> Kind:
    attributes = {
        "model_type": name, "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
        **_ROPE.get(name, {"rope_theta": 500.0}), **said,
    }  # fmt: skip
    if name in _SIZES:
        kept = ("model_type", "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
        common = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
        attributes = {key: attributes[key] for key in kept} | (common if name == "opt" else {})
        attributes |= _SIZES[name]
    made = getattr(transformers, FAMILIES[name].architecture)
    settings = made.config_class(**attributes)
    config = from_attributes(settings.to_dict())

    def function(params, tokens):
        return Decoder(config).apply({"params": params}, tokens)[0]

    def build():
        model = made(settings)
        for path, weight in model.named_parameters():  # So that every leaf shows.
            std = 1.0 if "router" in path or "gate.weight" in path else 3.0
            weight.data *= std if weight.ndim > 1 else 1.0
        return model

    read = functools.partial(hf.params_of, config)
    return Kind(build, function, keymap_of(config), None, (TOKENS,), read)


def bert() -> Kind:
    config = EncoderConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2,
        max_positions=12, head="pooled", labels=("a", "b", "c"),
    )  # fmt: skip

    def function(params, tokens):
        return Encoder(config).apply({"params": params}, tokens).logits

    def build():
        return encoder_hf.to_transformers(config, init_encoder(jax.random.key(0), config))

    return Kind(build, function, encoder_keymap(config), encoder_shapes(config), (TOKENS,))


FAMILY_KINDS = {
    "Llama": family("llama"),
    "tied Llama": family("llama", tie_word_embeddings=True),
    "biased Llama": family("llama", attention_bias=True),
    "stacked GPT-2": family("gpt2"),
    "OPT": family("opt"),
    "Qwen3": family("qwen3"),
    "Gemma 3": family("gemma3_text", sliding_window=4, layer_types=GEMMA_LAYERS),
    "Mixtral": family("mixtral", num_local_experts=3),
    "Qwen3-MoE": family("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8),
    "BERT": bert(),
}
