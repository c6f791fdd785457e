"""Small decoders with random parameters, and GGUF files of them as llama.cpp writes them."""

from functools import partial

import gguf
import jax
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as Kind

from interop.conversion import nest, to_torch
from interop.keymaps import LLAMA_GGUF
from lora_jax.models.decoder import Decoder, DecoderConfig, leaf_shapes
from lora_jax.models.forms import AttentionForm, LayerKind, MLPForm, NormForm, Rope

SMALL = DecoderConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    layer_kinds=(LayerKind(Rope(5e4)),),
    max_positions=128,
)
# Rows as long as the largest block of any quantisation.
BLOCKS = DecoderConfig(
    vocab_size=320,
    hidden_size=256,
    intermediate_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_positions=128,
)
VARIANTS = {
    "tied": {},
    "untied": {"tie_embeddings": False},
    "biases": {"attention": AttentionForm(bias=True), "mlp": MLPForm(bias=True)},
    "wide_heads": {"head_dim": 24, "num_kv_heads": 1, "norm": NormForm(eps=1e-3)},
}


def random_params(config, dtype="float32", seed=0):
    """Parameters large enough that every leaf shows in the logits."""
    generator = np.random.default_rng(seed)

    def leaf(path, shape):
        centre = 1.0 if path.endswith("scale") else 0.0
        width = 0.3 if len(shape) < 3 else shape[-2] ** -0.5
        return (centre + width * generator.normal(size=shape)).astype(dtype)

    return nest({path: leaf(path, shape) for path, shape in leaf_shapes(config).items()})


@partial(jax.jit, static_argnums=0)
def decoder_logits(config, params, tokens):
    return Decoder(config).apply({"params": params}, tokens)[0]


def to_neighbours(rows, heads):
    """What llama.cpp's convert_hf_to_gguf.py does to the rows of q and k."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def gguf_tensors(config, params):
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    for name, array in to_torch(params, LLAMA_GGUF).items():
        rotated = next((heads[part] for part in name.split(".") if part in heads), None)
        yield (
            name,
            np.ascontiguousarray(array if rotated is None else to_neighbours(array, rotated)),
        )


def stored(array, kind):
    """The array as a GGUF of that kind stores it: raw bytes, or floats that need no packing."""
    if kind == Kind.BF16:
        return array.astype(ml_dtypes.bfloat16).view(np.uint8)
    return gguf.quantize(array, kind)


def write_gguf(path, config, params, *, kind=Kind.F32, tokenizer=None, extra=()):
    """Vectors stay F32, as in llama.cpp's files; ``extra`` values are (key, value) pairs."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_freq_base(config.layer_kinds[0].rope.theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm.eps)
    writer.add_vocab_size(config.vocab_size)
    for key, value in extra:
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(key, value)
    if tokenizer is not None:
        _add_tokenizer(writer, *tokenizer)
    for name, array in gguf_tensors(config, params):
        if array.ndim == 1:
            writer.add_tensor(name, array.astype(np.float32))
        else:
            writer.add_tensor(name, stored(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer, pre, tokens, merges, control, user_defined):
    kinds = [3 if t in control else 4 if t in user_defined else 1 for t in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokens.index(control[0]))
    writer.add_eos_token_id(tokens.index(control[1]))
    writer.add_chat_template("{{ messages }}")
