"""config.json <-> DecoderConfig, by the tables of `interop.families`.

What the decoder implements, what can't change what it computes, and refusal of the rest.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from interop.families import FAMILIES, Family, family_name, family_of, model_type
from interop.hf_attributes import (
    HARMLESS,
    described_in,
    faults,
    other_faults,
    resolved,
    stored_dtype,
)
from interop.hf_layers import layer_attributes, layer_faults, layer_kinds
from lora_jax.errors import InputError
from lora_jax.models.config import DecoderConfig
from lora_jax.models.forms import AttentionForm, ExpertsForm, MLPForm, NormForm

_FORMS = {"norm": NormForm, "attention": AttentionForm, "mlp": MLPForm, "experts": ExpertsForm}
_HOW_IT_RUNS = ("dtype", "remat", "scan_unroll", "expert_products")

# Of every family: what asks for something the decoder doesn't do, unless it has this value.
_FIXED: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "chunk_size_feed_forward": (0,),
}


def read_config(directory: str | Path, *, dtype: str | None = None) -> DecoderConfig:
    """The decoder that a directory's ``config.json`` describes.

    Args:
      directory: holds ``config.json``.
      dtype: compute dtype; by default the one in the file, and ``float32`` where there is none.

    Raises:
      InputError: no ``config.json``, or attributes that aren't implemented, each named with its
        value.
    """
    return described_in(directory, partial(from_attributes, dtype=dtype))


def from_attributes(attributes: Mapping[str, Any], *, dtype: str | None = None) -> DecoderConfig:
    """The decoder that the content of a ``config.json`` describes.

    An attribute that isn't given has the value it has in the family's config class of
    ``transformers``. A null counts as not given, except where it says that there is none, as of
    windows and caps.

    Args:
      attributes: by name.
      dtype: compute dtype; by default the one given, and ``float32`` where there is none.

    Raises:
      InputError: attributes that aren't implemented, each named with its value.

    >>> sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96,
    ...          "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    >>> from_attributes({"model_type": "qwen2", **sizes}).attention.bias
    True
    """
    name = family_name(attributes)
    family = FAMILIES.get(name) if type(name) is str else None
    if family is None:
        raise InputError(f"not implemented: model_type={name!r} (known: {', '.join(FAMILIES)})")
    given = {key: value for key, value in attributes.items() if value is not None}
    wrong = [*faults(family.handled, given), *_other_faults(family, given)]
    if _readable(family, given):
        fields, found = _fields(family, attributes)
        wrong += layer_faults(family.layers, given, found)
    if wrong:
        raise InputError(f"not implemented: {'; '.join(wrong)}")
    kinds = layer_kinds(family.layers, given, found)
    return _built(
        {**fields, "layer_kinds": kinds, "family": name, "dtype": dtype or stored_dtype(given)}
    )


def _readable(family: Family, given: Mapping[str, Any]) -> bool:
    """Whether attributes are there and of their types, so that more can be asked of them."""
    return not faults(family.handled, given)


def _fields(family: Family, attributes: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields that single attributes and the family set, and what they were found from."""
    found = resolved(family.handled, attributes)
    fields = {a.field: a.to_field(found[a.name]) for a in family.attributes if a.field}
    fields |= {key: v(found) if callable(v) else v for key, v in family.form.items()}
    found |= {
        "num_hidden_layers": fields["num_layers"],
        "max_position_embeddings": fields["max_positions"],
    }
    return fields, found


def to_attributes(config: DecoderConfig, *, dtype: str) -> dict[str, Any]:
    """The content of ``config.json``, for transformers 5 (``rope_parameters``) and 4.

    The token ids are null; what is not written here doesn't apply.

    Args:
      config: the decoder.
      dtype: dtype of the weights that the file goes with.

    Raises:
      InputError: what the family's attributes can't say.

    >>> from lora_jax.models.presets import PRESETS
    >>> to_attributes(PRESETS["tiny"], dtype="bfloat16")["num_key_value_heads"]
    2
    """
    family = family_of(config)
    routed = any((a.field or "").startswith("experts.") for a in family.attributes)
    if routed and config.experts is None:
        raise InputError(f"experts=None has no counterpart in a config.json of {config.family}")
    attributes = {
        "architectures": [family.architecture],
        "model_type": model_type(config.family),
        **family.says,
        **{a.name: a.of(config) for a in family.attributes if a.field},
        **layer_attributes(family.layers, config.kind_of_layer),
        "dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    _require_said(config, attributes)
    return attributes


def _require_said(config: DecoderConfig, attributes: Mapping[str, Any]) -> None:
    """Raise an InputError for what would be read back otherwise."""
    back = from_attributes(attributes)
    unsaid = [
        f"{field.name}={getattr(config, field.name)!r}"
        for field in dataclasses.fields(config)
        if field.name not in (*_HOW_IT_RUNS, "layer_kinds")
        and getattr(back, field.name) != getattr(config, field.name)
    ]
    if back.kind_of_layer != config.kind_of_layer:
        unsaid.append(f"layer_kinds={config.layer_kinds!r}")
    if unsaid:
        raise InputError(
            f"{', '.join(unsaid)} has no counterpart in a config.json of {config.family}: "
            "give the config the family that computes this"
        )


def _built(fields: Mapping[str, Any]) -> DecoderConfig:
    """The config of fields by their dotted paths."""
    grouped: dict[str, dict[str, Any]] = {name: {} for name in ("", *_FORMS)}
    for path, value in fields.items():
        group, _, name = path.rpartition(".")
        grouped[group][name] = value
    forms = {name: form(**grouped[name]) for name, form in _FORMS.items() if grouped[name]}
    return DecoderConfig(**grouped[""], **forms)


def _other_faults(family: Family, given: Mapping[str, Any]) -> list[str]:
    """Of what sets no field: what isn't known, and what isn't as the decoder has it."""
    fixed = fixed_attributes(family, given)
    handled = {attribute.name for attribute in family.handled}
    return other_faults(given, fixed, {*handled, *HARMLESS, *family.harmless})


def fixed_attributes(family: Family, given: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """The attributes that must have one of these values, beside the others that are given."""
    own = {name: v(given) if callable(v) else v for name, v in family.fixed.items()}
    return {
        **_FIXED,
        "architectures": ([family.architecture],),
        "model_type": tuple(FAMILIES),
        **own,
    }
