"""config.json as the hub's models have it: all of it is understood, and the sizes come out."""

import math

import pytest

from interop.hf_config import from_attributes, to_attributes
from lora_jax.models.decoder import leaf_shapes

NULL, NO = {"rope_scaling": None}, {"attention_bias": False, "attention_dropout": 0.0}
IDS = {"bos_token_id": 1, "eos_token_id": [2, 107], "pad_token_id": 0}
MADE = {"torch_dtype": "bfloat16", "transformers_version": "4.44.2", "use_cache": True}
LLAMA3 = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "head_dim": 256, "rms_norm_eps": 1e-6}
SHORT, LONG = [1.0 + 0.01 * n for n in range(48)], [1.0 + 1.3 * n for n in range(48)]


def sizes(vocab, hidden, inner, layers, heads, kv_heads, positions):
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": positions,
        "initializer_range": 0.02,
    }


# Attributes as published, and how many parameters the model has.
PUBLISHED = {
    "huggyllama/llama-7b": (
        {"model_type": "llama", **sizes(32_000, 4096, 11_008, 32, 32, 32, 2048), **IDS, **MADE,
         "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-6,
         "max_sequence_length": 2048, "tie_word_embeddings": False},
        6_738_415_616,
    ),
    "meta-llama/Llama-3.2-1B": (
        {"model_type": "llama", **sizes(128_256, 2048, 8192, 16, 32, 8, 131_072), **NO, **IDS,
         "architectures": ["LlamaForCausalLM"], "head_dim": 64, "hidden_act": "silu", **MADE,
         "mlp_bias": False, "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_scaling": LLAMA3,
         "rope_theta": 500_000.0, "tie_word_embeddings": True},
        1_235_814_400,
    ),
    "mistralai/Mistral-7B-v0.1": (
        {"model_type": "mistral", **sizes(32_000, 4096, 14_336, 32, 32, 8, 32_768), **IDS, **MADE,
         "architectures": ["MistralForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5,
         "rope_theta": 10_000.0, "sliding_window": 4096, "tie_word_embeddings": False},
        7_241_732_096,
    ),
    "Qwen/Qwen2.5-0.5B": (
        {"model_type": "qwen2", **sizes(151_936, 896, 4864, 24, 14, 2, 32_768), **IDS, **MADE,
         "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "hidden_act": "silu",
         "max_window_layers": 24, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0,
         "sliding_window": 32_768, "tie_word_embeddings": True, "use_mrope": False,
         "use_sliding_window": False},
        494_032_768,
    ),
    "Qwen/Qwen3-0.6B": (
        {"model_type": "qwen3", **sizes(151_936, 1024, 3072, 28, 16, 8, 40_960), **NO, **IDS,
         "architectures": ["Qwen3ForCausalLM"], "head_dim": 128, "hidden_act": "silu", **NULL,
         "max_window_layers": 28, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000, **MADE,
         "sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False},
        596_049_920,
    ),
    "HuggingFaceTB/SmolLM3-3B": (
        {"model_type": "smollm3", **sizes(128_256, 2048, 11_008, 36, 16, 4, 65_536), **NO, **IDS,
         "architectures": ["SmolLM3ForCausalLM"], "hidden_act": "silu", "mlp_bias": False, **NULL,
         "layer_types": ["full_attention"] * 36, "max_window_layers": 28, "pretraining_tp": 2,
         "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "rms_norm_eps": 1e-6,
         "rope_theta": 5_000_000.0, "sliding_window": None, "use_sliding_window": False, **MADE},
        3_075_098_624,
    ),
    "google/gemma-2b": (
        {"model_type": "gemma", **sizes(256_000, 2048, 16_384, 18, 8, 1, 8192), **NO, **IDS,
         "architectures": ["GemmaForCausalLM"], "head_dim": 256, "hidden_act": "gelu", **NULL,
         "hidden_activation": None, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, **MADE},
        2_506_172_416,
    ),
    "google/gemma-2-2b": (
        {"model_type": "gemma2", **sizes(256_000, 2304, 9216, 26, 8, 4, 8192), **NO, **IDS, **GEMMA,
         "architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": 50.0, **MADE,
         "cache_implementation": "hybrid", "final_logit_softcapping": 30.0,
         "hidden_act": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "rope_theta": 10_000.0,
         "sliding_window": 4096, "sliding_window_size": 4096},
        2_614_341_888,
    ),
    "google/gemma-3-1b-it": (
        {"model_type": "gemma3_text", **sizes(262_144, 1152, 6912, 26, 4, 1, 32_768), **NO, **IDS,
         "architectures": ["Gemma3ForCausalLM"], "attn_logit_softcapping": None, **GEMMA, **NULL,
         "cache_implementation": "hybrid", "final_logit_softcapping": None, **MADE,
         "query_pre_attn_scalar": 256, "rope_local_base_freq": 10_000, "rope_theta": 1_000_000,
         "sliding_window": 512, "sliding_window_pattern": 6},
        999_885_952,
    ),
    "openai-community/gpt2": (
        {"model_type": "gpt2", "activation_function": "gelu_new", "attn_pdrop": 0.1, **IDS,
         "architectures": ["GPT2LMHeadModel"], "embd_pdrop": 0.1, "initializer_range": 0.02,
         "layer_norm_epsilon": 1e-5, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
         "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None,
         "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "vocab_size": 50_257,
         "summary_type": "cls_index", "summary_use_proj": True,
         "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}},
        124_439_808,
    ),
    "facebook/opt-125m": (
        {"model_type": "opt", "_remove_final_layer_norm": False, "activation_dropout": 0.0, **IDS,
         "activation_function": "relu", "architectures": ["OPTForCausalLM"], **MADE,
         "attention_dropout": 0.0, "do_layer_norm_before": True, "dropout": 0.1, "ffn_dim": 3072,
         "hidden_size": 768, "init_std": 0.02, "layerdrop": 0.0, "max_position_embeddings": 2048,
         "num_attention_heads": 12, "num_hidden_layers": 12, "prefix": "</s>",
         "vocab_size": 50_272, "word_embed_proj_dim": 768},
        125_239_296,
    ),
    "microsoft/Phi-3-mini-4k-instruct": (
        {"model_type": "phi3", **sizes(32_064, 3072, 8192, 32, 32, 32, 4096), **NO, **IDS, **NULL,
         "architectures": ["Phi3ForCausalLM"], "embd_pdrop": 0.0, "hidden_act": "silu", **MADE,
         "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "resid_pdrop": 0.0,
         "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
         "sliding_window": 2047, "tie_word_embeddings": False},
        3_821_079_552,
    ),
    "microsoft/Phi-4-mini-instruct": (
        {"model_type": "phi3", **sizes(200_064, 3072, 8192, 32, 24, 8, 131_072), **NO, **IDS,
         "architectures": ["Phi3ForCausalLM"], "embd_pdrop": 0.0, "full_attn_mod": 1, **MADE,
         "hidden_act": "silu", "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False,
         "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75,
         "resid_pdrop": 0.0, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
         "rope_scaling": {"long_factor": LONG, "short_factor": SHORT, "type": "longrope"},
         "sliding_window": 262_144, "tie_word_embeddings": True},
        3_836_021_760,
    ),
    "minimind-3": (
        {"model_type": "minimind", "architectures": ["MiniMindForCausalLM"], "use_moe": False,
         **sizes(6400, 768, 2432, 8, 8, 4, 32_768), "hidden_act": "silu", "dropout": 0.0, **IDS,
         "flash_attn": True, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "head_dim": 96, **NULL,
         "inference_rope_scaling": False, "num_experts": 4, "num_experts_per_tok": 1,
         "moe_intermediate_size": 2432, "norm_topk_prob": True, "router_aux_loss_coef": 5e-4,
         "tie_word_embeddings": True},
        63_912_192,
    ),
    "minimind, first": (
        {"model_type": "minimind", "dim": 512, "n_layers": 2, "n_heads": 8, "n_kv_heads": 2,
         "vocab_size": 6400, "hidden_dim": None, "multiple_of": 64, "norm_eps": 1e-5,
         "max_seq_len": 8192, "rope_theta": 1e6, "dropout": 0.0, "flash_attn": True,
         "use_moe": False, "num_experts_per_tok": 2, "n_routed_experts": 4, "seq_aux": True,
         "n_shared_experts": True, "scoring_func": "softmax", "aux_loss_alpha": 0.1,
         "norm_topk_prob": True},
        8_915_456,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("attributes", "parameters"), PUBLISHED.values(), ids=PUBLISHED.keys())
def test_a_published_config_is_understood(attributes, parameters):
    config = from_attributes(attributes)
    assert sum(map(math.prod, leaf_shapes(config).values())) == parameters
    to_attributes(config, dtype="bfloat16")


def test_which_layers_of_gemma3_look_far():
    config = from_attributes(PUBLISHED["google/gemma-3-1b-it"][0])
    assert [n for n, kind in enumerate(config.kind_of_layer) if kind.window is None] == [
        5,
        11,
        17,
        23,
    ]
    assert {kind.rope.theta for kind in config.kind_of_layer if kind.window} == {10_000}
    assert len(config.layer_kinds) == 6


def test_which_layers_of_smollm3_rotate():
    config = from_attributes(PUBLISHED["HuggingFaceTB/SmolLM3-3B"][0])
    assert [kind.rope is None for kind in config.layer_kinds] == [False, False, False, True]
