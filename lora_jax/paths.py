"""Names for the leaves of any parameter tree.

A leaf's path is its key path joined by ``/``: ``layers/0/attn/q_proj/kernel``. Dictionaries,
sequences, dataclasses, Equinox modules and Flax NNX state all read the same; the ``value``
attribute of a box around a leaf (an NNX variable, a Linen partitioned parameter) is left out.
"""

import difflib
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax.tree_util import (
    DictKey,
    FlattenedIndexKey,
    GetAttrKey,
    KeyEntry,
    SequenceKey,
    tree_flatten_with_path,
    tree_unflatten,
)

from lora_jax.errors import InputError

_KEY_FIELD = {DictKey: "key", SequenceKey: "idx", GetAttrKey: "name", FlattenedIndexKey: "key"}
_BOX = GetAttrKey("value")


def path_of(key_path: tuple[KeyEntry, ...]) -> str:
    """Join the entries of a ``jax.tree_util`` key path with ``/``.

    >>> path_of((DictKey("layers"), SequenceKey(0), GetAttrKey("kernel")))
    'layers/0/kernel'
    """
    entries = key_path[:-1] if key_path[-1:] == (_BOX,) and len(key_path) > 1 else key_path
    return "/".join(str(getattr(entry, _KEY_FIELD[type(entry)])) for entry in entries)


def named_leaves(tree: Any) -> dict[str, Any]:
    """Every leaf of ``tree`` under its path, in traversal order.

    Raises:
      InputError: two leaves have the same path (a key that itself contains ``/``).

    >>> named_leaves({"dense": {"kernel": 1, "bias": 2}})
    {'dense/bias': 2, 'dense/kernel': 1}
    """
    pairs = [(path_of(keys), leaf) for keys, leaf in tree_flatten_with_path(tree)[0]]
    named = dict(pairs)
    if len(named) < len(pairs):
        paths = [path for path, _ in pairs]
        repeated = sorted({path for path in paths if paths.count(path) > 1})
        raise InputError(f"several leaves share a path: {repeated}; rename their keys")
    return named


def replace_leaves(tree: Any, new_leaves: Mapping[str, Any]) -> Any:
    """A tree like ``tree`` in which the leaves at the given paths are replaced.

    Leaves that are not named are the same objects as before; ``tree`` is left alone.

    Raises:
      InputError: a path names no leaf of ``tree``.

    >>> replace_leaves({"a": 1, "b": 2}, {"b": 3})
    {'a': 1, 'b': 3}
    """
    named = named_leaves(tree)
    require_known(new_leaves, named)
    structure = tree_flatten_with_path(tree)[1]
    return tree_unflatten(structure, [new_leaves.get(path, leaf) for path, leaf in named.items()])


def nearest(name: str, names: Iterable[str], count: int = 3) -> list[str]:
    """The ``count`` names most like ``name``, best first.

    >>> nearest("layers/q_proj/kernal", ["layers/q_proj/kernel", "norm/scale"])
    ['layers/q_proj/kernel']
    """
    return difflib.get_close_matches(name, list(names), n=count, cutoff=0.4)


def require_known(paths: Iterable[str], known: Iterable[str]) -> None:
    """Raise one InputError that names every path not among ``known`` and its nearest leaves."""
    known = set(known)
    unknown = sorted(path for path in paths if path not in known)
    if unknown:
        hints = (
            f"{path!r} (nearest: {', '.join(nearest(path, known)) or 'none'})" for path in unknown
        )
        raise InputError("no such leaf: " + "; ".join(hints))


def path_key(key: jax.Array, path: str) -> jax.Array:
    """A random key that depends on ``key`` and on a leaf's path alone."""
    digest = hashlib.sha256(path.encode()).digest()
    for start in (0, 4):
        key = jax.random.fold_in(key, int.from_bytes(digest[start : start + 4], "little"))
    return key
