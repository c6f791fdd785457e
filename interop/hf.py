"""Hugging Face directories and models <-> decoder config and parameters, for the Llama family."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from interop.hf_config import read_config, to_attributes
from interop.keymaps import LLAMA, flatten, from_torch, llama_shapes, to_torch
from interop.tokenizer import ChatTokenizer, token_ids, with_pad, write_tokenizer
from interop.torch_io import read_directory, write_directory
from lora_jax.errors import InputError
from lora_jax.files import atomic_directory, write_text
from lora_jax.models.config import DecoderConfig

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


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
    tensors = read_directory(directory)
    try:
        return config, from_torch(tensors, LLAMA, llama_shapes(config), dtype=dtype)
    except InputError as error:
        raise InputError(f"{directory}: {error}") from error


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
      InputError: parameters that don't fit the config, an arithmetic that Hugging Face's Llama
        doesn't have (interleaved rotations), a directory that holds something or can't be
        written.
    """
    tensors = _tensors(config, params)
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


def to_transformers(config: DecoderConfig, params: Mapping[str, Any]) -> "LlamaForCausalLM":
    """The same model in ``transformers``: float32, eval mode, made in memory.

    The weights are copies, so that whatever is done to the torch model leaves ``params`` alone.

    Raises:
      InputError: parameters that don't fit the config, or interleaved rotations.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    weights = {
        name: torch.from_numpy(np.array(array, np.float32, order="C"))
        for name, array in _tensors(config, params).items()
    }
    attributes = to_attributes(config, dtype="float32")
    shows_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = LlamaForCausalLM.from_pretrained(
            None, config=LlamaConfig(**attributes), state_dict=weights, dtype=torch.float32
        )
    finally:
        if shows_bars:
            logging.enable_progress_bar()
    return model.eval()


def _tensors(config: DecoderConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The parameters under their torch names, once they are known to fit the config."""
    expected = llama_shapes(config)
    shapes = {path: np.shape(leaf) for path, leaf in flatten(params).items()}
    wrong = [
        f"{path} is {shapes.get(path, 'missing')}, expected {expected.get(path, 'none')}"
        for path in sorted({*expected, *shapes})
        if expected.get(path) != shapes.get(path)
    ]
    if wrong:
        raise InputError(f"the parameters don't fit the config: {'; '.join(wrong)}")
    return to_torch(params, LLAMA)


def _common_dtype(tensors: Mapping[str, np.ndarray]) -> str:
    dtypes = {str(array.dtype) for array in tensors.values()}
    return dtypes.pop() if len(dtypes) == 1 else "float32"
