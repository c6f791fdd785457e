"""One attribute of ``config.json`` and the config field it sets, both ways."""

import math
from collections.abc import Iterable, Mapping
from operator import attrgetter
from typing import Any, NamedTuple

from lora_jax.models.config import DecoderConfig

NUMBER = (int, float)
MOST_LAYERS = 4096
"""A file that names more is damaged; one entry is made for each."""


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
    """Dotted path in `DecoderConfig`; None for what sets a field only together with others."""
    kinds: tuple[type, ...] = (int,)
    default: Any = None
    """A value, `REQUIRED`, or a function of the attributes before it."""
    values: Mapping[Any, Any] = {}
    """Where the field has other values: by the attribute's. Written is the first that fits."""
    nullable: bool = False
    """A null means None, and not the default."""
    items: tuple[type, ...] = ()
    """Of a list."""
    above: float | None = None
    """A number, and each of a list, is larger."""
    most: float | None = None

    def to_field(self, value: Any) -> Any:
        """The field's value."""
        return self.values[value] if self.values else value

    def of(self, config: DecoderConfig) -> Any:
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
        found[each.name] = default if value is None and not each.nullable else value
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
