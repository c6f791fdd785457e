"""Llama and its nearest relatives, without experts: rows of `interop.families`."""

from interop.family import (
    BIASED,
    BIASED_MLP,
    NO_DROPOUT,
    SAYS_NO_WINDOW,
    SILU,
    Family,
    eps,
    sizes,
    tied,
)
from interop.hf_layers import always, late, never, unrotated
from interop.hf_rope import RopeScheme
from interop.keymaps import LLAMA

_LLAMA = Family(
    "LlamaForCausalLM",
    (*sizes(max_position_embeddings=2048), eps(1e-6), tied(False), SILU, BIASED, BIASED_MLP),
    never(RopeScheme()),
    LLAMA,
    fixed={
        **NO_DROPOUT,
        **SAYS_NO_WINDOW,
        "pretraining_tp": (1,),
        "rope_interleaved": (False,),
        "is_llama_config": (True,),
    },
    harmless=frozenset(("max_sequence_length",)),  # of Llama 1
)

_MISTRAL = Family(
    "MistralForCausalLM",
    (
        *sizes(num_key_value_heads=8, max_position_embeddings=131_072),
        eps(1e-6),
        tied(False),
        SILU,
    ),
    always(RopeScheme(), window=4096),
    fixed=NO_DROPOUT,
)

_QWEN2 = Family(
    "Qwen2ForCausalLM",
    (
        *sizes(num_key_value_heads=32, max_position_embeddings=32_768),
        eps(1e-6),
        tied(False),
        SILU,
    ),
    late(RopeScheme(), window=4096, first=28),
    form={"attention.bias": True, "attention.out_bias": False},
    fixed={**NO_DROPOUT, "use_mrope": (False,)},
)

_QWEN3 = Family(
    "Qwen3ForCausalLM",
    (
        *sizes(num_key_value_heads=32, head_dim=128, max_position_embeddings=32_768),
        eps(1e-6),
        tied(False),
        SILU,
        BIASED,
    ),
    late(RopeScheme(), window=4096, first=28),
    form={"norm.heads": True},
    fixed=NO_DROPOUT,
)

_SMOLLM3 = Family(
    "SmolLM3ForCausalLM",
    (
        *sizes(num_key_value_heads=4, max_position_embeddings=32_768),
        eps(1e-6),
        tied(True),
        SILU,
        BIASED,
        BIASED_MLP,
    ),
    unrotated(RopeScheme(2_000_000.0), period=4),
    fixed=NO_DROPOUT,
    harmless=frozenset(("pretraining_tp", "max_window_layers")),
)

_PHI3 = Family(
    "Phi3ForCausalLM",
    (
        *sizes(max_position_embeddings=4096),
        eps(1e-5),
        tied(False),
        SILU,
    ),
    always(
        RopeScheme(original=4096, partial=True, renamed={"su": "longrope", "yarn": "longrope"}),
        window=None,
    ),
    form={"attention.fused": True, "mlp.kind": "fused"},
    fixed={
        **NO_DROPOUT,
        "resid_pdrop": (0.0,),
        "embd_pdrop": (0.0,),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "lm_head_bias": (False,),
        "full_attn_mod": (1,),
        "interpolate_factor": (1,),
    },
    harmless=frozenset(("auto_map",)),  # to a copy of what transformers has
)

ROWS: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
    "smollm3": _SMOLLM3,
    "phi3": _PHI3,
}
