"""Names in a PEFT file under which something stands once more: of the base, or trained."""

import re
from collections.abc import Iterable

from interop.keymaps import tensor_name
from interop.peft_layout import Place, whole_place
from interop.peft_modules import PREFIX, Base

_OF_BASE = re.compile(r"\.(token_adapter\.base_layer|base_layer|original_module)(?=\.)")
_SAVED = re.compile(r"\.modules_to_save(\.[^.]+)?(?=\.)|(?<=\.lora_magnitude_vector)\.weight$")


def base_places(names: Iterable[str], base: Base) -> dict[str, Place]:
    """Those of ``names`` that hold one of the base's own tensors, which PEFT may store beside an
    adapter.

    Their ``field`` is the path of the leaf that they must equal.
    """
    found = {}
    for name in names:
        if not name.startswith(PREFIX):
            continue
        own = without_wrappers(name.removeprefix(PREFIX))
        own = own if own in base.tensors else base.keymap.copies.get(own, "")
        if own in base.tensors:
            path, index = base.tensors[own]
            rule = next(rule for rule in base.parts[path] if tensor_name(rule, index) == own)
            place = whole_place(rule, tuple(base.leaves[path].shape), index, name)
            found[name] = place._replace(field=path)
    return found


def saved_again(names: Iterable[str]) -> dict[str, list[str]]:
    """The names that repeat a trained tensor, by its own.

    PEFT has them with ``bias="all"`` and with ``save_embedding_layers``.

    >>> saved_again(["head.bias", "head.modules_to_save.bias"])
    {'head.bias': ['head.modules_to_save.bias']}
    """
    found: dict[str, list[str]] = {}
    for name in filter(_SAVED.search, names):
        found.setdefault(without_copy(name), []).append(name)
    return found


def without_wrappers(name: str) -> str:
    """The name of the base's tensor, which PEFT's layers stand around.

    >>> without_wrappers("head.original_module.weight"), without_wrappers("q.base_layer.weight")
    ('head.weight', 'q.weight')
    """
    return _OF_BASE.sub("", name)


def without_copy(name: str) -> str:
    """The name of the trained tensor that a name is, or is another of."""
    return _SAVED.sub("", name)
