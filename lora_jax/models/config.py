"""What decides a decoder's shape and arithmetic, as one frozen value that needs no JAX."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

from lora_jax.errors import InputError
from lora_jax.models.forms import (
    AttentionForm,
    ExpertsForm,
    LayerKind,
    LongScaling,
    MLPForm,
    NormForm,
    Rope,
)

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
        intermediate_size: width of the MLP.
        num_layers: number of residual blocks, stacked and scanned.
        num_heads: query heads.
        num_kv_heads: key and value heads; each serves ``num_heads / num_kv_heads`` query heads.
        head_dim: width of one head; even where it is rotated; need not be
            ``hidden_size / num_heads``.
        layer_kinds: rotation and window of the layers, from the first on and over again.
        rope_interleaved: rotate neighbours (0, 1), (2, 3), ... as the original rotary paper
            does, instead of the two halves (0, h/2), (1, h/2 + 1), ... as Hugging Face does.
        position_offset: rows before that of position 0 in a learned table of positions, added
            to the embeddings; None: no such table.
        norm: how features are normed.
        attention: how queries, keys and values are made and compared.
        mlp: the feed-forward block.
        experts: a mixture of experts in its place, with its activation; None: none.
        scale_embeddings: embeddings are multiplied by √hidden_size.
        logit_softcap: logits are bent to stay within ± this; None: they aren't.
        tie_embeddings: the head contracts the embedding table; otherwise it has its own kernel.
        max_positions: longest row (prompt and answer together) the weights were trained for.
        family: whose names and attributes a checkpoint of it has (`interop.families`); nothing
            is computed from it.
        dtype: compute dtype, one of ``float32``, ``bfloat16``, ``float16``. Norms, softmax and
            logits are float32 whatever it is, and parameters keep the dtype they are stored in.
        remat: recompute each block in the backward pass instead of keeping its activations.
        scan_unroll: blocks per iteration of the scan over layers.
        expert_products: ``scan``, a layer's experts one after another, each over all tokens, with
            zeros for those that don't meet it: the work of all experts, under any transformation;
            ``ragged``, tokens sorted by expert and `jax.lax.ragged_dot`: on accelerators the work
            of the experts that tokens meet, but JAX doesn't vmap it over adapters.

    Raises:
        InputError: for sizes that can't make a decoder, all of them in one message.

    >>> DecoderConfig(vocab_size=320, hidden_size=64, intermediate_size=160, num_layers=2,
    ...               num_heads=4, num_kv_heads=3, head_dim=15)
    Traceback (most recent call last):
    ...
    lora_jax.errors.InputError: impossible decoder: num_heads=4 is not a multiple of \
num_kv_heads=3; head_dim=15 can't be rotated whole by pairs
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layer_kinds: tuple[LayerKind, ...] = (LayerKind(),)
    rope_interleaved: bool = False
    position_offset: int | None = None
    norm: NormForm = NormForm()
    attention: AttentionForm = AttentionForm()
    mlp: MLPForm = MLPForm()
    experts: ExpertsForm | None = None
    scale_embeddings: bool = False
    logit_softcap: float | None = None
    tie_embeddings: bool = True
    max_positions: int = 8192
    family: str = "llama"
    dtype: str = "float32"
    remat: bool = False
    scan_unroll: int = 1
    expert_products: Literal["scan", "ragged"] = "scan"

    def __post_init__(self) -> None:
        if problems := _problems(self):
            raise InputError("impossible decoder: " + "; ".join(problems))

    @property
    def kind_of_layer(self) -> tuple[LayerKind, ...]:
        """The kind of every layer, in order."""
        kinds = self.layer_kinds
        return tuple(kinds[layer % len(kinds)] for layer in range(self.num_layers))


def rotated_features(config: DecoderConfig, rope: Rope) -> int:
    """How many of a head's features are rotated."""
    return int(config.head_dim * rope.fraction)


def _problems(config: DecoderConfig) -> list[str]:
    sizes = {name: getattr(config, name) for name in _AT_LEAST_ONE}
    if too_small := [f"{name}={n} is below 1" for name, n in sizes.items() if n < 1]:
        return too_small
    checks = {
        f"num_heads={config.num_heads} is not a multiple of num_kv_heads={config.num_kv_heads}": (
            config.num_heads % config.num_kv_heads
        ),
        f"norm.eps={config.norm.eps} is negative": config.norm.eps < 0,
        f"dtype={config.dtype!r} is none of {', '.join(COMPUTE_DTYPES)}": (
            config.dtype not in COMPUTE_DTYPES
        ),
    }
    found = [problem for problem, holds in checks.items() if holds]
    experts = _expert_problems(config.experts) if config.experts else []
    return [*found, *_unknown_choices(config), *_layer_problems(config), *experts]


def _unknown_choices(config: DecoderConfig) -> Iterable[str]:
    for name, form, field in (
        ("norm", config.norm, "kind"),
        ("mlp", config.mlp, "kind"),
        ("mlp", config.mlp, "activation"),
        ("", config, "expert_products"),
    ):
        known, value = get_args(get_type_hints(type(form))[field]), getattr(form, field)
        if value not in known:
            yield f"{name}.{field}={value!r} is none of {', '.join(known)}".lstrip(".")


def _expert_problems(form: ExpertsForm) -> Iterable[str]:
    for name in ("count", "per_token", "width"):
        if (size := getattr(form, name)) < 1:
            yield f"experts.{name}={size} is below 1"
    if form.per_token > form.count:
        yield f"experts.per_token={form.per_token} is more than experts.count={form.count}"
    if form.shared_width < 0:
        yield f"experts.shared_width={form.shared_width} is negative"


def _layer_problems(config: DecoderConfig) -> Iterable[str]:
    if not config.layer_kinds:
        yield "layer_kinds is empty: give one kind for all layers"
    for kind in dict.fromkeys(config.layer_kinds):
        if kind.window is not None and kind.window < 1:
            yield f"window={kind.window} is below 1: a token looks at itself at least"
    ropes = dict.fromkeys(kind.rope for kind in config.layer_kinds if kind.rope)
    for rope in ropes:
        yield from _rope_problems(config, rope)
    if len(widths := {rotated_features(config, rope) for rope in ropes}) > 1:
        yield f"layers rotate {' and '.join(map(str, sorted(widths)))} features of a head"


def _rope_problems(config: DecoderConfig, rope: Rope) -> Iterable[str]:
    if rope.theta <= 0:
        yield f"rope theta={rope.theta} is not positive"
    rotated = rotated_features(config, rope)
    if rotated % 2 or not 0 < rotated <= config.head_dim:
        part = "whole" if rope.fraction == 1 else f"for a part of {rope.fraction}"
        yield f"head_dim={config.head_dim} can't be rotated {part} by pairs"
    if isinstance(rope.scaling, LongScaling):
        for name in ("short_factor", "long_factor"):
            if (count := len(getattr(rope.scaling, name))) != rotated // 2:
                yield f"{name} has {count} entries for {rotated // 2} frequencies"
