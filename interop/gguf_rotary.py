"""Rows of q and k per head: rotated neighbours, as in GGUF files, <-> rotated halves.

llama.cpp's converter reorders the rows of q and k of the ``llama`` architecture so that the two
coordinates a rotation turns are neighbours; Hugging Face has them half a head apart.
"""

import numpy as np


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
