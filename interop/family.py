"""What is known of one family of decoders in Hugging Face's form, and what most of them share."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from interop.family_keymaps import RELATIVES_OF_LLAMA
from interop.hf_attributes import ACTIVATIONS, MOST_LAYERS, NUMBER, REQUIRED, Attribute
from interop.hf_layers import LayerScheme
from interop.keymaps import Keymap

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


def sizes(**defaults: Any) -> tuple[Attribute, ...]:
    """The sizes of most families; one whose default isn't said has to be given.

    A null for key and value heads, or for a head's width, isn't the family's default.
    """
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
        "head_dim": head_dim_of,
    }
    found = {**dict.fromkeys(names, REQUIRED), **derived, **defaults}
    layers = layers_of("num_hidden_layers", found.pop("num_hidden_layers"))
    return tuple(
        Attribute(name, field, default=found[name], null=derived.get(name))
        if name in found
        else layers
        for name, field in names.items()
    )


def layers_of(name: str, default: Any = REQUIRED) -> Attribute:
    """How many layers there are."""
    return Attribute(name, "num_layers", default=default, above=0, most=MOST_LAYERS)


def head_dim_of(found: Found) -> int:
    """A head's width where none is given."""
    return found["hidden_size"] // max(found["num_attention_heads"], 1)


def activation(name: str, default: str) -> Attribute:
    """The activation inside the MLP."""
    return Attribute(name, "mlp.activation", (str,), default, ACTIVATIONS)


def tied(default: bool) -> Attribute:
    """Whether the head is the embedding table."""
    return Attribute("tie_word_embeddings", "tie_embeddings", (bool,), default)


def eps(default: float, name: str = "rms_norm_eps") -> Attribute:
    """What norms add to the mean square."""
    return Attribute(name, "norm.eps", NUMBER, default)


SILU = activation("hidden_act", "silu")
BIASED = Attribute("attention_bias", "attention.bias", (bool,), False)
BIASED_MLP = Attribute("mlp_bias", "mlp.bias", (bool,), False)
NO_DROPOUT: dict[str, Known] = {"attention_dropout": (0.0,)}
CAUSAL: dict[str, Known] = {**NO_DROPOUT, "use_bidirectional_attention": (False,)}
SAYS_NO_WINDOW: dict[str, Known] = {"use_sliding_window": (False,)}
