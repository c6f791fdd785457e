"""How loralib's layers lay out A and B, brought to plain factors and back without loss.

================  =========================================  ================================
layer             in the file                                as plain factors
================  =========================================  ================================
Linear            A (r, in), B (out, r)                      the same
Embedding         A (r, vocabulary), B (features, r)         the same
MergedLinear      A (r·n, in), B (n·out/slots, r), n of its  rank r·n, B in blocks, rows of
                  slots enabled, B of each after the other   slots that are not enabled zero
ConvLoRA          A (r·k, in·k), B (out/groups·k, r·k), and  rank r·k² (without groups): each
                  ΔW is (B A) read as the weight's shape     piece of a kernel has its own A
================  =========================================  ================================

Source: the layers of https://github.com/microsoft/LoRA, loralib 0.1.2.
"""

import math
from typing import NamedTuple

import numpy as np

from lora_jax.errors import InputError


class Factors(NamedTuple):
    """A and B, and the r by which loralib divides alpha."""

    a: np.ndarray
    b: np.ndarray
    r: int


def from_merged(a: np.ndarray, b: np.ndarray, enabled: tuple[bool, ...]) -> Factors:
    """Plain factors of a MergedLinear.

    >>> a, b = np.ones((2, 4)), np.ones((4, 1))
    >>> from_merged(a, b, (True, False, True)).b.T
    array([[1., 1., 0., 0., 0., 0.],
           [0., 0., 0., 0., 1., 1.]])
    """
    slots, r = _slots(enabled), b.shape[1]
    if a.shape[0] != r * len(slots) or b.shape[0] % len(slots):
        raise InputError(f"A {a.shape} and B {b.shape} are no factors for enable_lora={enabled}")
    width = b.shape[0] // len(slots)
    whole = np.zeros((len(enabled), width, len(slots), r), b.dtype)
    for block, slot in enumerate(slots):
        whole[slot, :, block] = b.reshape(len(slots), width, r)[block]
    return Factors(a, whole.reshape(len(enabled) * width, len(slots) * r), r)


def to_merged(a: np.ndarray, b: np.ndarray, enabled: tuple[bool, ...]) -> Factors:
    """The factors of a MergedLinear: the inverse of `from_merged`."""
    slots = _slots(enabled)
    if a.shape[0] % len(slots) or b.shape[0] % len(enabled):
        raise InputError(f"A {a.shape} and B {b.shape} can't be cut for enable_lora={enabled}")
    r, width = a.shape[0] // len(slots), b.shape[0] // len(enabled)
    whole = b.reshape(len(enabled), width, len(slots), r)
    blocks = np.stack([whole[slot, :, block] for block, slot in enumerate(slots)])
    found = Factors(a, blocks.reshape(len(slots) * width, r), r)
    if not np.array_equal(from_merged(a, found.b, enabled).b, b):
        raise InputError(f"B isn't made of one block for each slot of enable_lora={enabled}")
    return found


def from_conv(a: np.ndarray, b: np.ndarray, weight: tuple[int, ...]) -> Factors:
    """Factors (rank, in, \\*kernel) and (out, rank) of a ConvLoRA, whose weight has that shape.

    B A is read row by row as the weight. Cut into pieces that lie in one row and in one output,
    each pair of a piece's place there and here is a plain factor of its own.
    """
    kernel, (out, *inputs) = weight[-1], weight
    row, of_output = a.shape[1], math.prod(inputs)
    if a.shape[0] % kernel or b.shape[0] * row != out * of_output:
        raise InputError(f"A {a.shape} and B {b.shape} are no factors of a kernel of {weight}")
    piece = math.gcd(row, of_output)
    in_row, in_output = row // piece, of_output // piece
    rows, places = np.divmod(np.arange(out * in_output).reshape(out, in_output), in_row)
    pairs = sorted({(s, c) for s in range(in_output) for c in places[:, s].tolist()})
    wide = np.zeros((len(pairs), a.shape[0], in_output, piece), a.dtype)
    narrow = np.zeros((out, len(pairs), a.shape[0]), b.dtype)
    for k, (s, c) in enumerate(pairs):
        wide[k, :, s] = a[:, c * piece : (c + 1) * piece]
        narrow[:, k] = np.where((places[:, s] == c)[:, None], b[rows[:, s]], 0)
    return Factors(wide.reshape(-1, *inputs), narrow.reshape(out, -1), a.shape[0] // kernel)


def to_conv(a: np.ndarray, b: np.ndarray) -> Factors:
    """The factors of a ConvLoRA without groups, of the least r that is sure to hold them.

    What `from_conv` made comes back as it was; other factors keep their rank as r.
    """
    if a.ndim != 4 or a.shape[2] != a.shape[3]:
        raise InputError(f"loralib adapts 2-d kernels with equal sides alone, A is {a.shape}")
    (rank, inputs, kernel, _), out = a.shape, b.shape[0]
    pieces = a.reshape(rank, kernel, inputs * kernel)
    if (shared := _shared_factor(pieces)) is not None:
        of_piece = rank // kernel
        return Factors(shared, b.reshape(out * kernel, of_piece), of_piece // kernel)
    of_piece = np.eye(kernel, dtype=bool)[None, :, None, :]
    spread = np.where(of_piece, b[:, None, :, None], b.dtype.type(0))
    return Factors(pieces.reshape(rank * kernel, -1), spread.reshape(out * kernel, -1), rank)


def _shared_factor(pieces: np.ndarray) -> np.ndarray | None:
    """The A that every piece of the kernel has, each in ranks of its own; ``None`` if not so."""
    rank, kernel, row = pieces.shape
    if rank % kernel**2:
        return None
    by_piece = pieces.reshape(kernel, rank // kernel, kernel, row)
    shared = by_piece[0, :, 0]
    expected = np.zeros_like(by_piece)
    for k in range(kernel):
        expected[k, :, k] = shared
    return shared if np.array_equal(by_piece, expected) else None


def _slots(enabled: tuple[bool, ...]) -> list[int]:
    slots = [slot for slot, on in enumerate(enabled) if on]
    if not slots:
        raise InputError(f"enable_lora={enabled} enables nothing, expected at least one slot")
    return slots
