"""Families of causal decoders in Hugging Face's form, one row of a table each.

A row says which attributes of ``config.json`` set which field of `DecoderConfig`, which must have
the value that the decoder implements, which change nothing, what all members have in common, and
how tensors are named. Whatever a row doesn't mention is refused (`interop.hf_config`).

====================  ==========================================================================
``llama``             Llama 1 to 3, SmolLM 1 and 2
``mistral``           one window for all layers
``qwen2``, ``qwen3``  biased q, k and v; normed heads
``smollm3``           layers without rotation
``gemma`` to          scaled embeddings, norms of scale 1 + w; norms after, caps, windows in
``gemma3_text``       alternation; normed heads, two rotations
``gpt2``, ``opt``     learned positions, LayerNorm, plain MLP; GPT-2 fuses q, k and v
``phi3``              fused q, k and v, fused gate and up
``mixtral``,          a mixture of experts in the MLP's place, in Mistral and in Qwen3
``qwen3_moe``
``minimind``          MiniMind since 2026: Qwen3's arithmetic
``minimind_first``    MiniMind before April 2025: Llama with rotated neighbours, names of its own
``minimind_moe``,     the same two with a mixture of experts; the older has one that all meet
``minimind_first_moe``
====================  ==========================================================================
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from interop.family_keymaps import (
    EXPERTS,
    GPT2,
    MINIMIND_EXPERTS,
    MINIMIND_FIRST,
    MINIMIND_FIRST_EXPERTS,
    MIXTRAL_FILES,
    OPT,
    QWEN3_MOE_FILES,
    RELATIVES_OF_LLAMA,
)
from interop.hf_attributes import ACTIVATIONS, NUMBER, REQUIRED, Attribute
from interop.hf_layers import LayerScheme, alternating, always, if_used, late, never, unrotated
from interop.hf_rope import RopeScheme
from interop.keymaps import LLAMA, Keymap, tensor_name
from lora_jax.models.config import DecoderConfig

Found = Mapping[str, Any]
Known = tuple[Any, ...] | Callable[[Found], tuple[Any, ...]]


class Family(NamedTuple):
    """What `interop.hf_config` and `interop.hf` know of a family.

    Attributes:
      architecture: class of the model with its head.
      attributes: which set fields of the config.
      layers: what differs from layer to layer.
      keymap: names of its tensors.
      files: their names in files, where modules in memory have others.
      form: fields that follow from the family: values, or functions of the attributes.
      fixed: attributes that must have one of these values, which may depend on the others'.
      says: attributes that tell it from others of its ``model_type``.
      harmless: attributes that don't change what is computed, besides those of all families.
      prefix: what older files leave out at the beginning of names.
      counterpart: the family whose class in transformers computes it; itself by default.
    """

    architecture: str
    attributes: tuple[Attribute, ...]
    layers: LayerScheme
    keymap: Keymap = RELATIVES_OF_LLAMA
    files: Keymap | None = None
    form: Mapping[str, Any] = {}
    fixed: Mapping[str, Known] = {}
    says: Mapping[str, Any] = {}
    harmless: frozenset[str] = frozenset()
    prefix: str = ""
    counterpart: str | None = None

    @property
    def handled(self) -> tuple[Attribute, ...]:
        """Every attribute that is read."""
        return (*self.attributes, *self.layers.handled)


def _sizes(**defaults: Any) -> tuple[Attribute, ...]:
    """The sizes of most families; one whose default isn't said has to be given."""
    names = {
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "head_dim": "head_dim",
        "max_position_embeddings": "max_positions",
    }
    derived = {
        "num_key_value_heads": lambda found: found["num_attention_heads"],
        "head_dim": _head_dim,
    }
    return tuple(
        Attribute(name, field, default=({**derived, **defaults}).get(name, REQUIRED))
        for name, field in names.items()
    )


def _head_dim(found: Found) -> int:
    return found["hidden_size"] // max(found["num_attention_heads"], 1)


def _activation(name: str, default: str) -> Attribute:
    return Attribute(name, "mlp.activation", (str,), default, ACTIVATIONS)


def _tied(default: bool) -> Attribute:
    return Attribute("tie_word_embeddings", "tie_embeddings", (bool,), default)


def _eps(default: float, name: str = "rms_norm_eps") -> Attribute:
    return Attribute(name, "norm.eps", NUMBER, default)


_SILU = _activation("hidden_act", "silu")
_BIASED = Attribute("attention_bias", "attention.bias", (bool,), False)
_BIASED_MLP = Attribute("mlp_bias", "mlp.bias", (bool,), False)
_NO_DROPOUT: dict[str, Known] = {"attention_dropout": (0.0,)}
_CAUSAL: dict[str, Known] = {**_NO_DROPOUT, "use_bidirectional_attention": (False,)}
_SAYS_NO_WINDOW: dict[str, Known] = {"use_sliding_window": (False,)}

_LLAMA = Family(
    "LlamaForCausalLM",
    (*_sizes(max_position_embeddings=2048), _eps(1e-6), _tied(False), _SILU, _BIASED, _BIASED_MLP),
    never(RopeScheme()),
    LLAMA,
    fixed={
        **_NO_DROPOUT,
        **_SAYS_NO_WINDOW,
        "pretraining_tp": (1,),
        "rope_interleaved": (False,),
        "is_llama_config": (True,),
    },
)

_MISTRAL = Family(
    "MistralForCausalLM",
    (
        *_sizes(num_key_value_heads=8, max_position_embeddings=131_072),
        _eps(1e-6),
        _tied(False),
        _SILU,
    ),
    always(RopeScheme(), window=4096),
    fixed=_NO_DROPOUT,
)

_QWEN2 = Family(
    "Qwen2ForCausalLM",
    (
        *_sizes(num_key_value_heads=32, max_position_embeddings=32_768),
        _eps(1e-6),
        _tied(False),
        _SILU,
    ),
    late(RopeScheme(), window=4096, first=28),
    form={"attention.bias": True, "attention.out_bias": False},
    fixed=_NO_DROPOUT,
)

_QWEN3 = Family(
    "Qwen3ForCausalLM",
    (
        *_sizes(num_key_value_heads=32, head_dim=128, max_position_embeddings=32_768),
        _eps(1e-6),
        _tied(False),
        _SILU,
        _BIASED,
    ),
    late(RopeScheme(), window=4096, first=28),
    form={"norm.heads": True},
    fixed=_NO_DROPOUT,
)

# How the loss is made in training, and whether the router's logits are returned.
_BALANCING = frozenset(("output_router_logits", "router_aux_loss_coef"))

_MIXTRAL = Family(
    "MixtralForCausalLM",
    (
        *_sizes(num_key_value_heads=8, max_position_embeddings=131_072),
        Attribute("num_local_experts", "experts.count", default=8),
        Attribute("num_experts_per_tok", "experts.per_token", default=2),
        _eps(1e-5),
        _tied(False),
        _SILU,
    ),
    always(RopeScheme(1_000_000.0), window=None),
    EXPERTS,
    MIXTRAL_FILES,
    form={
        "experts.width": lambda found: found["intermediate_size"],
        "experts.renormalised": True,
    },
    fixed={**_NO_DROPOUT, "router_jitter_noise": (0.0,)},
    harmless=_BALANCING,
)

_QWEN3_MOE = Family(
    "Qwen3MoeForCausalLM",
    (
        *_sizes(num_key_value_heads=4, max_position_embeddings=32_768),
        # what transformers 5 writes for the next
        Attribute("num_local_experts", None, default=128),
        Attribute("num_experts", "experts.count", default=lambda found: found["num_local_experts"]),
        Attribute("num_experts_per_tok", "experts.per_token", default=8),
        Attribute("moe_intermediate_size", "experts.width", default=768),
        Attribute("norm_topk_prob", "experts.renormalised", (bool,), False),
        _eps(1e-6),
        _tied(False),
        _SILU,
        _BIASED,
    ),
    if_used(RopeScheme(), window=4096),
    EXPERTS,
    QWEN3_MOE_FILES,
    form={"norm.heads": True},
    fixed={
        **_NO_DROPOUT,
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

_SMOLLM3 = Family(
    "SmolLM3ForCausalLM",
    (
        *_sizes(num_key_value_heads=4, max_position_embeddings=32_768),
        _eps(1e-6),
        _tied(True),
        _SILU,
        _BIASED,
        _BIASED_MLP,
    ),
    unrotated(RopeScheme(2_000_000.0), period=4),
    fixed={**_NO_DROPOUT, "pretraining_tp": (1,), "max_window_layers": (0, 28)},
)

_GEMMA_FORM = {"norm.kind": "rms_plus_one", "scale_embeddings": True}
_GEMMA_CAPS = (
    Attribute("query_pre_attn_scalar", "attention.query_scalar", NUMBER, 256),
    Attribute("final_logit_softcapping", "logit_softcap", NUMBER, 30.0, nullable=True),
    Attribute("attn_logit_softcapping", "attention.softcap", NUMBER, 50.0, nullable=True),
)
_GEMMA_HARMLESS = frozenset(("cache_implementation",))

_GEMMA = Family(
    "GemmaForCausalLM",
    (
        *_sizes(num_key_value_heads=16, head_dim=256, max_position_embeddings=8192),
        _eps(1e-6),
        _tied(True),
        # "gelu" in the first files means the approximation
        _activation("hidden_act", "gelu_pytorch_tanh")._replace(
            values={**ACTIVATIONS, "gelu": "gelu_tanh"}
        ),
        _BIASED,
    ),
    never(RopeScheme()),
    form=_GEMMA_FORM,
    fixed={**_CAUSAL, "hidden_activation": ("gelu_pytorch_tanh",)},
    harmless=_GEMMA_HARMLESS,
)

_GEMMA2 = Family(
    "Gemma2ForCausalLM",
    (
        *_sizes(num_key_value_heads=4, head_dim=256, max_position_embeddings=8192),
        _eps(1e-6),
        _tied(True),
        _activation("hidden_activation", "gelu_pytorch_tanh"),
        _BIASED,
        *_GEMMA_CAPS,
    ),
    alternating(RopeScheme(), window=4096, period=2),
    form={**_GEMMA_FORM, "norm.after": True},
    fixed={**_CAUSAL, "hidden_act": ("gelu_pytorch_tanh",)},
    harmless=_GEMMA_HARMLESS,
)

_GEMMA3 = _GEMMA2._replace(
    architecture="Gemma3ForCausalLM",
    attributes=(
        *_sizes(num_key_value_heads=4, head_dim=256, max_position_embeddings=131_072),
        _eps(1e-6),
        _tied(True),
        _activation("hidden_activation", "gelu_pytorch_tanh"),
        _BIASED,
        _GEMMA_CAPS[0],
        _GEMMA_CAPS[1]._replace(default=None),
    ),
    layers=alternating(RopeScheme(1_000_000.0, local_theta=10_000.0), window=4096, period=6),
    form={**_GEMMA_FORM, "norm.after": True, "norm.heads": True},
    fixed={**_GEMMA2.fixed, "attn_logit_softcapping": (None,)},
    harmless=_GEMMA_HARMLESS | {"_sliding_window_pattern"},
)

_PHI3 = Family(
    "Phi3ForCausalLM",
    (
        *_sizes(max_position_embeddings=4096),
        _eps(1e-5),
        _tied(False),
        _SILU,
    ),
    always(
        RopeScheme(original=4096, partial=True, renamed={"su": "longrope", "yarn": "longrope"}),
        window=None,
    ),
    form={"attention.fused": True, "mlp.kind": "fused"},
    fixed={
        **_NO_DROPOUT,
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

_GPT2 = Family(
    "GPT2LMHeadModel",
    (
        Attribute("vocab_size", "vocab_size", default=REQUIRED),
        Attribute("n_embd", "hidden_size", default=REQUIRED),
        Attribute("n_layer", "num_layers", default=REQUIRED),
        Attribute("n_head", "num_heads", default=REQUIRED),
        Attribute("n_inner", "intermediate_size", default=lambda found: 4 * found["n_embd"]),
        Attribute("n_positions", "max_positions", default=1024),
        _eps(1e-5, "layer_norm_epsilon"),
        _activation("activation_function", "gelu_new")._replace(
            values={"gelu_new": "gelu_tanh", **ACTIVATIONS}
        ),
        _tied(True),
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
        Attribute("num_hidden_layers", "num_layers", default=REQUIRED),
        Attribute("num_attention_heads", "num_heads", default=REQUIRED),
        Attribute("max_position_embeddings", "max_positions", default=2048),
        _activation("activation_function", "relu"),
        Attribute("enable_bias", "attention.bias", (bool,), True),
        _tied(True),
    ),
    never(None),
    OPT,
    form={
        "num_kv_heads": lambda found: found["num_attention_heads"],
        "head_dim": _head_dim,
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
        *_sizes(
            vocab_size=6400,
            hidden_size=768,
            intermediate_size=lambda found: math.ceil(found["hidden_size"] * math.pi / 64) * 64,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=32_768,
        ),
        _eps(1e-6),
        _tied(True),
        _SILU,
    ),
    never(RopeScheme(1_000_000.0)),
    form={"norm.heads": True},
    fixed={
        "use_moe": (False,),
        "dropout": (0.0,),
        "inference_rope_scaling": lambda given: ("rope_scaling" in given,),
    },
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
        Attribute("multiple_of", None, default=64),
        Attribute("hidden_dim", "intermediate_size", default=_multiple_of_64),
        Attribute("n_layers", "num_layers", default=8),
        Attribute("n_heads", "num_heads", default=8),
        Attribute("n_kv_heads", "num_kv_heads", default=2),
        Attribute("max_seq_len", "max_positions", default=8192),
        _eps(1e-5, "norm_eps"),
        _tied(True),
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
        "experts.shared_width": lambda found: (
            0 if found["n_shared_experts"] is None else found["hidden_dim"]
        ),
    },
    fixed={"use_moe": (True,), "dropout": (0.0,), "scoring_func": ("softmax",)},
    says={"use_moe": True},
    harmless=frozenset(("aux_loss_alpha", "seq_aux", "flash_attn", "auto_map")),
    counterpart=None,
)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
    "mixtral": _MIXTRAL,
    "qwen3_moe": _QWEN3_MOE,
    "smollm3": _SMOLLM3,
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "gpt2": _GPT2,
    "opt": _OPT,
    "phi3": _PHI3,
    "minimind": _MINIMIND,
    "minimind_first": _MINIMIND_FIRST,
    "minimind_moe": _MINIMIND_WITH_EXPERTS,
    "minimind_first_moe": _MINIMIND_FIRST_WITH_EXPERTS,
}
"""By name: ``model_type``, except that all of MiniMind share theirs."""


def family_of(config: DecoderConfig) -> Family:
    """The row of a config's family."""
    return FAMILIES[config.family]


def keymap_of(config: DecoderConfig) -> Keymap:
    """How the tensors of a config's model are named, as modules in memory.

    >>> from lora_jax.models.presets import TINY
    >>> keymap_of(TINY) is LLAMA
    True
    """
    return family_of(config).keymap


def file_keymap(config: DecoderConfig, names: Collection[str] = ()) -> Keymap:
    """How the tensors of a config's files are named; if ``names`` are those of modules, that.

    >>> from lora_jax.models.presets import TINY
    >>> file_keymap(TINY) is keymap_of(TINY)
    True
    """
    family = family_of(config)
    if family.files is None:
        return family.keymap
    first = {tensor_name(rule, (0,) * rule.stack) for rule in family.keymap.rules}
    own = first - {tensor_name(rule, (0,) * rule.stack) for rule in family.files.rules}
    return family.keymap if own & set(names) else family.files


def family_name(attributes: Found) -> str:
    """The family that a ``config.json`` names; ``llama`` where it names none.

    >>> family_name({"model_type": "minimind", "dim": 512})
    'minimind_first'
    """
    named = attributes.get("model_type") or "llama"
    if named != "minimind":
        return named
    first, experts = "_first" * ("dim" in attributes), "_moe" * (attributes.get("use_moe") is True)
    return f"minimind{first}{experts}"


def model_type(name: str) -> str:
    """What ``config.json`` calls the family."""
    return "minimind" if name.startswith("minimind") else name
