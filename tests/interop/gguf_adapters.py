"""Random adapters of small decoders, and GGUF files of them written with the gguf package."""

import re

import gguf
import numpy as np

from interop.adapter_file import FileAdapter, ModuleAdapter
from interop.conversion import to_torch
from interop.keymaps import LLAMA

from small_models import random_params, to_neighbours

# As llama.cpp's converter names them.
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "lm_head": "output",
}


def gguf_name(module):
    for ours, theirs in GGUF_NAMES.items():
        if module.endswith(ours):
            layer = re.findall(r"layers\.(\d+)\.", module)
            return "".join(f"blk.{i}." for i in layer) + f"{theirs}.weight"
    raise KeyError(module)


def random_adapter(config, *, rank=4, scale=1.5, seed=1):
    """An adapter of every matrix; ``rank`` and ``scale`` are numbers or functions of the name.

    Values are of few bits, so that float16 holds them.
    """
    generator = np.random.default_rng(seed)
    modules = {}
    for name, weight in to_torch(random_params(config), LLAMA).items():
        module = name.removesuffix(".weight")
        if weight.ndim != 2 or (config.tie_embeddings and module == "model.embed_tokens"):
            continue
        r = rank(module) if callable(rank) else rank
        kind = "embedding" if module == "model.embed_tokens" else "linear"
        outputs, inputs = weight.shape[::-1] if kind == "embedding" else weight.shape
        a, b = (
            generator.integers(-8, 9, shape).astype(np.float32) / 32
            for shape in ((r, inputs), (outputs, r))
        )
        modules[module] = ModuleAdapter(a, b, scale(module) if callable(scale) else scale, kind)
    return FileAdapter("random", modules)


def stored_factors(adapter, config):
    """A and B by their names in a file, in llama.cpp's order and orientation."""
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    found = {}
    for module, pair in adapter.modules.items():
        name = gguf_name(module)
        rotated = next((heads[part] for part in name.split(".") if part in heads), None)
        found[f"{name}.lora_a"] = pair.a.T if pair.kind == "embedding" else pair.a
        found[f"{name}.lora_b"] = to_neighbours(pair.b, rotated) if rotated else pair.b
    return found


IDENTITY = {"general.type": "adapter", "adapter.type": "lora"}


def write_with_package(path, tensors, *, alpha=6.0, architecture="llama", metadata=None, kind=None):
    """``metadata`` of ``None`` values are left out; ``kind`` is a GGML type, F32 by default."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (IDENTITY | (metadata or {})).items():
        if value is not None:
            _ADD[type(value)](writer, key, value)
    if alpha is not None:
        (writer.add_float32 if isinstance(alpha, float) else writer.add_uint32)(
            "adapter.lora.alpha", alpha
        )
    kind = gguf.GGMLQuantizationType.F32 if kind is None else kind
    for name, array in tensors.items():
        array = np.ascontiguousarray(array)
        if array.dtype != np.float32:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_ADD = {
    str: gguf.GGUFWriter.add_string,
    int: gguf.GGUFWriter.add_uint32,
    float: gguf.GGUFWriter.add_float32,
    list: gguf.GGUFWriter.add_array,
}
