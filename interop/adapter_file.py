"""An adapter as torch files hold it: by module, in torch's orientation, NumPy alone.

Every format other than ours is read into these values and written from them; neither JAX nor
torch is needed to look at them.

==============  ==========================  ====================  ==============================
kind            a                           b                     ΔW
==============  ==========================  ====================  ==============================
``linear``      (rank, in)                  (out, rank)           scale · B A, (out, in)
``embedding``   (rank, vocabulary)          (features, rank)      its transpose
``conv``        (rank, in, \\*kernel)        (out, rank)           (out, in, \\*kernel)
``experts``     (experts, rank, in)         (experts, out, rank)  (experts, out, in)
==============  ==========================  ====================  ==============================
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np

from lora_jax.errors import InputError

Kind = Literal["linear", "embedding", "conv", "experts"]

FLOATS = frozenset(map(np.dtype, (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)))
"""Of weights and factors; those of eight bits are no values by themselves."""
# Names come from strangers, and may be of any number and length.
_NAMED_AT_MOST, _LETTERS_AT_MOST = 8, 2000


class ModuleAdapter(NamedTuple):
    """The low-rank update of one module's weight, in the dtype of the file."""

    a: np.ndarray
    b: np.ndarray
    scale: float
    """alpha/rank, or what the format has in its place."""
    kind: Kind = "linear"
    magnitude: np.ndarray | None = None
    """(out,) where the module has DoRA: the weight is then magnitude · (W + ΔW) / ‖W + ΔW‖."""
    bias: np.ndarray | None = None
    """(out,), added to B's output and scaled as it is: PEFT's ``lora_bias``."""

    @property
    def rank(self) -> int:
        """How many rows A has (of each expert)."""
        return self.a.shape[self.a.ndim - 2 if self.kind == "experts" else 0]


class RowAdapter(NamedTuple):
    """Rows of an embedding table that are trained: they replace the base's."""

    indices: tuple[int, ...]
    rows: np.ndarray
    """(len(indices), features)."""


class FileAdapter(NamedTuple):
    """The content of an adapter file."""

    format: str
    modules: Mapping[str, ModuleAdapter]
    """By the full name of the torch module."""
    whole: Mapping[str, np.ndarray] = {}
    """Parameters that are trained whole, by the full name of the torch parameter."""
    rows: Mapping[str, RowAdapter] = {}
    """By the full name of the embedding module."""
    shares_tables: bool = False
    """A head that is tied to an embedding table follows what the table's adapter does; else the
    file means the lookup alone."""
    notes: tuple[str, ...] = ()
    """What a reader should know: conventions assumed, defects of the format worked around."""
    of_base: Mapping[str, np.ndarray] = {}
    """Weights of the base that stand beside the adapter, by the full name of the parameter."""


def delta_weight(module: ModuleAdapter) -> np.ndarray:
    """ΔW in the module's own axes, float32; without what DoRA does on top.

    >>> module = ModuleAdapter(np.ones((1, 2)), np.ones((3, 1)), 0.5)
    >>> delta_weight(module).tolist()
    [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]
    """
    a, b = (np.asarray(factor, np.float32) for factor in (module.a, module.b))
    with np.errstate(over="ignore", invalid="ignore"):
        product = b @ a if module.kind == "experts" else np.tensordot(b, a, 1)
        product *= np.float32(module.scale)
    return product.T if module.kind == "embedding" else product


def checked(file: FileAdapter, source: Any) -> FileAdapter:
    """The adapter, if its arrays belong together.

    Raises:
      InputError: naming ``source`` and every array that is mis-shaped, not floating or not
        finite, and every scale that isn't.
    """
    if not (file.modules or file.whole or file.rows):
        raise InputError(f"{source} holds no adapter: no tensor of it is a {file.format} factor")
    raise_all(f"{source} is no {file.format} adapter", _problems(file))
    return file


def raise_all(subject: str, problems: Iterable[str]) -> None:
    """Raise one InputError for all problems, if there are any; the first few are spelt out."""
    if found := list(problems):
        more = len(found) - _NAMED_AT_MOST
        rest = [f"and {more} more"] if more > 0 else []
        first = (problem[:_LETTERS_AT_MOST] for problem in found[:_NAMED_AT_MOST])
        raise InputError(f"{subject}: {'; '.join([*first, *rest])}")


def is_floating(array: np.ndarray) -> bool:
    """Whether the array can hold factors: not of integers, booleans or eight bits."""
    return array.dtype in FLOATS


def _problems(file: FileAdapter) -> Iterator[str]:
    for name, module in file.modules.items():
        arrays = {"A": module.a, "B": module.b, "magnitude": module.magnitude, "bias": module.bias}
        yield from _value_problems(name, arrays)
        yield from _shape_problems(name, module)
        if not np.isfinite(module.scale):
            yield f"{name!r} has scale {module.scale}, expected a finite number"
    yield from _value_problems("", file.whole)
    for name, found in file.rows.items():
        yield from _value_problems(name, {"rows": found.rows})
        if found.rows.ndim != 2 or len(found.rows) != len(found.indices):
            yield f"{name!r} has {len(found.indices)} indices of rows of {found.rows.shape}"


def _value_problems(owner: str, arrays: Mapping[str, np.ndarray | None]) -> Iterator[str]:
    for name, array in arrays.items():
        subject = f"{name} of {owner!r}" if owner else repr(name)
        if array is not None and not is_floating(array):
            yield f"{subject} is {array.dtype}, expected a floating dtype"
        elif array is not None and not np.isfinite(_narrow(array)).all():
            yield f"{subject} is not finite in float32"


def _narrow(array: np.ndarray) -> np.ndarray:
    """The array in float32 at most, as it is used here."""
    with np.errstate(over="ignore"):
        return array.astype(np.float32) if array.dtype == np.float64 else array


def _shape_problems(name: str, module: ModuleAdapter) -> Iterator[str]:
    a, b, ranks_of_b = module.a.shape, module.b.shape, module.b.shape[-1:]
    fits = {
        "linear": len(a) == 2 == len(b),
        "embedding": len(a) == 2 == len(b),
        "conv": len(a) >= 3 and len(b) == 2,
        "experts": len(a) == 3 == len(b) and a[:1] == b[:1],
    }[module.kind]
    if not fits or 0 in (*a, *b):
        yield f"{name!r} has A {a} and B {b}, which are no factors of a {module.kind} weight"
    elif (module.rank,) != ranks_of_b:
        yield f"{name!r} has A {a} of rank {module.rank} and B {b} of rank {ranks_of_b[0]}"
    for word, vector in (("magnitude", module.magnitude), ("bias", module.bias)):
        if fits and vector is not None and vector.shape != b[:-1]:
            yield f"{name!r} has a {word} of shape {vector.shape}, expected {b[:-1]}"
