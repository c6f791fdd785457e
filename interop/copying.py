"""Copies between arrays whose axes lie in different orders in memory, at about memory's speed."""

from collections.abc import Iterator

import numpy as np

_SIDES = {1: 512, 2: 512}
_SIDE = 256
"""Rows and columns of a block, by bytes of an element: blocks stay in the second-level cache."""
_CACHE_LINE = 64
_WORDS = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}


def copy_into(target: np.ndarray, source: np.ndarray) -> None:
    """``target[...] = source`` for arrays of one shape; dtypes may differ.

    NumPy follows the order of one of the two, so that a transposing copy takes a cache line from
    the other for each element. Here such a copy goes block by block through a small buffer, whose
    rows are longer than a block by a cache line: with rows of a power of two bytes, as weights
    have, the elements of a column would all claim the same place in the cache.

    >>> target = np.empty((300, 400), np.float32)
    >>> copy_into(target, np.arange(120_000, dtype=np.float32).reshape(400, 300).T)
    >>> target[1, :3].tolist()
    [1.0, 301.0, 601.0]
    """
    target, source = _as_words(target, source)
    along, across = _fastest_axis(target), _fastest_axis(source)
    if along == across or min(target.shape[along], target.shape[across]) < _SIDE // 8:
        target[...] = source
        return
    rest = [axis for axis in range(target.ndim) if axis not in (along, across)]
    targets = target.transpose(*rest, across, along)
    sources = source.transpose(*rest, across, along)
    side = _SIDES.get(target.itemsize, _SIDE)
    stage = np.empty((side, side + _CACHE_LINE // target.itemsize), target.dtype)
    for index in np.ndindex(targets.shape[:-2]):
        _copy_blocks(targets[index], sources[index], stage)


def in_pieces(
    array: np.ndarray, most: int, scratches: Iterator[np.ndarray]
) -> Iterator[np.ndarray]:
    """The values in C order and the machine's byte order, as flat pieces one after the other.

    An array that lies so is its own only piece; of another each is copied into a scratch.

    Args:
      array: any.
      most: bytes of a piece that is copied; at least an item of the array.
      scratches: what the pieces are copied into in turn, each (most,) uint8.

    >>> from itertools import repeat
    >>> pieces = in_pieces(np.arange(4).reshape(2, 2).T, 16, repeat(np.empty(16, np.uint8)))
    >>> [piece.tolist() for piece in pieces]
    [[0, 2], [1, 3]]
    """
    native = array.dtype.newbyteorder("=")
    if array.flags.c_contiguous and array.dtype == native:
        yield array.reshape(-1)
        return
    for part in _parts(array, most):
        piece = next(scratches)[: part.nbytes].view(native)
        copy_into(piece.reshape(part.shape), part)
        yield piece


def _parts(array: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """The array cut along its first axes into parts of at most so many bytes."""
    if array.nbytes <= most:
        yield array
        return
    rows = max(1, most // array[0].nbytes)
    for row in range(0, len(array), rows):
        yield from _parts(array[row : row + rows] if rows > 1 else array[row], most)


def _as_words(target: np.ndarray, source: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as unsigned integers where only bits are moved, which NumPy copies fastest."""
    word = _WORDS.get(target.itemsize)
    if word is None or target.dtype != source.dtype:
        return target, source
    return target.view(word), source.view(word)


def _fastest_axis(array: np.ndarray) -> int:
    """The axis along which neighbours are nearest in memory."""
    long = [axis for axis in range(array.ndim) if array.shape[axis] > 1]
    return min(long, key=lambda axis: (abs(array.strides[axis]), -axis), default=0)


def _copy_blocks(target: np.ndarray, source: np.ndarray, stage: np.ndarray) -> None:
    """Copy a matrix whose rows are contiguous from one whose columns are."""
    (rows, columns), side = target.shape, len(stage)
    for column in range(0, columns, side):
        for row in range(0, rows, side):
            block = target[row : row + side, column : column + side]
            staged = stage[: block.shape[1], : block.shape[0]]
            staged[...] = source[row : row + side, column : column + side].T
            block[...] = staged.T
