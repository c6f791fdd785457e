"""Attributes of ``config.json`` and the config fields they set: what all models share."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lora_jax.errors import InputError
from lora_jax.files import read_json

T = TypeVar("T")

NUMBER = (int, float)
MOST_LAYERS = 4096
"""A file that names more is damaged; one entry is made for each."""


# Of every model: what doesn't change what the model computes.
# fmt: off
HARMLESS = frozenset((
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
    "id2label", "label2id", "num_labels", "_num_labels", "problem_type", "task_specific_params",
))
# fmt: on
_DTYPES = ("dtype", "torch_dtype")


class Required:
    """The default of an attribute that has to be given."""


REQUIRED = Required()


class Attribute(NamedTuple):
    """An attribute, the field it sets, and the value it has where none is given.

    >>> act = Attribute("hidden_act", "mlp.activation", (str,), "silu", {"swish": "silu"})
    >>> act.to_field("swish")
    'silu'
    """

    name: str
    field: str | None = None
    """Dotted path in the config; None for what sets a field only together with others."""
    kinds: tuple[type, ...] = (int,)
    default: Any = None
    """A value, `REQUIRED`, or a function of the attributes before it."""
    values: Mapping[Any, Any] = {}
    """Where the field has other values: by the attribute's. Written is the first that fits."""
    nullable: bool = False
    """A null means None, and not the default."""
    null: Callable[[Mapping[str, Any]], Any] | None = None
    """What a null means where that is another value: a function as for ``default``."""
    items: tuple[type, ...] = ()
    """Of a list."""
    above: float | None = None
    """A number, and each of a list, is larger."""
    most: float | None = None

    def to_field(self, value: Any) -> Any:
        """The field's value."""
        return self.values[value] if self.values else value

    def of(self, config: Any) -> Any:
        """The attribute's value that stands for the config's field."""
        value = attrgetter(self.field or "")(config)
        known = (given for given, ours in self.values.items() if ours == value)
        return next(known, value)


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}


def resolved(attributes: Iterable[Attribute], given: Mapping[str, Any]) -> dict[str, Any]:
    """Every attribute's value: the given one, or its default.

    >>> resolved((Attribute("a"), Attribute("b", default=lambda found: 2 * found["a"])), {"a": 3})
    {'a': 3, 'b': 6}
    """
    found: dict[str, Any] = {}
    for each in attributes:
        default = each.default(found) if callable(each.default) else each.default
        value = given.get(each.name, default)
        null = None if each.nullable else each.null(found) if each.null else default
        found[each.name] = null if value is None else value
    return found


def faults(attributes: Iterable[Attribute], given: Mapping[str, Any]) -> list[str]:
    """What is missing, of the wrong type or of a value that can't be.

    >>> table = (Attribute("n_layer", above=0), Attribute("n_head", default=REQUIRED))
    >>> faults(table, {"n_layer": 0})
    ['n_layer=0 (not above 0)', 'n_head is missing']
    """
    found = []
    for each in attributes:
        value = given.get(each.name)
        if value is None:
            found += [f"{each.name} is missing"] if each.default is REQUIRED else []
        elif wrong := _wrong(each, value):
            found.append(f"{each.name}={value!r} ({wrong})")
    return found


def other_faults(
    given: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]], known: Collection[str]
) -> list[str]:
    """Of what sets no field: what isn't known, and what isn't as the model has it.

    Args:
      given: by name.
      fixed: the values that an attribute may have.
      known: the other attributes' names.

    >>> other_faults({"a": 1, "b": 2, "c": 3}, {"a": (0,)}, ["b"])
    ['a=1 (known: 0)', 'c=3 (unknown attribute)']
    """
    known = {*known, *fixed, *_DTYPES}
    other = [name for name in fixed if name in given and given[name] not in fixed[name]]
    return [
        *(f"{n}={given[n]!r} (known: {', '.join(map(repr, fixed[n]))})" for n in other),
        *(f"{n}={given[n]!r} (unknown attribute)" for n in given if n not in known),
        *(
            f"{n}={given[n]!r} (expected str)"
            for n in _DTYPES
            if n in given and type(given[n]) is not str
        ),
    ]


def stored_dtype(given: Mapping[str, Any]) -> str:
    """The dtype of the weights, ``float32`` where it isn't given."""
    return next((given[name] for name in _DTYPES if name in given), "float32")


def described_in(directory: str | Path, from_attributes: Callable[[dict[str, Any]], T]) -> T:
    """What ``from_attributes`` makes of a directory's ``config.json``; its errors name the file.

    Raises:
      InputError: there is none.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise InputError(
            f"{directory} is not a model directory: it holds no config.json "
            "(expected config.json, tokenizer.json and *.safetensors)"
        )
    try:
        return from_attributes(read_json(path))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _wrong(attribute: Attribute, value: Any) -> str:
    """What is wrong with a value, or nothing."""
    if type(value) not in attribute.kinds:
        return f"expected {attribute.kinds[-1].__name__}"
    if attribute.values and value not in attribute.values:
        return f"known: {', '.join(map(repr, attribute.values))}"
    items = value if type(value) is list else [value]
    if attribute.items and any(type(item) not in attribute.items for item in items):
        return f"expected a list of {attribute.items[-1].__name__}"
    numbers = [item for item in items if type(item) in NUMBER]
    if not all(map(math.isfinite, numbers)):
        return "not finite"
    if attribute.above is not None and any(number <= attribute.above for number in numbers):
        return f"not above {attribute.above}"
    if attribute.most is not None and any(number > attribute.most for number in numbers):
        return f"at most {attribute.most}"
    return ""
