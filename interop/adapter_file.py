"""An adapter as torch files hold it: by module, in torch's orientation, NumPy alone.

Every format other than ours is read into these values and written from them; neither JAX nor
torch is needed to look at them.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np


class ModuleAdapter(NamedTuple):
    """The low-rank update of one module's weight: ΔW = scale · B A."""

    a: np.ndarray
    """(rank, in) of a linear layer, (rank, vocabulary) of an embedding, (rank, in, *kernel) of a
    convolution."""
    b: np.ndarray
    """(out, rank)."""
    scale: float
    kind: Literal["linear", "embedding", "conv"] = "linear"
    magnitude: np.ndarray | None = None
    """(out,) where the module has DoRA."""


class FileAdapter(NamedTuple):
    """The content of an adapter file."""

    format: str
    modules: Mapping[str, ModuleAdapter]
    """By the full name of the torch module."""
    whole: Mapping[str, np.ndarray] = {}
    """Parameters that are trained whole, by the full name of the torch parameter."""
    notes: tuple[str, ...] = ()
    """What a reader should know: conventions assumed, defects of the format worked around."""
