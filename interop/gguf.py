"""GGUF models -> decoder config, parameters and tokenizer.

Rows of q and k come in llama.cpp's order and are put back into Hugging Face's.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from interop.conversion import TensorInfo, assemble
from interop.gguf_file import GgufFile, dequantised, open_gguf, require_dequantisable
from interop.gguf_tokenizer import chat_tokenizer
from interop.halves import to_halves
from interop.keymaps import LLAMA_GGUF
from interop.tokenizer import ChatTokenizer
from lora_jax.errors import InputError
from lora_jax.models.config import DecoderConfig
from lora_jax.models.decoder import leaf_shapes
from lora_jax.models.forms import AttentionForm, LayerKind, MLPForm, NormForm, Rope

ARCHITECTURES = ("llama",)

# Key below "llama." -> field of DecoderConfig, of its norm or of its rotation.
REQUIRED = {
    "block_count": "num_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_heads",
    "attention.layer_norm_rms_epsilon": "norm.eps",
    "context_length": "max_positions",
}
_HEAD_DIMS = ("rope.dimension_count", "attention.key_length", "attention.value_length")
_FIELDS = {
    **REQUIRED,
    "attention.head_count_kv": "num_kv_heads",
    "rope.freq_base": "theta",
    "vocab_size": "vocab_size",
    **dict.fromkeys(_HEAD_DIMS, "head_dim"),
}
# Keys that may only say that a thing isn't there.
_ABSENT = {
    "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0,
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.sliding_window": 0,
}
_ROTARY = re.compile(r"blk\.\d+\.attn_[qk]\.(weight|bias)")


def read(path: str | Path, *, dtype: str | None = None) -> tuple[DecoderConfig, dict[str, Any]]:
    """Config and parameters of a GGUF model, dequantised.

    Args:
      path: a GGUF file of the ``llama`` architecture; every tensor type that the ``gguf``
        package dequantises (F32, F16, BF16, Q8_0, Q4_0, Q4_1, the K-quants, ...).
      dtype: dtype of parameters and compute, ``float32`` by default.

    Returns:
      The config, and a nested dict of arrays in `interop.keymaps`' layout. Beside the result
      one dequantised tensor is in memory at a time.

    Raises:
      InputError: no GGUF file, one that is cut short, another architecture, attributes or
        tensor types that aren't implemented, tensors that don't fit.
    """
    file = open_gguf(path)
    config = read_config(file, dtype=dtype)
    return config, read_params(file, config)


def read_tokenizer(file: GgufFile) -> ChatTokenizer:
    """The tokenizer, chat template and special tokens of an opened file."""
    try:
        return chat_tokenizer(file.metadata)
    except InputError as error:
        raise InputError(f"{file.path}: {error}") from error


def read_config(file: GgufFile, *, dtype: str | None = None) -> DecoderConfig:
    """The decoder config that the metadata and the tensors of an opened file describe.

    Float values are the shortest decimals with the stored float32 value (1e-05, and not
    9.999999747378752e-06).
    """
    attributes = _attributes(file)
    _require_implemented(file, attributes)
    fields = {field: attributes[key] for key, field in _FIELDS.items() if key in attributes}
    derived = {
        "num_kv_heads": fields["num_heads"],
        "head_dim": fields["hidden_size"] // max(fields["num_heads"], 1),
        "vocab_size": len(file.metadata.get("tokenizer.ggml.tokens", ())),
    }
    theta = {"theta": fields.pop("theta")} if "theta" in fields else {}
    eps = fields.pop("norm.eps")
    try:
        return DecoderConfig(
            **{**derived, **fields},
            layer_kinds=(LayerKind(Rope(**theta)),),
            norm=NormForm(eps=eps),
            attention=AttentionForm(bias="blk.0.attn_q.bias" in file.tensors),
            mlp=MLPForm(bias="blk.0.ffn_gate.bias" in file.tensors),
            tie_embeddings="output.weight" not in file.tensors,
            dtype=dtype or "float32",
        )
    except InputError as error:
        raise InputError(f"{file.path}: {error}") from error


def read_params(file: GgufFile, config: DecoderConfig) -> dict[str, Any]:
    """The parameters of an opened file, in ``config.dtype``."""
    found = {name: TensorInfo(t.shape, np.dtype(np.float32)) for name, t in file.tensors.items()}
    require_dequantisable(file)

    def fetch(name: str) -> np.ndarray:
        values = dequantised(file, name)
        return to_halves(values, config.head_dim) if _ROTARY.fullmatch(name) else values

    try:
        return assemble(found, fetch, LLAMA_GGUF, leaf_shapes(config), dtype=config.dtype)
    except InputError as error:
        raise InputError(f"{file.path}: {error}") from error


def _attributes(file: GgufFile) -> dict[str, Any]:
    """The values below the architecture's own prefix."""
    architecture = file.metadata.get("general.architecture")
    prefix = f"{architecture}."
    attributes = {
        key.removeprefix(prefix): _plain(value)
        for key, value in file.metadata.items()
        if key.startswith(prefix)
    }
    if architecture not in ARCHITECTURES:
        described = ", ".join(f"{key}={value}" for key, value in attributes.items())
        raise InputError(
            f"{file.path}: architecture {architecture!r} is not implemented "
            f"(known: {', '.join(ARCHITECTURES)}); its attributes: {described or 'none'}"
        )
    return attributes


def _plain(value: Any) -> Any:
    """Floats at their shortest in float32, arrays as tuples, the rest as it is."""
    if isinstance(value, np.ndarray | list):
        return tuple(value)
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _require_implemented(file: GgufFile, attributes: Mapping[str, Any]) -> None:
    head_dims = {attributes[key] for key in _HEAD_DIMS if key in attributes}
    faults = {
        "missing": [key for key in REQUIRED if key not in attributes],
        "not implemented": [
            key
            for key, value in attributes.items()
            if key not in _FIELDS and value != _ABSENT.get(key)
        ],
        "not one number": [
            key
            for key in _FIELDS
            if key in attributes and not isinstance(attributes[key], int | float)
        ],
        "head sizes that differ": _HEAD_DIMS if len(head_dims) > 1 else (),
    }
    lines = [
        f"{fault}: " + ", ".join(f"{key}={attributes.get(key)!r}" for key in keys)
        for fault, keys in faults.items()
        if keys
    ]
    if lines:
        raise InputError(f"{file.path}: attributes {'; '.join(lines)}")
