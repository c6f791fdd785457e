"""Hugging Face directories and models <-> decoder config and parameters, of every family."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from interop.conversion import from_torch, require_shapes, to_torch
from interop.families import family_of, file_keymap, keymap_of
from interop.halves import in_halves
from interop.hf_config import read_config, to_attributes
from interop.keymaps import Keymap
from interop.tokenizer import ChatTokenizer, token_ids, with_pad, write_tokenizer
from interop.torch_io import read_directory, write_directory
from lora_jax.errors import InputError
from lora_jax.files import atomic_directory, write_text
from lora_jax.models.config import DecoderConfig
from lora_jax.models.decoder import leaf_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def read(
    directory: str | Path, *, dtype: str | None = None
) -> tuple[DecoderConfig, dict[str, Any]]:
    """Config and parameters of a Hugging Face model directory.

    Args:
      directory: holds ``config.json`` and weights, as one file or sharded; safetensors, or
        ``pytorch_model.bin`` with torch installed.
      dtype: dtype of parameters and compute. By default the parameters keep the dtypes they are
        stored in, and compute follows ``config.json``.

    Returns:
      The config, and a nested dict of new arrays in `interop.keymaps`' layout.

    Raises:
      InputError: no such model, attributes that aren't implemented (all of them, with their
        values), or tensors that don't fit.
    """
    config = read_config(directory, dtype=dtype)
    try:
        return config, params_of(config, read_directory(directory), dtype=dtype)
    except InputError as error:
        raise InputError(f"{directory}: {error}") from error


def params_of(
    config: DecoderConfig, tensors: Mapping[str, np.ndarray], *, dtype: str | None = None
) -> dict[str, Any]:
    """Parameters from the tensors of a checkpoint, as `interop.torch_io` reads them.

    Args:
      config: the decoder they belong to.
      tensors: by name. What wrappers put before every name (``module.``, ``_orig_mod.``) may be
        there, and what older files of the family leave out may be missing.
      dtype: dtype of the parameters; the tensors' own by default.

    Raises:
      InputError: tensors that don't fit, all of them.
    """
    named = _whole_names(tensors, family_of(config).prefix)
    table = file_keymap(config, named.keys())
    return from_torch(named, table, leaf_shapes(config), dtype=dtype)


def _whole_names(tensors: Mapping[str, np.ndarray], prefix: str) -> Mapping[str, np.ndarray]:
    """The tensors under the names that the family's class in transformers gives them."""
    for wrapper in ("module.", "_orig_mod."):
        if tensors and all(name.startswith(wrapper) for name in tensors):
            return _whole_names({n.removeprefix(wrapper): t for n, t in tensors.items()}, prefix)
    if any(name.startswith(prefix) for name in tensors):
        return tensors
    head = "lm_head."
    return {n if n.startswith(head) else prefix + n: tensor for n, tensor in tensors.items()}


def write(
    directory: str | Path,
    config: DecoderConfig,
    params: Mapping[str, Any],
    *,
    tokenizer: Tokenizer | None = None,
    chat_template: str = "",
    special_tokens: Mapping[str, str] | None = None,
    eos_ids: Sequence[int] = (),
    max_shard_bytes: int | None = None,
) -> None:
    """Write a directory that ``transformers`` loads: config, weights and tokenizer.

    The directory appears when everything in it is written. ``dtype`` in ``config.json`` is that
    of the parameters (``float32`` where they differ), so that loading changes no value.

    Args:
      directory: a new or empty directory.
      config: the decoder.
      params: its parameters; any array type that NumPy reads, any floating-point dtype.
      tokenizer: left out, no tokenizer files are written, and what follows is not used.
      chat_template: Jinja source, empty for none.
      special_tokens: text of ``bos``, ``eos``, ``pad`` and ``unk``.
      eos_ids: ids that end an answer.
      max_shard_bytes: largest size of a weight file; one file by default.

    Raises:
      InputError: parameters that don't fit the config, an arithmetic that the attributes of the
        config's family can't say, a directory that holds something or can't be written.
    """
    tensors = _tensors(config, params, file_keymap(config))
    attributes = to_attributes(config, dtype=_common_dtype(tensors))
    chat = None
    if tokenizer is not None:
        named = with_pad(special_tokens or {})
        chat = ChatTokenizer(tokenizer, chat_template, named, tuple(eos_ids))
        attributes |= token_ids(chat)
    with atomic_directory(directory) as target:
        if chat is not None:
            write_tokenizer(target, chat)
        write_text(target / "config.json", json.dumps(attributes, indent=2) + "\n")
        write_directory(target, tensors, max_shard_bytes=max_shard_bytes)


def to_transformers(config: DecoderConfig, params: Mapping[str, Any]) -> "PreTrainedModel":
    """The same model in ``transformers``: float32, eval mode, made in memory.

    The weights are copies, so that whatever is done to the torch model leaves ``params`` alone.
    A family that transformers doesn't have is computed by the one that has its arithmetic; rotated
    neighbours are brought into the order of rotated halves.

    Raises:
      InputError: parameters that don't fit the config, what the family can't say, or a family
        that transformers doesn't have.
    """
    import torch

    config, params = in_transformers(config, params)
    weights = {
        name: torch.from_numpy(np.array(array, np.float32, order="C"))
        for name, array in _tensors(config, params, keymap_of(config)).items()
    }
    model_class = _model_class(config)
    attributes = to_attributes(config, dtype="float32")
    own = model_class.config_class(**attributes)
    return _loaded(model_class, None, config=own, state_dict=weights)


def read_with_transformers(directory: str | Path, config: DecoderConfig) -> "PreTrainedModel":
    """The model of a directory as ``transformers`` reads it: float32, eval mode, nothing fetched.

    Args:
      directory: holds config.json and the weights.
      config: what was read from it here, whose family has the class.

    Raises:
      InputError: a family that transformers doesn't have.
    """
    return _loaded(_model_class(config), directory, local_files_only=True)


def _model_class(config: DecoderConfig) -> Any:
    import transformers

    name = family_of(config).architecture
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise InputError(f"transformers has no {name}, nor a class of its own that computes it")
    return model_class


def _loaded(model_class: Any, directory: Any, **options: Any) -> "PreTrainedModel":
    import torch
    from transformers.utils import logging

    shows_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = model_class.from_pretrained(directory, dtype=torch.float32, **options)
    finally:
        if shows_bars:
            logging.enable_progress_bar()
    return model.eval()


def in_transformers(
    config: DecoderConfig, params: Mapping[str, Any]
) -> tuple[DecoderConfig, Mapping[str, Any]]:
    """The same model in a family that transformers has: MiniMind as Llama or Qwen3."""
    if family_of(config).counterpart is None:
        return config, params
    return counterpart(config), in_halves(config, params)


def counterpart(config: DecoderConfig) -> DecoderConfig:
    """The config of `in_transformers`."""
    name = family_of(config).counterpart
    return config if name is None else replace(config, family=name, rope_interleaved=False)


def _tensors(
    config: DecoderConfig, params: Mapping[str, Any], table: Keymap
) -> dict[str, np.ndarray]:
    """The parameters under their torch names, once they are known to fit the config."""
    require_shapes(params, leaf_shapes(config))
    return to_torch(params, table)


def _common_dtype(tensors: Mapping[str, np.ndarray]) -> str:
    dtypes = {str(array.dtype) for array in tensors.values()}
    return dtypes.pop() if len(dtypes) == 1 else "float32"
