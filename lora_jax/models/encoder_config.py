"""What decides an encoder's shape and arithmetic, as one frozen value that needs no JAX."""

from dataclasses import dataclass

from lora_jax.errors import InputError
from lora_jax.models.config import COMPUTE_DTYPES

ENCODER_ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
HEADS = ("none", "pooled", "dense")
_AT_LEAST_ONE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "max_positions",
    "type_vocab_size",
    "scan_unroll",
)
_SHARES = ("hidden_dropout", "attention_dropout", "classifier_dropout")


@dataclass(frozen=True)
class EncoderConfig:
    """Everything that decides the encoder's shape and arithmetic.

    Frozen and hashable, so it can key a compilation cache.

    Args:
        vocab_size: rows of the table of words.
        hidden_size: width of the residual stream, a multiple of ``num_heads``.
        intermediate_size: width inside the MLP.
        num_layers: number of blocks, stacked and scanned.
        num_heads: attention heads.
        max_positions: rows of the table of positions.
        type_vocab_size: rows of the table of token types.
        layer_norm_eps: added to the variance before the root.
        activation: inside the MLP, one of ``gelu``, ``gelu_tanh``, ``relu``, ``silu``.
        padding_id: the token that fills rows up.
        positions_skip_padding: positions count the tokens that aren't ``padding_id``, from
            ``padding_id + 1``, and padding itself has position ``padding_id``: RoBERTa. Otherwise
            they count every token, from 0: BERT.
        pooler: a dense layer and tanh over the first token.
        head: ``none``; ``pooled``, a linear layer over the pooler's output (BERT); ``dense``, a
            dense layer, tanh and a linear layer over the first token (RoBERTa).
        labels: names of the classes, in order; as many logits.
        hidden_dropout, attention_dropout, classifier_dropout: shares dropped where a key for
            dropout is given.
        dtype: compute dtype, one of ``float32``, ``bfloat16``, ``float16``. Norms, softmax and
            logits are float32 whatever it is, and parameters keep the dtype they are stored in.
        remat: recompute each block in the backward pass instead of keeping its activations.
        scan_unroll: blocks per iteration of the scan over layers.

    Raises:
        InputError: for values that can't make an encoder, all of them in one message.

    >>> EncoderConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_layers=2,
    ...               num_heads=3, max_positions=32, head="pooled")
    Traceback (most recent call last):
    ...
    lora_jax.errors.InputError: impossible encoder: hidden_size=16 is not a multiple of \
num_heads=3; head='pooled' has no labels: name at least one
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_positions: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    activation: str = "gelu"
    padding_id: int = 0
    positions_skip_padding: bool = False
    pooler: bool = True
    head: str = "none"
    labels: tuple[str, ...] = ()
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    classifier_dropout: float = 0.0
    dtype: str = "float32"
    remat: bool = False
    scan_unroll: int = 1

    def __post_init__(self) -> None:
        if problems := _problems(self):
            raise InputError("impossible encoder: " + "; ".join(problems))

    @property
    def longest_row(self) -> int:
        """How many tokens a row may have."""
        unused = self.padding_id + 1 if self.positions_skip_padding else 0
        return self.max_positions - unused


def _problems(config: EncoderConfig) -> list[str]:
    sizes = {name: getattr(config, name) for name in _AT_LEAST_ONE}
    if too_small := [f"{name}={n} is below 1" for name, n in sizes.items() if n < 1]:
        return too_small
    shares = {name: getattr(config, name) for name in _SHARES}
    headless = config.head == "none"
    checks = {
        f"hidden_size={config.hidden_size} is not a multiple of num_heads={config.num_heads}": (
            config.hidden_size % config.num_heads
        ),
        f"layer_norm_eps={config.layer_norm_eps} is negative": config.layer_norm_eps < 0,
        f"activation={config.activation!r} is none of {', '.join(ENCODER_ACTIVATIONS)}": (
            config.activation not in ENCODER_ACTIVATIONS
        ),
        f"head={config.head!r} is none of {', '.join(HEADS)}": config.head not in HEADS,
        f"head={config.head!r} has no labels: name at least one": (
            not headless and not config.labels
        ),
        f"labels={config.labels} without a head": headless and config.labels,
        "head='pooled' needs pooler=True": config.head == "pooled" and not config.pooler,
        f"padding_id={config.padding_id} is not in the vocabulary of {config.vocab_size}": (
            not 0 <= config.padding_id < config.vocab_size
        ),
        f"max_positions={config.max_positions} leaves no position beyond that of padding": (
            config.positions_skip_padding and config.max_positions < config.padding_id + 2
        ),
        **{
            f"{name}={share} is not in [0, 1)": not 0 <= share < 1 for name, share in shares.items()
        },
        f"dtype={config.dtype!r} is none of {', '.join(COMPUTE_DTYPES)}": (
            config.dtype not in COMPUTE_DTYPES
        ),
    }
    return [problem for problem, holds in checks.items() if holds]
