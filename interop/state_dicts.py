"""A torch module's state dict <-> any parameter tree, by a table of one's own.

A module of torch and the same one here, with the table between them::

    torch.nn.Sequential                            {"first": ..., "second": ...}
      0.weight (6, 4), 0.bias (6,)            <->    first/kernel (4, 6), first/bias (6,)
      2.weight (3, 6), 2.bias (3,)            <->    second/kernel (6, 3), second/bias (3,)
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from interop import conversion
from interop.dlpack import as_numpy, as_torch
from interop.keymaps import Keymap
from lora_jax.errors import raise_listed
from lora_jax.paths import named_leaves, replace_leaves


def to_torch(params: Any, table: Keymap) -> dict[str, Any]:
    """The tensors of a parameter tree for ``module.load_state_dict``.

    They share memory with the leaves wherever `interop.dlpack` can have it so, and dtypes are
    kept. ``load_state_dict`` copies them; a module that takes them over (``assign=True``) must
    not be trained, for the leaves would change with it.

    Args:
      params: any pytree of arrays: nested dicts, Flax NNX state, the arrays of an Equinox module.
      table: `interop.keymap_rows.keymap`, or a family's.

    Raises:
      InputError: leaves that are no arrays, or that the table has no rule for or doesn't fit.

    >>> import torch
    >>> from interop.keymap_rows import keymap
    >>> table = keymap(("first/kernel", "0.weight", "linear"), ("first/bias", "0.bias"),
    ...                ("second/kernel", "2.weight", "linear"), ("second/bias", "2.bias"))
    >>> module = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    >>> shapes = {"first": {"kernel": np.zeros((4, 6)), "bias": np.zeros(6)},
    ...           "second": {"kernel": np.zeros((6, 3)), "bias": np.zeros(3)}}
    >>> params = from_torch(module.state_dict(), table, shapes)
    >>> params["second"]["kernel"].shape
    (6, 3)
    >>> module.load_state_dict(to_torch(params, table))
    <All keys matched successfully>
    """
    leaves = {path: _writeable(leaf) for path, leaf in _arrays(params).items()}
    return {name: as_torch(tensor) for name, tensor in conversion.to_torch(leaves, table).items()}


def from_torch(
    state_dict: Mapping[str, Any], table: Keymap, like: Any, *, dtype: str | None = None
) -> Any:
    """A parameter tree from a state dict: the inverse of `to_torch`.

    Args:
      state_dict: torch tensors or NumPy arrays by name.
      table: which name belongs to which leaf.
      like: a tree of the structure and shapes that are wanted; of arrays or shapes.
      dtype: of all leaves; the tensors' own by default.

    Returns:
      A tree like ``like`` of new NumPy arrays.

    Raises:
      InputError: missing, unexpected, mis-shaped and non-floating-point tensors, all named; leaves
        that are no arrays, or that the table doesn't fit.
    """
    arrays = {name: _array(tensor) for name, tensor in state_dict.items()}
    shapes = {path: tuple(leaf.shape) for path, leaf in _arrays(like).items()}
    params = conversion.from_torch(arrays, table, shapes, dtype=dtype)
    return replace_leaves(like, conversion.flatten(params))


def _arrays(tree: Any) -> dict[str, Any]:
    """The leaves by path, once all are known to be arrays or shapes."""
    leaves = named_leaves(tree)
    raise_listed(
        "leaves that are no arrays: leave them out, as equinox.filter(module, equinox.is_array) "
        "does",
        (path for path, leaf in leaves.items() if not hasattr(leaf, "shape")),
    )
    return leaves


def _writeable(leaf: Any) -> np.ndarray:
    """The leaf's own memory where it is on the host in one piece: NumPy has a JAX array
    read-only, torch does not."""
    devices = [d.platform for d in leaf.devices()] if isinstance(leaf, jax.Array) else []
    return as_numpy(as_torch(leaf)) if devices == ["cpu"] else np.asarray(leaf)


def _array(tensor: Any) -> np.ndarray:
    return tensor if isinstance(tensor, np.ndarray) else as_numpy(tensor)
