"""config.json of BERT and RoBERTa <-> EncoderConfig, by tables; what isn't implemented is refused.

An encoder's weights come with a head for classification, without one, or with one for filling
masks, which is left out.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from interop.hf_attributes import (
    ACTIVATIONS,
    HARMLESS,
    MOST_LAYERS,
    NUMBER,
    REQUIRED,
    Attribute,
    described_in,
    faults,
    other_faults,
    resolved,
    stored_dtype,
)
from lora_jax.errors import InputError
from lora_jax.models.encoder_config import EncoderConfig


class EncoderFamily(NamedTuple):
    """What ``model_type`` decides.

    Attributes:
      classifier: class of the model with a head for classification.
      bare: class of the model without a head.
      headless: classes of which the body is read and no head.
      other_heads: a pattern of the tensors of those heads.
      prefix: of the body's tensors, where there is a head.
      padding_id: where none is given.
      form: fields that follow from the family.
      head: fields of a classifier.
    """

    classifier: str
    bare: str
    headless: tuple[str, ...]
    other_heads: str
    prefix: str
    padding_id: int
    form: Mapping[str, Any]
    head: Mapping[str, Any]


ENCODERS = {
    "bert": EncoderFamily(
        "BertForSequenceClassification",
        "BertModel",
        ("BertForMaskedLM", "BertForPreTraining", "BertForNextSentencePrediction"),
        r"cls\..*",
        "bert.",
        padding_id=0,
        form={"positions_skip_padding": False},
        head={"head": "pooled", "pooler": True},
    ),
    "roberta": EncoderFamily(
        "RobertaForSequenceClassification",
        "RobertaModel",
        ("RobertaForMaskedLM",),
        r"lm_head\..*",
        "roberta.",
        padding_id=1,
        form={"positions_skip_padding": True},
        head={"head": "dense", "pooler": False},
    ),
}

_MOST_LABELS = 2**20
"""A file that names more is damaged; one name is made for each."""
_ATTRIBUTES = (
    Attribute("vocab_size", "vocab_size", default=REQUIRED),
    Attribute("hidden_size", "hidden_size", default=REQUIRED),
    Attribute("intermediate_size", "intermediate_size", default=REQUIRED),
    Attribute("num_hidden_layers", "num_layers", default=REQUIRED, most=MOST_LAYERS),
    Attribute("num_attention_heads", "num_heads", default=REQUIRED),
    Attribute("max_position_embeddings", "max_positions", default=512),
    Attribute("type_vocab_size", "type_vocab_size", default=2),
    Attribute("layer_norm_eps", "layer_norm_eps", NUMBER, 1e-12),
    Attribute("hidden_act", "activation", (str,), "gelu", ACTIVATIONS),
    Attribute("hidden_dropout_prob", "hidden_dropout", NUMBER, 0.1),
    Attribute("attention_probs_dropout_prob", "attention_dropout", NUMBER, 0.1),
    Attribute(
        "classifier_dropout",
        "classifier_dropout",
        NUMBER,
        lambda found: found["hidden_dropout_prob"],
    ),
)
# Which set fields only together with others.
_CONTEXT = (
    Attribute("model_type", None, (str,), REQUIRED, {name: name for name in ENCODERS}),
    Attribute("pad_token_id"),
    Attribute("num_labels", above=0, most=_MOST_LABELS),
    Attribute("id2label", None, (dict,)),
)
_HANDLED = (*_ATTRIBUTES, *_CONTEXT)
# What asks for something the encoder doesn't do, unless it has this value.
_FIXED: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({},),
}
# fmt: off
_HARMLESS = HARMLESS - {"is_decoder"} | {
    "cls_token_id", "mask_token_id", "language", "name",
    # there is no head to tie; how it is run
    "tie_word_embeddings", "gradient_checkpointing", "chunk_size_feed_forward", "output_past",
    # what BERT's first releases wrote and no version reads
    "directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers",
    "pooler_size_per_head", "pooler_type",
}
# fmt: on
_KNOWN = frozenset((*(a.name for a in _HANDLED), *_HARMLESS, "architectures"))


def read_config(directory: str | Path, *, dtype: str | None = None) -> EncoderConfig:
    """The encoder that a directory's ``config.json`` describes.

    An attribute that is null counts as not given; one that isn't given has the value it has in
    ``transformers``. Architectures that fill masks give the encoder without a head.

    Args:
      directory: holds ``config.json``.
      dtype: compute dtype; by default the one in the file, and ``float32`` where there is none.

    Raises:
      InputError: no ``config.json``, or attributes that aren't implemented, each named with its
        value.
    """
    return described_in(directory, partial(_from_attributes, dtype=dtype))


def _from_attributes(attributes: Mapping[str, Any], dtype: str | None) -> EncoderConfig:
    given = {name: value for name, value in attributes.items() if value is not None}
    if wrong := [*faults(_HANDLED, given), *_other_faults(given)]:
        raise InputError(f"not implemented: {'; '.join(wrong)}")
    return EncoderConfig(**_fields(given, dtype))


def _fields(given: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    family, found = ENCODERS[given["model_type"]], resolved(_HANDLED, given)
    fields = {a.field: a.to_field(found[a.name]) for a in _ATTRIBUTES if a.field}
    fields |= {"padding_id": given.get("pad_token_id", family.padding_id)}
    fields |= {**family.form, "dtype": dtype or stored_dtype(given)}
    if given.get("architectures", [family.bare]) == [family.classifier]:
        fields |= {**family.head, "labels": _labels(given)}
    return fields


def to_attributes(config: EncoderConfig, *, dtype: str) -> dict[str, Any]:
    """The content of ``config.json``, for transformers 4 and 5.

    Args:
      config: the encoder.
      dtype: dtype of the weights that the file goes with.

    >>> config = EncoderConfig(vocab_size=8, hidden_size=4, intermediate_size=6, num_layers=3,
    ...                        num_heads=2, max_positions=10, head="pooled", labels=("no", "yes"))
    >>> to_attributes(config, dtype="float32")["id2label"]
    {'0': 'no', '1': 'yes'}
    """
    model_type, family = encoder_family(config)
    classes = {
        "id2label": {str(i): label for i, label in enumerate(config.labels)},
        "label2id": {label: i for i, label in enumerate(config.labels)},
    }
    return {
        "architectures": [family.bare if config.head == "none" else family.classifier],
        "model_type": model_type,
        **{a.name: a.of(config) for a in _ATTRIBUTES},
        "pad_token_id": config.padding_id,
        **(classes if config.labels else {}),
        "dtype": dtype,
    }


def encoder_family(config: EncoderConfig) -> tuple[str, EncoderFamily]:
    """The ``model_type`` whose positions these are, and its row in `ENCODERS`."""
    name = {True: "roberta", False: "bert"}[config.positions_skip_padding]
    return name, ENCODERS[name]


def _labels(given: Mapping[str, Any]) -> tuple[str, ...]:
    named = given.get("id2label", {})
    count = len(named) or given.get("num_labels", 2)
    return tuple(str(named.get(str(i), f"LABEL_{i}")) for i in range(count))


def _other_faults(given: Mapping[str, Any]) -> list[str]:
    """Of what sets no field: what isn't known, and what isn't as the encoder has it."""
    fixed = dict(_FIXED)
    if family := ENCODERS.get(str(given.get("model_type"))):
        names = (family.classifier, family.bare, *family.headless)
        fixed["architectures"] = tuple([name] for name in names)
    return [
        *other_faults(given, fixed, _KNOWN),
        *_label_faults(given.get("id2label"), given.get("num_labels")),
    ]


def _label_faults(named: Any, count: Any) -> list[str]:
    if type(named) is not dict:
        return []
    faults = {
        f"id2label={named!r} (its keys aren't 0 to {len(named) - 1})": (
            sorted(named) != sorted(map(str, range(len(named))))
        ),
        f"num_labels={count} and id2label has {len(named)} (they disagree)": (
            count is not None and count != len(named)
        ),
    }
    return [fault for fault, holds in faults.items() if holds]
