"""Mixtures of experts: rows of `interop.families`."""

from interop.family import BIASED, NO_DROPOUT, SILU, Family, eps, sizes, tied
from interop.family_keymaps import EXPERTS, MIXTRAL_FILES, QWEN3_MOE_FILES
from interop.hf_attributes import Attribute
from interop.hf_layers import always, if_used
from interop.hf_rope import RopeScheme

# How the loss is made in training, and whether the router's logits are returned.
_BALANCING = frozenset(("output_router_logits", "router_aux_loss_coef"))

_MIXTRAL = Family(
    "MixtralForCausalLM",
    (
        *sizes(num_key_value_heads=8, max_position_embeddings=131_072),
        Attribute("num_local_experts", "experts.count", default=8),
        Attribute("num_experts_per_tok", "experts.per_token", default=2),
        eps(1e-5),
        tied(False),
        SILU,
    ),
    always(RopeScheme(1_000_000.0), window=None),
    EXPERTS,
    MIXTRAL_FILES,
    form={
        "experts.width": lambda found: found["intermediate_size"],
        "experts.renormalised": True,
    },
    fixed={**NO_DROPOUT, "router_jitter_noise": (0.0,)},
    harmless=_BALANCING,
)

_QWEN3_MOE = Family(
    "Qwen3MoeForCausalLM",
    (
        *sizes(num_key_value_heads=4, max_position_embeddings=32_768),
        # what transformers 5 writes for the next
        Attribute("num_local_experts", None, default=128),
        Attribute("num_experts", "experts.count", default=lambda found: found["num_local_experts"]),
        Attribute("num_experts_per_tok", "experts.per_token", default=8),
        Attribute("moe_intermediate_size", "experts.width", default=768),
        Attribute("norm_topk_prob", "experts.renormalised", (bool,), False),
        eps(1e-6),
        tied(False),
        SILU,
        BIASED,
    ),
    if_used(RopeScheme(), window=4096),
    EXPERTS,
    QWEN3_MOE_FILES,
    form={"norm.heads": True},
    fixed={
        **NO_DROPOUT,
        "mlp_only_layers": ([],),
        "decoder_sparse_step": (1,),
        "num_local_experts": lambda given: (
            given.get("num_experts", given.get("num_local_experts")),
        ),
        "max_window_layers": lambda given: (
            (0 if given.get("use_sliding_window") else given.get("max_window_layers"),)
        ),
    },
    harmless=_BALANCING,
)

ROWS: dict[str, Family] = {
    "mixtral": _MIXTRAL,
    "qwen3_moe": _QWEN3_MOE,
}
