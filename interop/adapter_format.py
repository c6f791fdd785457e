"""What a format of adapter files is: how it is told, read and written, and what it can hold."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from interop import torch_io
from interop.adapter_file import FileAdapter, ModuleAdapter, is_floating, raise_all
from lora_jax.errors import InputError, listed
from lora_jax.files import write_text
from lora_jax.manifest import new_or_replaced, read_small_json

CONFIG = "adapter_config.json"
# What a directory's weights may be called, best first.
WEIGHT_FILES = (
    "adapters.safetensors",
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
    "adapter_model.bin",
    "adapter_model.pt",
    "pytorch_lora_weights.bin",
)
# Names of the modules that are embedding tables, where nothing else tells them from linear layers.
_TABLES = frozenset(
    ("embed_tokens", "tok_embeddings", "wte", "wpe", "word_embeddings", "token_embedding")
)


class BaseModule(NamedTuple):
    """A module of the base model: its kind, and the shape of its weight in torch."""

    kind: str
    shape: tuple[int, ...]


class Given(NamedTuple):
    """What some formats don't say, and their reader or writer has to be told."""

    alpha: float | None = None
    """``lora_alpha`` of training, where a file holds A and B alone."""
    base: Mapping[str, BaseModule] | None = None
    """The base's modules by torch name, as `interop.adapter_plan.base_modules` gives them: tells
    tables from linear layers, and what a flattened name stands for."""
    head_dim: int | None = None
    """Of the attention, where rows of q and k are in another order."""
    rotary: Literal["neighbours", "halves"] | None = None
    """Which coordinates torchtune's model turns together; by default what its model of the base's
    family does. MiniMind's generations are told by the names in their files."""
    any_order: bool = False
    """Rows of q and k may be in whatever order they are: norms and spectra don't depend on it."""
    enable_lora: Mapping[str, tuple[bool, ...]] = {}
    """Of loralib's MergedLinear, by the end of the module's name."""
    dtype: str | None = None
    """Of files that are written; the factors' own by default."""
    config: Any = None
    """The base's DecoderConfig, for GGUF files and torchtune's."""


class Content(NamedTuple):
    """An opened file or directory, not yet understood."""

    path: Path
    tensors: Mapping[str, np.ndarray]
    metadata: Mapping[str, str] = {}
    """Of a safetensors header."""
    config: Mapping[str, Any] = {}
    """Of the adapter_config.json in a directory."""


class Holds(NamedTuple):
    """What a format has a place for, beside A and B of linear layers."""

    kinds: frozenset[str] = frozenset(("linear",))
    dora: bool = False
    whole: bool = False
    shared_tables: bool = False


class Format(NamedTuple):
    """One format of adapter files."""

    about: str
    """A line for people: whose it is, and its files."""
    detect: Callable[[Content], bool]
    read: Callable[[Content, Given], FileAdapter]
    write: Callable[[Path, FileAdapter, Given], tuple[str, ...]] | None = None
    """Returns what was folded or converted, a sentence each."""
    holds: Holds = Holds()
    asks: tuple[str, ...] = ()
    """Of `Given`, what a person has to say or may say of such a file."""


def open_content(path: Path) -> Content:
    """Open an adapter file, or the weights and config of an adapter directory.

    Raises:
      InputError: nothing is there that could be an adapter, or it can't be read safely.
    """
    if path.is_dir():
        weights = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)
        if weights is None:
            raise InputError(f"{path} holds none of {', '.join(WEIGHT_FILES)}")
        has_config = (path / CONFIG).is_file()
        config = read_small_json(path / CONFIG) if has_config else {}
        return open_content(weights)._replace(path=path, config=config)
    return Content(path, *torch_io.read_all(path))


def by_module(
    content: Content, fields: Mapping[str, str], format: str, needed: tuple[str, ...] = ("a", "b")
) -> dict[str, dict[str, np.ndarray]]:
    """The tensors of each module, by field.

    Args:
      content: an opened file.
      fields: the field that a name's end stands for, such as ``{".lora_A": "a"}``.
      format: for messages.
      needed: fields without which a module is incomplete.

    Raises:
      InputError: tensors that are none of a module, modules that lack one, all named.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    unexpected, twice = [], []
    for name, tensor in content.tensors.items():
        end = next((end for end in fields if name.endswith(end)), "")
        if not end or name == end:
            unexpected.append(name)
            continue
        at = found.setdefault(name.removesuffix(end), {})
        twice += [name] if fields[end] in at else []
        at[fields[end]] = tensor
    ends = {field: end for end, field in [*fields.items()][::-1]}
    missing = {
        f"without {ends[field]!r}": [name for name, at in found.items() if field not in at]
        for field in needed
    }
    lines = {"unexpected tensors": unexpected, "under two names": twice, **missing}
    problems = [f"{word}: {listed(map(repr, names))}" for word, names in lines.items() if names]
    raise_all(f"{content.path} is no {format} adapter", problems)
    return found


def kind_of(module: str, given: Given) -> str:
    """The kind of a module whose factors look alike for linear layers and tables."""
    if given.base is not None:
        return given.base[module].kind if module in given.base else "linear"
    return "embedding" if module.rpartition(".")[2] in _TABLES else "linear"


def kind_notes(modules: Mapping[str, ModuleAdapter], given: Given) -> tuple[str, ...]:
    """A note where kinds were guessed by name."""
    tables = [name for name, module in modules.items() if module.kind == "embedding"]
    if given.base is not None or not tables:
        return ()
    return (f"{listed(map(repr, tables))}: taken for an embedding table by name",)


def alpha_of(given: Given, content: Content, format: str) -> float:
    """The alpha that the caller has to give.

    Raises:
      InputError: there is none, or it is no positive number.
    """
    if (alpha := checked_alpha(given)) is None:
        raise InputError(
            f"{content.path}: {format} files don't hold alpha: give it (--alpha), the "
            "lora_alpha of training (for a scale of 1 the rank)"
        )
    return alpha


def checked_alpha(given: Given) -> float | None:
    """The alpha that is given, if there is one; an InputError if it is no positive number."""
    alpha = given.alpha
    if alpha is None:
        return None
    if not (isinstance(alpha, Real) and alpha is not True and 0 < alpha < np.inf):
        raise InputError(f"alpha is {alpha!r}, expected a positive finite number")
    return float(alpha)


def head_problems(modules: Mapping[str, np.ndarray], head_dim: int) -> list[str]:
    """Why rows of B can't be put in another order, head by head."""
    if head_dim < 2 or head_dim % 2:
        return [f"head_dim is {head_dim}, expected a positive even number"]
    odd = [name for name, b in modules.items() if not b.ndim or b.shape[0] % head_dim]
    return [f"rows of {listed(map(repr, odd))} are no heads of {head_dim}"] if odd else []


def without_repeats(pairs: Iterable[tuple[str, Any]], content: Content) -> dict[str, Any]:
    """The pairs as a dict; an InputError if a module is in the file under two names."""
    pairs = [*pairs]
    counts = Counter(name for name, _ in pairs)
    repeated = [f"{name!r} is named twice" for name, count in counts.items() if count > 1]
    raise_all(f"{content.path} can't be read", repeated)
    return dict(pairs)


def rank_in(a: np.ndarray, axis: int = 0) -> int:
    """The rank of an A that hasn't been checked yet; 1 where it has none."""
    return max(a.shape[axis : axis + 1 or None], default=1) or 1


def unheld(file: FileAdapter, holds: Holds, format: str) -> Iterator[str]:
    """What of an adapter the format has no place for."""
    modules = file.modules.items()
    found = {
        "are of kinds it doesn't have": [n for n, m in modules if m.kind not in holds.kinds],
        "have DoRA magnitudes": [
            name for name, m in modules if m.magnitude is not None and not holds.dora
        ],
        "have a bias on B": [name for name, m in modules if m.bias is not None],
        "are trained whole": [] if holds.whole else [*file.whole],
        "are trained in some rows": [*file.rows],
    }
    for reason, names in found.items():
        if names:
            yield f"{format} files can't hold {listed(map(repr, names))}, which {reason}"
    if file.shares_tables and not holds.shared_tables:
        yield f"{format} files can't hold an adapted table that a tied head shares: untie it"


def in_dtype(tensors: Mapping[str, np.ndarray], given: Given) -> dict[str, np.ndarray]:
    """The tensors as they are written, sorted by name.

    Raises:
      InputError: naming those that the dtype can't hold.
    """
    import ml_dtypes

    known = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
    if given.dtype is not None and given.dtype not in known:
        raise InputError(f"dtype is {given.dtype!r}, expected one of {', '.join(known)}")
    with np.errstate(over="ignore"):
        cast = {
            name: np.asarray(tensors[name], known.get(given.dtype or "", tensors[name].dtype))
            for name in sorted(tensors)
        }
    raise_all(
        "the adapter can't be written",
        [f"{name!r} is not finite in {array.dtype}" for name, array in cast.items()
         if is_floating(array) and not np.isfinite(array).all()],
    )  # fmt: skip
    return cast


def save(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file or a torch pickle, whichever the suffix says."""
    if path.suffix in torch_io.PICKLES:
        torch_io.write_pickle(path, tensors)
    elif path.suffix == ".safetensors":
        torch_io.write(path, tensors, metadata)
    else:
        known = ", ".join((".safetensors", *torch_io.PICKLES))
        raise InputError(f"{path}: can't write tensors to this; expected {known}")


def save_directory(path: Path, name: str, tensors: Mapping[str, np.ndarray], config: str) -> None:
    """Write weights and an adapter_config.json as a directory, which is absent or empty before."""
    with new_or_replaced(path.absolute()) as folder:
        save(folder / name, tensors)
        write_text(folder / CONFIG, config)
