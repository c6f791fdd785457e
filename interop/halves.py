"""Rotated neighbours (0, 1), (2, 3), ... <-> rotated halves (0, h/2), (1, h/2 + 1), ...

The two orders of a head's features compute the same where queries and keys are in the same one.
Hugging Face has halves; llama.cpp's files and torchtune's have neighbours.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from interop.conversion import flatten, nest
from lora_jax.models.config import DecoderConfig


def to_halves(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows from neighbours (0, 1), (2, 3), ... to halves.

    Row 2j becomes row j and row 2j + 1 becomes row head_dim/2 + j of its head.

    >>> to_halves(np.arange(8), head_dim=4)
    array([0, 2, 1, 3, 4, 6, 5, 7])
    """
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def to_neighbours(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows from halves to neighbours: the inverse of `to_halves`.

    >>> to_neighbours(to_halves(np.arange(12), head_dim=6), head_dim=6).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    """
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def in_halves(config: DecoderConfig, params: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parameters for rotated halves: outputs of q and k in another order."""
    if not config.rope_interleaved:
        return params

    def moved(path: str, leaf: Any) -> Any:
        if path.split("/")[-2] not in ("q_proj", "k_proj"):
            return leaf
        outputs = np.moveaxis(np.asarray(leaf), -1, 0)
        return np.moveaxis(to_halves(outputs, config.head_dim), 0, -1)

    return nest({path: moved(path, leaf) for path, leaf in flatten(params).items()})
