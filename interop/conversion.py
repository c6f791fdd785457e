"""Tensors by name <-> parameters by path, as the tables of `interop.keymaps` say.

Everything about the tensors is checked before the first of them is read; a conversion holds one
tensor at a time beside its result.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from interop.adapter_file import FLOATS
from interop.copying import copy_into
from interop.keymap_faults import require_sound
from interop.keymaps import (
    Keymap,
    Rule,
    Shape,
    by_path,
    indices,
    tensor_name,
    tensor_shape,
    tensor_view,
)
from lora_jax.errors import InputError, raise_listed


class TensorInfo(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: Shape
    dtype: np.dtype


_LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_SHOWN_AT_MOST = 50


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of a nested dict under their paths.

    >>> flatten({"norm": {"scale": 1}})
    {'norm/scale': 1}
    """
    leaves = {}
    for key, value in params.items():
        path = f"{prefix}{key}"
        leaves |= flatten(value, f"{path}/") if isinstance(value, Mapping) else {path: value}
    return leaves


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict whose leaves stand at the given paths: the inverse of `flatten`.

    >>> nest({"norm/scale": 1, "norm/bias": 2})
    {'norm': {'scale': 1, 'bias': 2}}
    """
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def require_shapes(params: Mapping[str, Any], expected: Mapping[str, Shape]) -> None:
    """Raise one InputError naming every leaf that is missing, unexpected or of another shape."""
    shapes = {path: np.shape(leaf) for path, leaf in flatten(params).items()}
    wrong = [
        f"{path} is {shapes.get(path, 'missing')}, expected {expected.get(path, 'none')}"
        for path in sorted({*expected, *shapes})
        if expected.get(path) != shapes.get(path)
    ]
    if wrong:
        raise InputError(f"the parameters don't fit the config: {'; '.join(wrong)}")


def to_torch(params: Mapping[str, Any], table: Keymap) -> dict[str, np.ndarray]:
    """The tensors of ``params`` under ``table``'s names, one per layer, linear weights (out, in).

    Values are views of the leaves where NumPy can give one, so nothing is copied; linear
    weights are therefore transposed views, which `interop.torch_io` writes correctly and
    ``safetensors.numpy`` does not. Dtypes are kept exactly.

    Raises:
      InputError: leaves that the table has no rule for, or whose rules don't fit them, all of
        them named; leaves of other values that would be one tensor.

    >>> from interop.keymaps import LLAMA
    >>> weights = to_torch({"lm_head": {"kernel": np.zeros((4, 8))}}, LLAMA)
    >>> {name: array.shape for name, array in weights.items()}
    {'lm_head.weight': (8, 4)}
    """
    leaves = flatten(params)
    table = table.over(leaves)
    rules = by_path(table)
    if unknown := sorted(set(leaves) - set(rules)):
        raise InputError(f"no tensor name for {', '.join(unknown)}: the table has {sorted(rules)}")
    require_sound(table, {path: np.shape(leaf) for path, leaf in leaves.items()})
    named = [
        (name, tensor.reshape(tensor_shape(rule, np.shape(leaf))))
        for path, leaf in leaves.items()
        for rule in rules[path]
        for name, tensor in _tensors(rule, np.asarray(leaf))
    ]
    tensors = dict(named)
    raise_listed(
        "leaves that differ and would be one tensor",
        sorted({n for n, t in named if t is not tensors[n] and not np.array_equal(t, tensors[n])}),
    )
    return tensors


def from_torch(
    state_dict: Mapping[str, np.ndarray],
    table: Keymap,
    expected_shapes: Mapping[str, Shape],
    *,
    dtype: str | np.dtype | None = None,
) -> dict[str, Any]:
    """Parameters from named tensors: the inverse of `to_torch`.

    Args:
      state_dict: tensors by name.
      table: which name belongs to which leaf.
      expected_shapes: shape of every leaf by path, as `lora_jax.models.decoder.leaf_shapes` gives.
      dtype: dtype of the result; the tensors' own by default.

    Returns:
      A nested dict of new arrays; ``state_dict`` shares no memory with it.

    Raises:
      InputError: missing, unexpected, mis-shaped and non-floating-point tensors, all named;
        leaves that the table's rules don't fill exactly once.

    >>> from interop.keymaps import LLAMA
    >>> params = from_torch({"model.norm.weight": np.ones(4)}, LLAMA, {"norm/scale": (4,)})
    >>> params["norm"]["scale"].shape
    (4,)
    """
    found = {name: TensorInfo(array.shape, array.dtype) for name, array in state_dict.items()}
    return assemble(found, state_dict.__getitem__, table, expected_shapes, dtype=dtype)


def assemble(
    found: Mapping[str, TensorInfo],
    fetch: Callable[[str], np.ndarray],
    table: Keymap,
    expected_shapes: Mapping[str, Shape],
    *,
    dtype: str | np.dtype | None = None,
) -> dict[str, Any]:
    """Like `from_torch`, for tensors that are fetched by name one at a time.

    Everything is checked on ``found`` before the first fetch; each tensor goes straight into
    its leaf, so beside the result no more than one tensor is alive.
    """
    table = table.over(expected_shapes)
    require_sound(table, expected_shapes)
    rules = by_path(table)
    wanted = [(rule, shape) for path, shape in expected_shapes.items() for rule in rules[path]]
    _require_fit(found, fetch, table, wanted, same_dtype=dtype is None)
    leaves = {}
    for path, shape in expected_shapes.items():
        first = _names(rules[path][0], shape)[0]
        leaf = np.empty(shape, found[first].dtype if dtype is None else np.dtype(dtype))
        for rule in rules[path]:
            for name, target in _tensors(rule, leaf):
                copy_into(target, fetch(name).reshape(target.shape))
        leaves[path] = leaf
    return nest(leaves)


def _names(rule: Rule, shape: Shape) -> list[str]:
    return [tensor_name(rule, index) for index in indices(rule, shape)]


def _tensors(rule: Rule, leaf: np.ndarray) -> Iterable[tuple[str, np.ndarray]]:
    """Each tensor of the rule, by name, as a view of the leaf; axes that it has as one apart."""
    for index in indices(rule, leaf.shape):
        yield tensor_name(rule, index), tensor_view(rule, leaf, index)


def _require_fit(
    found: Mapping[str, TensorInfo],
    fetch: Callable[[str], np.ndarray],
    table: Keymap,
    wanted: list[tuple[Rule, Shape]],
    *,
    same_dtype: bool,
) -> None:
    """Raise one InputError for everything that keeps ``found`` from filling ``wanted``."""
    shapes = {n: tensor_shape(rule, shape) for rule, shape in wanted for n in _names(rule, shape)}
    present = {name: info for name, info in found.items() if name in shapes}
    extra = [n for n in found if n not in shapes and not _ignorable(n, table)]
    copies = {n: table.copies[n] for n in extra if table.copies.get(n) in present}
    problems = {
        "missing": [name for name in shapes if name not in found],
        "unexpected": [name for name in extra if name not in copies],
        "wrong shape": [
            f"{name} is {info.shape}, expected {shapes[name]}"
            for name, info in present.items()
            if info.shape != shapes[name]
        ],
        "not floating point": [
            f"{name} is {info.dtype}" for name, info in present.items() if info.dtype not in FLOATS
        ],
        "differing dtypes in one leaf": _mixed(found, wanted) if same_dtype else [],
        "not the copy it should be": [
            f"{name} of {original}"
            for name, original in copies.items()
            if not np.array_equal(fetch(name), fetch(original))
        ],
    }
    if any(problems.values()):
        lines = [
            f"{kind}: {', '.join(_grouped(names))}" for kind, names in problems.items() if names
        ]
        raise InputError("the tensors do not fit the model: " + "; ".join(lines))


def _ignorable(name: str, table: Keymap) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in table.ignored)


def _mixed(found: Mapping[str, TensorInfo], wanted: list[tuple[Rule, Shape]]) -> list[str]:
    names, dtypes = defaultdict(list), defaultdict(set)
    for rule, shape in wanted:
        names[rule.path].append(rule.name)
        dtypes[rule.path] |= {str(found[n].dtype) for n in _names(rule, shape) if n in found}
    return [
        f"{', '.join(names[path])} is {' and '.join(sorted(kinds))}"
        for path, kinds in dtypes.items()
        if len(kinds) > 1
    ]


def _grouped(lines: Iterable[str]) -> list[str]:
    """Lines that differ in a layer number only, written once: ``layers.{0..2,5}.norm``."""
    numbers = defaultdict(list)
    for line in lines:
        numbers[_LAYER_NUMBER.sub("{}", line, count=1)] += _LAYER_NUMBER.findall(line)[:1]
    grouped = [
        template.replace("{}", _ranges(found).join("{}") if len(found) > 1 else "".join(found), 1)
        for template, found in islice(numbers.items(), _SHOWN_AT_MOST)
    ]
    more = len(numbers) - len(grouped)
    return [*grouped, f"and {more} more"] if more else grouped


def _ranges(numbers: Iterable[str]) -> str:
    """Numbers in their order, those that follow one another as a range.

    >>> _ranges(["0", "1", "2", "5", "7"])
    '0..2,5,7'
    """
    runs: list[list[int]] = []
    for number in map(int, numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    shown = [
        ("," if run[-1] - run[0] == 1 else "..").join(map(str, run))
        for run in runs[:_SHOWN_AT_MOST]
    ]
    return ",".join([*shown, "..."] if len(runs) > len(shown) else shown)
