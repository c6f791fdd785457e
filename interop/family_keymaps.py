"""Names of the tensors of families that have more than Llama, or other names."""

import re
from collections.abc import Iterable

from interop.keymaps import LLAMA, Keymap, Rule, rules_of

_LAYER = "model.layers.{i}"
RELATIVES_OF_LLAMA = LLAMA._replace(
    rules=(
        *LLAMA.rules,
        *rules_of(
            (
                ("layers/self_attn/q_norm", f"{_LAYER}.self_attn.q_norm", "norm"),
                ("layers/self_attn/k_norm", f"{_LAYER}.self_attn.k_norm", "norm"),
                ("layers/self_attn/qkv_proj", f"{_LAYER}.self_attn.qkv_proj", "linear"),
                ("layers/mlp/gate_up_proj", f"{_LAYER}.mlp.gate_up_proj", "linear"),
                *(
                    (f"layers/{norm}", f"{_LAYER}.{norm}", "norm")
                    for norm in ("pre_feedforward_layernorm", "post_feedforward_layernorm")
                ),
            )
        ),
    )
)

# A mixture of experts: fused in transformers' modules, one tensor for each expert in files.
_ROUTER = Rule("layers/mlp/gate/kernel", f"{_LAYER}.mlp.gate.weight", (1, 0), "parameter")
_DENSE_MLP = re.compile(r"layers/mlp/.*")
_FUSED = tuple(
    Rule(f"layers/mlp/experts/{name}", f"{_LAYER}.mlp.experts.{name}", (0, 2, 1), "parameter")
    for name in ("gate_up_proj", "down_proj")
)


def _with_experts(base: Keymap, router: Rule, experts: Iterable[Rule]) -> Keymap:
    """The table with a mixture of experts in the place of the MLP."""
    kept = (rule for rule in base.rules if not _DENSE_MLP.fullmatch(rule.path))
    return base._replace(rules=(*kept, router, *experts))


def _expert_files(expert: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """Rules of files that hold every expert's three projections by themselves."""
    fused, names = "layers/mlp/experts/gate_up_proj", f"{expert}.{{}}.weight"
    return (
        Rule(fused, names.replace("{}", gate), (1, 0), "linear", (0, 2)),
        Rule(fused, names.replace("{}", up), (1, 0), "linear", (1, 2)),
        Rule("layers/mlp/experts/down_proj", names.replace("{}", down), (1, 0), "linear"),
    )


EXPERTS = _with_experts(RELATIVES_OF_LLAMA, _ROUTER, _FUSED)
"""Mixtral and Qwen3-MoE as modules of transformers 5."""
_QWEN3_EXPERT = _expert_files(f"{_LAYER}.mlp.experts.{{e}}", "gate_proj", "up_proj", "down_proj")
QWEN3_MOE_FILES = _with_experts(RELATIVES_OF_LLAMA, _ROUTER, _QWEN3_EXPERT)
MINIMIND_EXPERTS = _with_experts(RELATIVES_OF_LLAMA, _ROUTER._replace(kind="linear"), _QWEN3_EXPERT)
MIXTRAL_FILES = _with_experts(
    RELATIVES_OF_LLAMA,
    _ROUTER._replace(name=f"{_LAYER}.block_sparse_moe.gate.weight"),
    _expert_files(f"{_LAYER}.block_sparse_moe.experts.{{e}}", "w1", "w3", "w2"),
)

GPT2 = Keymap(
    rules_of(
        (
            ("embed_tokens", "transformer.wte", "embedding"),
            ("embed_positions", "transformer.wpe", "embedding"),
            ("layers/input_layernorm", "transformer.h.{i}.ln_1", "layer_norm"),
            ("layers/self_attn/qkv_proj", "transformer.h.{i}.attn.c_attn", "conv1d"),
            ("layers/self_attn/o_proj", "transformer.h.{i}.attn.c_proj", "conv1d"),
            ("layers/post_attention_layernorm", "transformer.h.{i}.ln_2", "layer_norm"),
            ("layers/mlp/up_proj", "transformer.h.{i}.mlp.c_fc", "conv1d"),
            ("layers/mlp/down_proj", "transformer.h.{i}.mlp.c_proj", "conv1d"),
            ("norm", "transformer.ln_f", "layer_norm"),
            ("lm_head", "lm_head", "linear"),
        )
    ),
    ignored=(r"transformer\.h\.\d+\.attn\.(masked_)?bias",),
    copies={"lm_head.weight": "transformer.wte.weight"},
)

_OPT_LAYER = "model.decoder.layers.{i}"
OPT = Keymap(
    rules_of(
        (
            ("embed_tokens", "model.decoder.embed_tokens", "embedding"),
            # Looked up by a mask, which PEFT's layers take for tokens.
            ("embed_positions", "model.decoder.embed_positions", "table"),
            ("layers/input_layernorm", f"{_OPT_LAYER}.self_attn_layer_norm", "layer_norm"),
            ("layers/self_attn/q_proj", f"{_OPT_LAYER}.self_attn.q_proj", "linear"),
            ("layers/self_attn/k_proj", f"{_OPT_LAYER}.self_attn.k_proj", "linear"),
            ("layers/self_attn/v_proj", f"{_OPT_LAYER}.self_attn.v_proj", "linear"),
            ("layers/self_attn/o_proj", f"{_OPT_LAYER}.self_attn.out_proj", "linear"),
            ("layers/post_attention_layernorm", f"{_OPT_LAYER}.final_layer_norm", "layer_norm"),
            ("layers/mlp/up_proj", f"{_OPT_LAYER}.fc1", "linear"),
            ("layers/mlp/down_proj", f"{_OPT_LAYER}.fc2", "linear"),
            ("norm", "model.decoder.final_layer_norm", "layer_norm"),
            ("lm_head", "lm_head", "linear"),
        )
    ),
    copies={"lm_head.weight": "model.decoder.embed_tokens.weight"},
)

MINIMIND_FIRST = Keymap(
    rules_of(
        (
            ("embed_tokens", "tok_embeddings", "embedding"),
            ("layers/input_layernorm", "layers.{i}.attention_norm", "norm"),
            ("layers/self_attn/q_proj", "layers.{i}.attention.wq", "linear"),
            ("layers/self_attn/k_proj", "layers.{i}.attention.wk", "linear"),
            ("layers/self_attn/v_proj", "layers.{i}.attention.wv", "linear"),
            ("layers/self_attn/o_proj", "layers.{i}.attention.wo", "linear"),
            ("layers/post_attention_layernorm", "layers.{i}.ffn_norm", "norm"),
            ("layers/mlp/gate_proj", "layers.{i}.feed_forward.w1", "linear"),
            ("layers/mlp/up_proj", "layers.{i}.feed_forward.w3", "linear"),
            ("layers/mlp/down_proj", "layers.{i}.feed_forward.w2", "linear"),
            ("norm", "norm", "norm"),
            ("lm_head", "output", "linear"),
        )
    ),
    ignored=("pos_cis",),
    copies={"output.weight": "tok_embeddings.weight"},
)

_EXPERT = "layers.{i}.feed_forward"
MINIMIND_FIRST_EXPERTS = _with_experts(
    MINIMIND_FIRST,
    _ROUTER._replace(name=f"{_EXPERT}.gate.weight"),
    (
        *_expert_files(f"{_EXPERT}.experts.{{e}}", "w1", "w3", "w2"),
        *rules_of(
            (f"layers/mlp/shared_expert/{ours}", f"{_EXPERT}.shared_experts.{theirs}", "linear")
            for ours, theirs in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))
        ),
    ),
)
