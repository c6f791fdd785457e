"""One attribute of ``config.json`` and the config field it sets, both ways."""

from collections.abc import Iterable, Mapping
from operator import attrgetter
from typing import Any, NamedTuple

NUMBER = (int, float)


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
        found[each.name] = default if value is None and not each.nullable else value
    return found


def faults(attributes: Iterable[Attribute], given: Mapping[str, Any]) -> list[str]:
    """What is missing, of the wrong type or of a value that isn't implemented."""
    found = []
    for each in attributes:
        value = given.get(each.name)
        if value is None:
            found += [f"{each.name} is missing"] if each.default is REQUIRED else []
        elif type(value) not in each.kinds:
            found.append(f"{each.name}={value!r} (expected {each.kinds[-1].__name__})")
        elif each.values and value not in each.values:
            found.append(f"{each.name}={value!r} (known: {', '.join(map(repr, each.values))})")
    return found
