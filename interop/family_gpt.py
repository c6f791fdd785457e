"""Decoders with learned positions: rows of `interop.families`."""

from interop.family import Family, activation, eps, head_dim_of, layers_of, tied
from interop.family_keymaps import GPT2, OPT
from interop.hf_attributes import ACTIVATIONS, REQUIRED, Attribute
from interop.hf_layers import never

_GPT2 = Family(
    "GPT2LMHeadModel",
    (
        Attribute("vocab_size", "vocab_size", default=REQUIRED),
        Attribute("n_embd", "hidden_size", default=REQUIRED),
        layers_of("n_layer"),
        Attribute("n_head", "num_heads", default=REQUIRED),
        Attribute("n_inner", "intermediate_size", default=lambda found: 4 * found["n_embd"]),
        Attribute("n_positions", "max_positions", default=1024),
        eps(1e-5, "layer_norm_epsilon"),
        activation("activation_function", "gelu_new")._replace(
            values={"gelu_new": "gelu_tanh", **ACTIVATIONS}
        ),
        tied(True),
    ),
    never(None),
    GPT2,
    form={
        "num_kv_heads": lambda found: found["n_head"],
        "head_dim": lambda found: found["n_embd"] // max(found["n_head"], 1),
        "position_offset": 0,
        "norm.kind": "layer",
        "attention.bias": True,
        "attention.fused": True,
        "mlp.kind": "plain",
        "mlp.bias": True,
    },
    fixed={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False,),
    },
    # dropout is what it was trained with; a frozen base has none
    harmless=frozenset(
        [
            "resid_pdrop",
            "embd_pdrop",
            "attn_pdrop",
            "n_ctx",
            "summary_type",
            "summary_use_proj",
            "summary_activation",
            "summary_proj_to_labels",
            "summary_first_dropout",
        ]
    ),
    prefix="transformer.",
)

_OPT = Family(
    "OPTForCausalLM",
    (
        Attribute("vocab_size", "vocab_size", default=REQUIRED),
        Attribute("hidden_size", "hidden_size", default=REQUIRED),
        Attribute("ffn_dim", "intermediate_size", default=REQUIRED),
        layers_of("num_hidden_layers"),
        Attribute("num_attention_heads", "num_heads", default=REQUIRED),
        Attribute("max_position_embeddings", "max_positions", default=2048),
        activation("activation_function", "relu"),
        Attribute("enable_bias", "attention.bias", (bool,), True),
        tied(True),
    ),
    never(None),
    OPT,
    form={
        "num_kv_heads": lambda found: found["num_attention_heads"],
        "head_dim": head_dim_of,
        "position_offset": 2,
        "norm.kind": "layer",
        "norm.eps": 1e-5,
        "mlp.kind": "plain",
        "mlp.bias": lambda found: found["enable_bias"],
    },
    fixed={
        "do_layer_norm_before": (True,),
        "_remove_final_layer_norm": (False,),
        "layer_norm_elementwise_affine": (True,),
        "word_embed_proj_dim": lambda given: (given.get("hidden_size"),),
    },
    harmless=frozenset(
        ("dropout", "attention_dropout", "activation_dropout", "layerdrop", "init_std")
    ),
    prefix="model.",
)

ROWS: dict[str, Family] = {
    "gpt2": _GPT2,
    "opt": _OPT,
}
