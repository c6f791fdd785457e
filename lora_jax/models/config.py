"""What decides a decoder's shape and arithmetic, as one frozen value that needs no JAX."""

from dataclasses import dataclass

from lora_jax.errors import InputError

COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
_AT_LEAST_ONE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "max_positions",
    "scan_unroll",
)


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that decides the decoder's shape and arithmetic.

    Frozen and hashable, so it can key a compilation cache.

    Args:
        vocab_size: rows of the embedding table, and the width of the logits.
        hidden_size: width of the residual stream.
        intermediate_size: width of the gated MLP.
        num_layers: number of residual blocks, stacked and scanned.
        num_heads: query heads.
        num_kv_heads: key and value heads; each serves ``num_heads / num_kv_heads`` query heads.
        head_dim: width of one head, even; need not be ``hidden_size / num_heads``.
        rope_theta: base of the rotary wavelengths, in positions.
        rope_interleaved: rotate neighbours (0, 1), (2, 3), ... as the original rotary paper
            does, instead of the two halves (0, h/2), (1, h/2 + 1), ... as Hugging Face does.
        rms_norm_eps: added to the mean square before the root.
        tie_embeddings: the head contracts the embedding table; otherwise it has its own kernel.
        attention_bias: q, k, v and o projections carry a bias.
        mlp_bias: gate, up and down projections carry a bias.
        max_positions: longest row (prompt and answer together) the weights were trained for.
        dtype: compute dtype, one of ``float32``, ``bfloat16``, ``float16``. Norms, softmax and
            logits are float32 whatever it is, and parameters keep the dtype they are stored in.
        remat: recompute each block in the backward pass instead of keeping its activations.
        scan_unroll: blocks per iteration of the scan over layers.

    Raises:
        InputError: for sizes that can't make a decoder, all of them in one message.

    >>> DecoderConfig(vocab_size=320, hidden_size=64, intermediate_size=160, num_layers=2,
    ...               num_heads=4, num_kv_heads=3, head_dim=15)
    Traceback (most recent call last):
    ...
    lora_jax.errors.InputError: impossible decoder: num_heads=4 is not a multiple of \
num_kv_heads=3; head_dim=15 is odd, rotary embeddings rotate pairs
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rope_interleaved: bool = False
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    max_positions: int = 8192
    dtype: str = "float32"
    remat: bool = False
    scan_unroll: int = 1

    def __post_init__(self) -> None:
        if problems := _problems(self):
            raise InputError("impossible decoder: " + "; ".join(problems))


def _problems(config: DecoderConfig) -> list[str]:
    sizes = {name: getattr(config, name) for name in _AT_LEAST_ONE}
    if too_small := [f"{name}={n} is below 1" for name, n in sizes.items() if n < 1]:
        return too_small
    checks = {
        f"num_heads={config.num_heads} is not a multiple of num_kv_heads={config.num_kv_heads}": (
            config.num_heads % config.num_kv_heads
        ),
        f"head_dim={config.head_dim} is odd, rotary embeddings rotate pairs": config.head_dim % 2,
        f"rope_theta={config.rope_theta} is not positive": config.rope_theta <= 0,
        f"rms_norm_eps={config.rms_norm_eps} is negative": config.rms_norm_eps < 0,
        f"dtype={config.dtype!r} is none of {', '.join(COMPUTE_DTYPES)}": (
            config.dtype not in COMPUTE_DTYPES
        ),
    }
    return [problem for problem, holds in checks.items() if holds]
