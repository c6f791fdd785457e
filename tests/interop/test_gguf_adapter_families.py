"""llama.cpp adapters of every family: names, architecture and order as its converter has them."""

import re

import gguf as gguf_package
import numpy as np
import pytest

from interop.adapter_file import FileAdapter, ModuleAdapter
from interop.conversion import nest, to_torch
from interop.families import keymap_of
from interop.gguf_adapter import read
from interop.gguf_adapter_writing import write
from interop.hf_config import from_attributes
from lora_jax.errors import InputError
from lora_jax.models.decoder import leaf_shapes

from small_models import to_neighbours

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
FIRST_SIZES = {"vocab_size": 48, "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
# As llama.cpp's converter does it: the architecture, and whether rows of q and k are reordered.
FAMILIES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "minimind": ("llama", False),
    "smollm3": ("smollm3", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "gemma": ("gemma", False),
    "gemma2": ("gemma2", False),
    "gemma3_text": ("gemma3", False),
    "phi3": ("phi3", None),
}


def adapter_of_family(config):
    """A random pair for every linear layer, by torch name."""
    generator = np.random.default_rng(2)
    params = {path: np.zeros(shape) for path, shape in leaf_shapes(config).items()}
    weights = to_torch(nest(params), keymap_of(config))
    modules = {
        name.removesuffix(".weight"): ModuleAdapter(
            *(generator.normal(size=s).astype(np.float32) for s in ((3, n), (m, 3))), 2.0
        )
        for name, (m, n) in ((name, w.shape) for name, w in weights.items() if w.ndim == 2)
        if "embed" not in name
    }
    return FileAdapter("random", modules)


@pytest.mark.parametrize(("family", "expected"), FAMILIES.items(), ids=FAMILIES)
def test_every_family_has_llama_cpps_names(tmp_path, family, expected):
    architecture, reorders = expected
    sizes = FIRST_SIZES if family == "minimind" else SIZES
    config = from_attributes({"model_type": family, **sizes})
    adapter = adapter_of_family(config)
    write(tmp_path / "a", adapter, config)
    back = read(tmp_path / "a", config).modules
    assert back.keys() == adapter.modules.keys()
    for name, module in adapter.modules.items():
        np.testing.assert_array_equal(back[name].a, module.a)
        np.testing.assert_array_equal(back[name].b, module.b)
    reader = gguf_package.GGUFReader(tmp_path / "a")
    assert reader.get_field("general.architecture").contents() == architecture
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    names = {name.partition(".weight")[0] for name in tensors if name.startswith(("blk.0", "out"))}
    fused = {"attn_qkv", "ffn_up"}
    apart = {"attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up"}
    in_layer = {"attn_output", "ffn_down", *(fused if family == "phi3" else apart)}
    head = set() if config.tie_embeddings else {"output"}
    assert names == {f"blk.0.{name}" for name in in_layer} | head
    if family != "phi3":
        name = next(n for n in adapter.modules if re.search(r"0.*(q_proj|wq)$", n))
        ours, stored = adapter.modules[name].b, tensors["blk.0.attn_q.weight.lora_b"]
        np.testing.assert_array_equal(stored, to_neighbours(ours, 4) if reorders else ours)


def test_a_family_that_is_not_implemented_is_named(tmp_path):
    sizes = {"vocab_size": 48, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    config = from_attributes({"model_type": "gpt2", **sizes})
    with pytest.raises(InputError, match="GGUF adapters of the family 'gpt2' are not implemented"):
        write(tmp_path / "a", FileAdapter("mine", {}), config)
