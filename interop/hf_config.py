"""config.json of the Llama family <-> DecoderConfig, by tables.

What the decoder implements, what can't change what it computes, and refusal of the rest.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.errors import InputError
from lora_jax.files import read_json
from lora_jax.models.config import DecoderConfig


class _Attribute(NamedTuple):
    """An attribute, the field it sets, and the value it has where none is given."""

    name: str
    field: str
    kinds: tuple[type, ...] = (int,)
    default: Any = None


_NUMBER = (int, float)
_REQUIRED = (
    _Attribute("vocab_size", "vocab_size"),
    _Attribute("hidden_size", "hidden_size"),
    _Attribute("intermediate_size", "intermediate_size"),
    _Attribute("num_hidden_layers", "num_layers"),
    _Attribute("num_attention_heads", "num_heads"),
)
_OPTIONAL = (
    _Attribute("max_position_embeddings", "max_positions", default=2048),
    _Attribute("rms_norm_eps", "rms_norm_eps", _NUMBER, 1e-6),
    _Attribute("tie_word_embeddings", "tie_embeddings", (bool,), False),
    _Attribute("attention_bias", "attention_bias", (bool,), False),
    _Attribute("mlp_bias", "mlp_bias", (bool,), False),
)
# Not given, these follow from the number of heads.
_DERIVED = (
    _Attribute("num_key_value_heads", "num_kv_heads"),
    _Attribute("head_dim", "head_dim"),
)
_HANDLED = (*_REQUIRED, *_OPTIONAL, *_DERIVED)
_DTYPES = ("dtype", "torch_dtype")
_ROPE_GROUPS = ("rope_parameters", "rope_scaling")
_DEFAULT_ROPE_THETA = 10_000.0
_KINDS: dict[str, tuple[type, ...]] = {
    **{attribute.name: attribute.kinds for attribute in _HANDLED},
    **dict.fromkeys(_DTYPES, (str,)),
    **dict.fromkeys(_ROPE_GROUPS, (dict,)),
    "rope_theta": _NUMBER,
}

# Attributes that ask for something the decoder doesn't do, unless they have one of these values.
_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "architectures": (["LlamaForCausalLM"],),
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0.0,),
    "pretraining_tp": (1,),
    "partial_rotary_factor": (1.0,),
    "rope_interleaved": (False,),
    "is_llama_config": (True,),
    "use_sliding_window": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "chunk_size_feed_forward": (0,),
}
# The same inside rope_parameters and rope_scaling.
_FIXED_ROPE = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}

# Attributes that don't change what the model computes.
# fmt: off
_HARMLESS = frozenset((
    # provenance
    "_name_or_path", "_commit_hash", "transformers_version", "transformers.js_config",
    "unsloth_fixed", "unsloth_version", "finetuning_task",
    # token ids, which the tokenizer's files repeat
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id",
    "decoder_start_token_id", "tokenizer_class", "prefix",
    # how weights were made, what is returned, how it is run
    "initializer_range", "use_cache", "output_attentions", "output_hidden_states", "return_dict",
    "torchscript", "use_bfloat16", "is_decoder", "tie_encoder_decoder", "_attn_implementation",
    "_attn_implementation_autoset",
    # defaults for sampling
    "do_sample", "temperature", "top_k", "top_p", "typical_p", "min_length", "max_length",
    "max_new_tokens", "num_beams", "num_beam_groups", "num_return_sequences", "early_stopping",
    "repetition_penalty", "length_penalty", "diversity_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "output_scores", "return_dict_in_generate",
    "remove_invalid_values",
    # labels of classifiers
    "id2label", "label2id", "num_labels", "problem_type", "task_specific_params",
))
# fmt: on
_KNOWN = frozenset((*_KINDS, *_FIXED, *_HARMLESS))


def read_config(directory: str | Path, *, dtype: str | None = None) -> DecoderConfig:
    """The decoder that a directory's ``config.json`` describes.

    An attribute that is null counts as not given; one that isn't given has the value it has in
    ``transformers.LlamaConfig``.

    Args:
      directory: holds ``config.json``.
      dtype: compute dtype; by default the one in the file, and ``float32`` where there is none.

    Raises:
      InputError: no ``config.json``, or attributes that aren't implemented, each named with its
        value.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise InputError(
            f"{directory} is not a model directory: it holds no config.json "
            "(expected config.json, tokenizer.json and *.safetensors)"
        )
    attributes = {name: value for name, value in read_json(path).items() if value is not None}
    if faults := _faults(attributes):
        raise InputError(f"{path}: not implemented: {'; '.join(faults)}")
    fields = {a.field: attributes.get(a.name, a.default) for a in (*_REQUIRED, *_OPTIONAL)}
    heads = fields["num_heads"]
    fields |= {"num_kv_heads": heads, "head_dim": fields["hidden_size"] // max(heads, 1)}
    fields |= {a.field: attributes[a.name] for a in _DERIVED if a.name in attributes}
    fields["rope_theta"] = float(next(iter(_rope_thetas(attributes)), _DEFAULT_ROPE_THETA))
    fields["dtype"] = dtype or next((attributes[n] for n in _DTYPES if n in attributes), "float32")
    try:
        return DecoderConfig(**fields)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def to_attributes(config: DecoderConfig, *, dtype: str) -> dict[str, Any]:
    """The content of ``config.json``, for transformers 5 (``rope_parameters``) and 4.

    The token ids are null; what is not written here doesn't apply.

    Args:
      config: the decoder.
      dtype: dtype of the weights that the file goes with.

    Raises:
      InputError: interleaved rotations, which Hugging Face's Llama doesn't have.

    >>> from lora_jax.models.presets import PRESETS
    >>> to_attributes(PRESETS["tiny"], dtype="bfloat16")["num_key_value_heads"]
    2
    """
    if config.rope_interleaved:
        raise InputError(
            "rope_interleaved=True has no counterpart in Hugging Face's Llama: "
            "bring the rows of q and k into the order of rotated halves first"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{attribute.name: getattr(config, attribute.field) for attribute in _HANDLED},
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def _faults(attributes: Mapping[str, Any]) -> list[str]:
    """What keeps the decoder from computing what ``attributes`` describe."""
    mistyped = [
        n for n, kinds in _KINDS.items() if type(attributes.get(n, kinds[0]())) not in kinds
    ]
    other = [n for n, known in _FIXED.items() if attributes.get(n, known[0]) not in known]
    groups = [
        n for n in _ROPE_GROUPS if n not in mistyped and _rotates_otherwise(attributes.get(n))
    ]
    reasons = {
        **{name: f"expected {_KINDS[name][-1].__name__}" for name in mistyped},
        **{name: f"known: {', '.join(map(repr, _FIXED[name]))}" for name in other},
        **dict.fromkeys(groups, "known: plain rotations"),
        **{name: "unknown attribute" for name in attributes if name not in _KNOWN},
    }
    missing = [f"{a.name} is missing" for a in _REQUIRED if a.name not in attributes]
    faults = [f"{name}={attributes[name]!r} ({reason})" for name, reason in reasons.items()]
    thetas = _rope_thetas(attributes) if not mistyped else set()
    conflict = [f"rope_theta is {' and '.join(map(str, thetas))}"] if len(thetas) > 1 else []
    return missing + faults + conflict


def _rope_thetas(attributes: Mapping[str, Any]) -> set[float]:
    """The rotary base, which each version of transformers keeps elsewhere."""
    places = [attributes, *(attributes.get(name, {}) for name in _ROPE_GROUPS)]
    return {place["rope_theta"] for place in places if place.get("rope_theta") is not None}


def _rotates_otherwise(group: Mapping[str, Any] | None) -> bool:
    settings = {key: value for key, value in (group or {}).items() if key != "rope_theta"}
    return any(value != _FIXED_ROPE.get(key) for key, value in settings.items())
