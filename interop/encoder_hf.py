"""Hugging Face directories and models <-> encoder config and parameters: BERT and RoBERTa."""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from interop.conversion import from_torch, require_shapes, to_torch
from interop.encoder_hf_config import encoder_family, read_config, to_attributes
from interop.encoder_keymaps import BARE, encoder_keymap, encoder_shapes
from interop.keymaps import Keymap
from interop.torch_io import read_directory, write_directory
from lora_jax.errors import InputError, raise_listed
from lora_jax.files import atomic_directory, write_text
from lora_jax.models.encoder_config import EncoderConfig

# Names of a LayerNorm's parameters in checkpoints that came from TensorFlow.
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def read(
    directory: str | Path, *, dtype: str | None = None
) -> tuple[EncoderConfig, dict[str, Any]]:
    """Config and parameters of a Hugging Face directory with a BERT or a RoBERTa.

    A model that fills masks gives its encoder, without a head:
    `lora_jax.models.classifier.with_classifier` adds a fresh one.

    Args:
      directory: holds ``config.json`` and weights, as one file or sharded; safetensors, or
        ``pytorch_model.bin`` with torch installed.
      dtype: dtype of parameters and compute. By default the parameters keep the dtypes they are
        stored in, and compute follows ``config.json``.

    Returns:
      The config, and a nested dict of new arrays.

    Raises:
      InputError: no such model, attributes that aren't implemented (all of them, with their
        values), or tensors that don't fit.
    """
    config = read_config(directory, dtype=dtype)
    tensors = _with_new_names(directory, read_directory(directory))
    config, table = _found(config, tensors)
    try:
        return config, from_torch(tensors, table, encoder_shapes(config), dtype=dtype)
    except InputError as error:
        raise InputError(f"{directory}: {error}") from error


def write(
    directory: str | Path,
    config: EncoderConfig,
    params: Mapping[str, Any],
    *,
    max_shard_bytes: int | None = None,
) -> None:
    """Write a directory that ``transformers`` loads: config and weights.

    ``dtype`` in ``config.json`` is that of the parameters (``float32`` where they differ), so
    that loading changes no value.

    Args:
      directory: a new or empty directory.
      config: the encoder.
      params: its parameters; any array type that NumPy reads, any floating-point dtype.
      max_shard_bytes: largest size of a weight file; one file by default.

    Raises:
      InputError: parameters that don't fit the config, a head that goes with the other family's
        positions, a directory that holds something or can't be written.
    """
    tensors = _tensors(config, params)
    dtypes = {str(array.dtype) for array in tensors.values()}
    attributes = to_attributes(config, dtype=dtypes.pop() if len(dtypes) == 1 else "float32")
    with atomic_directory(directory) as target:
        write_text(target / "config.json", json.dumps(attributes, indent=2) + "\n")
        write_directory(target, tensors, max_shard_bytes=max_shard_bytes)


def to_transformers(config: EncoderConfig, params: Mapping[str, Any]) -> Any:
    """The same model in ``transformers``: float32, eval mode, made in memory.

    The weights are copies, so that whatever is done to the torch model leaves ``params`` alone.

    Raises:
      InputError: parameters that don't fit the config, or a head that goes with the other
        family's positions.
    """
    import torch
    import transformers

    weights = {
        name: torch.from_numpy(np.array(array, np.float32, order="C"))
        for name, array in _tensors(config, params).items()
    }
    attributes = to_attributes(config, dtype="float32")
    settings = transformers.AutoConfig.for_model(**attributes)
    options = {} if config.head != "none" else {"add_pooling_layer": config.pooler}
    made = getattr(transformers, attributes["architectures"][0])(settings, **options)
    made.load_state_dict(weights)
    return made.eval()


def _found(config: EncoderConfig, tensors: Mapping[str, Any]) -> tuple[EncoderConfig, Keymap]:
    """What ``config.json`` doesn't say: whether there is a pooler, and how the names begin."""
    if config.head != "none":
        return config, encoder_keymap(config)
    _, family = encoder_family(config)
    prefix = family.prefix if any(n.startswith(family.prefix) for n in tensors) else ""
    rules = tuple(rule._replace(name=prefix + rule.name) for rule in BARE.rules)
    pooler = f"{prefix}pooler.dense.weight" in tensors
    return replace(config, pooler=pooler), Keymap(rules, (*BARE.ignored, family.other_heads))


def _with_new_names(directory: str | Path, tensors: Mapping[str, Any]) -> dict[str, Any]:
    names: dict[str, list[str]] = defaultdict(list)
    for name in tensors:
        names[_new_name(name)].append(name)
    twice = (" and ".join(old) for old in names.values() if len(old) > 1)
    raise_listed(f"{directory}: names of one and the same tensor, of which one must go", twice)
    return {name: tensors[old] for name, (old,) in names.items()}


def _new_name(name: str) -> str:
    for old, new in _OLD_NAMES.items():
        name = name.replace(old, new)
    return name


def _tensors(config: EncoderConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The parameters under their torch names, once they are known to fit the config."""
    require_shapes(params, encoder_shapes(config))
    return to_torch(params, encoder_keymap(config))
