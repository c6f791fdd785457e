"""Gemma's generations: rows of `interop.families`."""

from interop.family import BIASED, CAUSAL, Family, Known, activation, eps, sizes, tied
from interop.hf_attributes import ACTIVATIONS, NUMBER, Attribute
from interop.hf_layers import alternating, never
from interop.hf_rope import RopeScheme

_GEMMA_FORM = {"norm.kind": "rms_plus_one", "scale_embeddings": True}
_GEMMA_CAPS = (
    Attribute("query_pre_attn_scalar", "attention.query_scalar", NUMBER, 256, above=0),
    Attribute("final_logit_softcapping", "logit_softcap", NUMBER, 30.0, nullable=True, above=0),
    Attribute("attn_logit_softcapping", "attention.softcap", NUMBER, 50.0, nullable=True, above=0),
)
_GEMMA_LATER: dict[str, Known] = {**CAUSAL, "hidden_act": ("gelu_pytorch_tanh",)}
_GEMMA_HARMLESS = frozenset(("cache_implementation",))

_GEMMA = Family(
    "GemmaForCausalLM",
    (
        *sizes(num_key_value_heads=16, head_dim=256, max_position_embeddings=8192),
        eps(1e-6),
        tied(True),
        # "gelu" in the first files means the approximation
        activation("hidden_act", "gelu_pytorch_tanh")._replace(
            values={**ACTIVATIONS, "gelu": "gelu_tanh"}
        ),
        BIASED,
    ),
    never(RopeScheme()),
    form=_GEMMA_FORM,
    fixed={**CAUSAL, "hidden_activation": ("gelu_pytorch_tanh",)},
    harmless=_GEMMA_HARMLESS,
)

_GEMMA2 = Family(
    "Gemma2ForCausalLM",
    (
        *sizes(num_key_value_heads=4, head_dim=256, max_position_embeddings=8192),
        eps(1e-6),
        tied(True),
        activation("hidden_activation", "gelu_pytorch_tanh"),
        BIASED,
        *_GEMMA_CAPS,
    ),
    alternating(RopeScheme(), window=4096, period=2),
    form={**_GEMMA_FORM, "norm.after": True},
    fixed={
        **_GEMMA_LATER,
        "sliding_window_pattern": (2,),
        "sliding_window_size": lambda given: (given.get("sliding_window", 4096),),
    },
    harmless=_GEMMA_HARMLESS,
)

_GEMMA3 = _GEMMA2._replace(
    architecture="Gemma3ForCausalLM",
    attributes=(
        *sizes(num_key_value_heads=4, head_dim=256, max_position_embeddings=131_072),
        eps(1e-6),
        tied(True),
        activation("hidden_activation", "gelu_pytorch_tanh"),
        BIASED,
        _GEMMA_CAPS[0],
        _GEMMA_CAPS[1]._replace(default=None),
    ),
    layers=alternating(
        RopeScheme(1_000_000.0, local_theta=10_000.0), window=4096, period=6, said=True
    ),
    form={**_GEMMA_FORM, "norm.after": True, "norm.heads": True},
    fixed={**_GEMMA_LATER, "attn_logit_softcapping": (None,)},
    harmless=_GEMMA_HARMLESS | {"_sliding_window_pattern"},
)

ROWS: dict[str, Family] = {
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
}
