"""MiniMind's generations, dense and with experts: rows of `interop.families`."""

import math

from interop.family import SILU, Family, Found, eps, layers_of, sizes, tied
from interop.family_keymaps import MINIMIND_EXPERTS, MINIMIND_FIRST, MINIMIND_FIRST_EXPERTS
from interop.hf_attributes import Attribute
from interop.hf_layers import never, never_unless_said
from interop.hf_rope import RopeScheme

_MINIMIND_HARMLESS = frozenset(
    # of experts, which use_moe has; of kernels; of code that isn't run
    [
        "num_experts",
        "num_experts_per_tok",
        "n_routed_experts",
        "n_shared_experts",
        "scoring_func",
        "seq_aux",
        "aux_loss_alpha",
        "norm_topk_prob",
        "moe_intermediate_size",
        "router_aux_loss_coef",
        "flash_attn",
        "auto_map",
    ]
)

_MINIMIND = Family(
    "MiniMindForCausalLM",
    (
        *sizes(
            vocab_size=6400,
            hidden_size=768,
            intermediate_size=lambda found: math.ceil(found["hidden_size"] * math.pi / 64) * 64,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=32_768,
        ),
        eps(1e-6),
        tied(True),
        SILU,
    ),
    never_unless_said(RopeScheme(1_000_000.0)),
    form={"norm.heads": True},
    fixed={"use_moe": (False,), "dropout": (0.0,)},
    harmless=_MINIMIND_HARMLESS,
    counterpart="qwen3",
)


def _multiple_of_64(found: Found) -> int:
    exact, step = int(2 * (4 * found["dim"]) / 3), found["multiple_of"]
    return step * -(-exact // step)


_MINIMIND_WITH_EXPERTS = _MINIMIND._replace(
    attributes=(
        *_MINIMIND.attributes,
        Attribute("num_experts", "experts.count", default=4),
        Attribute("num_experts_per_tok", "experts.per_token", default=1),
        Attribute(
            "moe_intermediate_size",
            "experts.width",
            default=lambda found: found["intermediate_size"],
        ),
        Attribute("norm_topk_prob", "experts.renormalised", (bool,), True),
    ),
    keymap=MINIMIND_EXPERTS,
    fixed={**_MINIMIND.fixed, "use_moe": (True,)},
    says={"use_moe": True},
    harmless=frozenset(("router_aux_loss_coef", "flash_attn", "auto_map")),
    counterpart="qwen3_moe",
)

_MINIMIND_FIRST = Family(
    "MiniMindLM",
    (
        Attribute("vocab_size", "vocab_size", default=6400),
        Attribute("dim", "hidden_size", default=512),
        Attribute("multiple_of", None, default=64, above=0),
        Attribute("hidden_dim", "intermediate_size", default=_multiple_of_64),
        layers_of("n_layers", 8),
        Attribute("n_heads", "num_heads", default=8),
        Attribute("n_kv_heads", "num_kv_heads", default=2, null=lambda found: found["n_heads"]),
        Attribute("max_seq_len", "max_positions", default=8192),
        eps(1e-5, "norm_eps"),
        tied(True),
    ),
    never(RopeScheme(1_000_000.0)),
    MINIMIND_FIRST,
    form={
        "head_dim": lambda found: found["dim"] // max(found["n_heads"], 1),
        "rope_interleaved": True,
    },
    fixed={"use_moe": (False,), "dropout": (0.0,)},
    harmless=_MINIMIND_HARMLESS,
    counterpart="llama",
)

_MINIMIND_FIRST_WITH_EXPERTS = _MINIMIND_FIRST._replace(
    attributes=(
        *_MINIMIND_FIRST.attributes,
        Attribute("n_routed_experts", "experts.count", default=4),
        Attribute("num_experts_per_tok", "experts.per_token", default=2),
        Attribute("norm_topk_prob", "experts.renormalised", (bool,), True),
        # whatever it is, False included, there is one; null: there is none
        Attribute("n_shared_experts", None, (bool, int), True, nullable=True),
    ),
    keymap=MINIMIND_FIRST_EXPERTS,
    form={
        **_MINIMIND_FIRST.form,
        "experts.width": lambda found: found["hidden_dim"],
        # a token's only expert keeps its probability
        "experts.renormalised": lambda found: (
            found["norm_topk_prob"] and found["num_experts_per_tok"] > 1
        ),
        "experts.shared_width": lambda found: (
            0 if found["n_shared_experts"] is None else found["hidden_dim"]
        ),
    },
    fixed={"use_moe": (True,), "dropout": (0.0,), "scoring_func": ("softmax",)},
    says={"use_moe": True},
    harmless=frozenset(("aux_loss_alpha", "seq_aux", "flash_attn", "auto_map")),
    counterpart=None,
)

ROWS: dict[str, Family] = {
    "minimind": _MINIMIND,
    "minimind_first": _MINIMIND_FIRST,
    "minimind_moe": _MINIMIND_WITH_EXPERTS,
    "minimind_first_moe": _MINIMIND_FIRST_WITH_EXPERTS,
}
