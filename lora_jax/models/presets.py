"""Decoder configurations by name."""

from lora_jax.models.config import DecoderConfig
from lora_jax.models.forms import LayerKind, Rope

TINY = DecoderConfig(
    vocab_size=320,  # 256 bytes, then room for 64 special tokens
    hidden_size=64,
    intermediate_size=160,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_positions=512,
)

SMOLLM2_135M = DecoderConfig(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1_536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    layer_kinds=(LayerKind(Rope(100_000.0)),),
    max_positions=8_192,
)

PRESETS: dict[str, DecoderConfig] = {"tiny": TINY, "smollm2-135m": SMOLLM2_135M}
