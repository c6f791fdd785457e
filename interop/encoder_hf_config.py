"""config.json of BERT and RoBERTa <-> EncoderConfig, by tables; what isn't implemented is refused.

An encoder's weights come with a head for classification, without one, or with one for filling
masks, which is left out.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.errors import InputError
from lora_jax.files import read_json
from lora_jax.models.encoder_config import EncoderConfig


class Family(NamedTuple):
    """What ``model_type`` decides."""

    skips_padding: bool
    padding_id: int
    head: str
    prefix: str
    other_heads: str
    """Tensors of heads that aren't read: a pattern of their names."""
    classifier: str
    bare: str
    headless: tuple[str, ...]
    """Architectures of which the body is read and no head."""


FAMILIES = {
    "bert": Family(
        skips_padding=False,
        padding_id=0,
        head="pooled",
        prefix="bert.",
        other_heads=r"cls\..*",
        classifier="BertForSequenceClassification",
        bare="BertModel",
        headless=("BertForMaskedLM", "BertForPreTraining", "BertForNextSentencePrediction"),
    ),
    "roberta": Family(
        skips_padding=True,
        padding_id=1,
        head="dense",
        prefix="roberta.",
        other_heads=r"lm_head\..*",
        classifier="RobertaForSequenceClassification",
        bare="RobertaModel",
        headless=("RobertaForMaskedLM",),
    ),
}


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
    _Attribute("max_position_embeddings", "max_positions", default=512),
    _Attribute("type_vocab_size", "type_vocab_size", default=2),
    _Attribute("layer_norm_eps", "layer_norm_eps", _NUMBER, 1e-12),
    _Attribute("hidden_dropout_prob", "hidden_dropout", _NUMBER, 0.1),
    _Attribute("attention_probs_dropout_prob", "attention_dropout", _NUMBER, 0.1),
)
_PLAIN = (*_REQUIRED, *_OPTIONAL)
_DTYPES = ("dtype", "torch_dtype")
_KINDS: dict[str, tuple[type, ...]] = {
    **{attribute.name: attribute.kinds for attribute in _PLAIN},
    **dict.fromkeys(_DTYPES, (str,)),
    "model_type": (str,),
    "architectures": (list,),
    "hidden_act": (str,),
    "pad_token_id": (int,),
    "classifier_dropout": _NUMBER,
    "num_labels": (int,),
    "id2label": (dict,),
}
# Theirs -> ours, the first of each being the one that is written.
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
# Attributes that ask for something the encoder doesn't do, unless they have one of these values.
_FIXED: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "output_past": (True, False),
}

# Attributes that don't change what the model computes.
# fmt: off
_HARMLESS = frozenset((
    # provenance
    "_name_or_path", "_commit_hash", "transformers_version", "transformers.js_config",
    "unsloth_fixed", "finetuning_task", "language", "name",
    # token ids, which the tokenizer's files repeat
    "bos_token_id", "eos_token_id", "unk_token_id", "sep_token_id", "cls_token_id",
    "mask_token_id", "decoder_start_token_id", "tokenizer_class", "prefix",
    # how weights were made, what is returned, how it is run
    "initializer_range", "use_cache", "output_attentions", "output_hidden_states", "return_dict",
    "torchscript", "use_bfloat16", "tie_encoder_decoder", "tie_word_embeddings",
    "_attn_implementation", "_attn_implementation_autoset", "gradient_checkpointing",
    "chunk_size_feed_forward",
    # the loss, and a second form of the labels
    "problem_type", "label2id", "task_specific_params",
    # what BERT's first releases wrote and no version reads
    "directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers",
    "pooler_size_per_head", "pooler_type",
))
# fmt: on
_KNOWN = frozenset((*_KINDS, *_FIXED, *_HARMLESS))


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
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise InputError(f"{directory} is not a model directory: it holds no config.json")
    attributes = {name: value for name, value in read_json(path).items() if value is not None}
    if faults := _faults(attributes):
        raise InputError(f"{path}: not implemented: {'; '.join(faults)}")
    family = FAMILIES[attributes["model_type"]]
    fields = {a.field: attributes.get(a.name, a.default) for a in _PLAIN}
    fields["activation"] = _ACTIVATIONS[attributes.get("hidden_act", "gelu")]
    fields["padding_id"] = attributes.get("pad_token_id", family.padding_id)
    fields["classifier_dropout"] = attributes.get("classifier_dropout", fields["hidden_dropout"])
    fields["dtype"] = dtype or next((attributes[n] for n in _DTYPES if n in attributes), "float32")
    fields["positions_skip_padding"] = family.skips_padding
    if next(iter(attributes.get("architectures", ())), family.bare) == family.classifier:
        pooler = family.head == "pooled"
        fields |= {"head": family.head, "labels": _labels(attributes), "pooler": pooler}
    try:
        return EncoderConfig(**fields)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


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
    model_type, family = family_of(config)
    classes = {
        "id2label": {str(i): label for i, label in enumerate(config.labels)},
        "label2id": {label: i for i, label in enumerate(config.labels)},
    }
    theirs = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    return {
        "architectures": [family.bare if config.head == "none" else family.classifier],
        "model_type": model_type,
        **{attribute.name: getattr(config, attribute.field) for attribute in _PLAIN},
        "hidden_act": theirs[config.activation],
        "classifier_dropout": config.classifier_dropout,
        "pad_token_id": config.padding_id,
        **(classes if config.labels else {}),
        "dtype": dtype,
    }


def family_of(config: EncoderConfig) -> tuple[str, Family]:
    """The ``model_type`` whose positions these are, and its row in `FAMILIES`."""
    return next(
        (name, family)
        for name, family in FAMILIES.items()
        if family.skips_padding == config.positions_skip_padding
    )


def _labels(attributes: Mapping[str, Any]) -> tuple[str, ...]:
    named = attributes.get("id2label", {})
    count = len(named) or attributes.get("num_labels", 2)
    return tuple(str(named.get(str(i), f"LABEL_{i}")) for i in range(count))


def _faults(attributes: Mapping[str, Any]) -> list[str]:
    """What keeps the encoder from computing what ``attributes`` describe."""
    mistyped = [
        n for n, kinds in _KINDS.items() if type(attributes.get(n, kinds[0]())) not in kinds
    ]
    sound = {n: value for n, value in attributes.items() if n not in mistyped}
    fixed = _FIXED | {"model_type": tuple(FAMILIES), "hidden_act": tuple(_ACTIVATIONS)}
    if family := FAMILIES.get(sound.get("model_type", "")):
        names = (family.classifier, family.bare, *family.headless)
        fixed["architectures"] = tuple([name] for name in names)
    other = [n for n, known in fixed.items() if n in sound and sound[n] not in known]
    reasons = {
        **{name: f"expected {_KINDS[name][-1].__name__}" for name in mistyped},
        **{name: f"known: {', '.join(map(repr, fixed[name]))}" for name in other},
        **{name: "unknown attribute" for name in attributes if name not in _KNOWN},
    }
    names = ("model_type", *(attribute.name for attribute in _REQUIRED))
    missing = [f"{name} is missing" for name in names if name not in attributes]
    faults = [f"{name}={attributes[name]!r} ({reason})" for name, reason in reasons.items()]
    return missing + faults + _label_faults(sound)


def _label_faults(attributes: Mapping[str, Any]) -> list[str]:
    named = attributes.get("id2label", {})
    count = attributes.get("num_labels", len(named))
    uncounted = sorted(named) != sorted(map(str, range(len(named))))
    faults = {
        f"id2label={named!r} (its keys aren't 0 to {len(named) - 1})": uncounted,
        f"num_labels={count} and id2label has {len(named)} (they disagree)": (
            named and count != len(named)
        ),
    }
    return [fault for fault, holds in faults.items() if holds]
