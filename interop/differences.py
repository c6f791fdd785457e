"""How far two arrays are apart, as a record: the unit of every comparison with torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lora_jax.errors import InputError


@dataclass(frozen=True)
class Difference:
    """One array of ours against the same of torch.

    Attributes:
      name: the torch module or tensor.
      shape: of both.
      max_abs: largest |ours - torch's|.
      relative: ‖ours - torch's‖ / ‖torch's‖ over the whole array; 0 where both are zero.
      cosine: smallest cosine similarity of any vector along the last axis; 1 where both are zero.
    """

    name: str
    shape: tuple[int, ...]
    max_abs: float
    relative: float
    cosine: float

    def within(self, rtol: float) -> bool:
        """Whether ``relative`` is at most ``rtol``; never where something is not a number."""
        return self.relative <= rtol


def difference(name: str, ours: np.ndarray, theirs: np.ndarray) -> Difference:
    """Measure two arrays of one shape, in float64.

    Raises:
      InputError: the shapes differ.

    >>> found = difference("fc", np.array([[3.0, 4.0]]), np.array([[3.0, 5.0]]))
    >>> found.max_abs, round(found.relative, 3), round(found.cosine, 3)
    (1.0, 0.171, 0.995)
    """
    if ours.shape != theirs.shape:
        raise InputError(f"{name} is {ours.shape} in JAX and {theirs.shape} in torch")
    wide, reference = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    gap = wide - reference
    return Difference(
        name,
        ours.shape,
        max_abs=float(np.max(np.abs(gap), initial=0.0)),
        relative=_ratio(np.linalg.norm(gap), np.linalg.norm(reference)),
        cosine=_smallest_cosine(wide, reference),
    )


def differences(
    ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]
) -> tuple[Difference, ...]:
    """Measure all arrays of the same names, in torch's order.

    Raises:
      InputError: naming every array that one side lacks, and every one of another shape.
    """
    lacking = {"torch": sorted(ours.keys() - theirs), "JAX": sorted(theirs.keys() - ours)}
    shapes = [
        f"{name} is {ours[name].shape} in JAX and {theirs[name].shape} in torch"
        for name in theirs
        if name in ours and ours[name].shape != theirs[name].shape
    ]
    absent = [f"{side} lacks {', '.join(names)}" for side, names in lacking.items() if names]
    if problems := [*absent, *shapes]:
        raise InputError(f"the two sides hold different arrays: {'; '.join(problems)}")
    return tuple(difference(name, ours[name], theirs[name]) for name in theirs)


def furthest(found: tuple[Difference, ...]) -> Difference:
    """The one that is relatively furthest apart; one that is not a number is further than all."""
    return max(found, key=lambda each: math.inf if math.isnan(each.relative) else each.relative)


def _ratio(gap: np.floating, norm: np.floating) -> float:
    if norm:
        return float(gap / norm)
    return 0.0 if gap == 0 else math.inf


def _smallest_cosine(ours: np.ndarray, theirs: np.ndarray) -> float:
    ours, theirs = np.atleast_1d(ours), np.atleast_1d(theirs)
    norms = np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1)
    both_zero = ~(ours.any(axis=-1) | theirs.any(axis=-1))
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines = np.sum(ours * theirs, axis=-1) / norms
    return float(np.min(np.where(both_zero, 1.0, cosines), initial=1.0))
