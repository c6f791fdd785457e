"""What tells one family of decoders from another: small frozen values that need no JAX.

======================  ========================================================================
`LayerKind`             what one layer sees: how its positions are rotated, how far back it looks
`Rope`                  rotary positions, and how they are stretched (`LinearScaling`, ...)
`NormForm`              how features are normed, and where besides before attention and MLP
`AttentionForm`         biases, one fused projection, scale and cap of the scores
`MLPForm`               gated or plain, its activation, biases
`ExpertsForm`           a mixture of experts in the MLP's place
======================  ========================================================================
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LinearScaling:
    """Every frequency divided by ``factor``."""

    factor: float


@dataclass(frozen=True)
class DynamicScaling:
    """A base that grows with rows beyond the model's positions; up to there nothing changes.

    Source: NTK-aware scaling as Hugging Face's ``dynamic``. Longer rows are refused.
    """

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Long waves divided by ``factor``, short ones kept, a ramp between: Llama 3.1."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class YarnScaling:
    """Long waves divided by ``factor``, short ones kept, a ramp over the features between.

    Source: Peng et al., YaRN, https://arxiv.org/abs/2309.00071.
    """

    factor: float
    original_max_positions: int
    attention_factor: float | None = None
    """Factor of cosine and sine; None: from ``factor``, ``mscale`` and ``mscale_all_dim``."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    """Round the ends of the ramp to whole features."""


@dataclass(frozen=True)
class LongScaling:
    """Each frequency divided by a factor of its own: one list for short rows, one for long.

    Source: Ding et al., LongRoPE, https://arxiv.org/abs/2402.13753.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_positions: int
    """Longest row that the short factors serve."""
    factor: float
    attention_factor: float | None = None
    """Factor of cosine and sine; None: √(1 + ln factor / ln original_max_positions)."""


Scaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | LongScaling


@dataclass(frozen=True)
class Rope:
    """Rotary positions.

    Args:
        theta: base of the wavelengths, in positions.
        scaling: how the wavelengths are stretched.
        fraction: part of each head, from its first feature on, that is rotated.
    """

    theta: float = 10_000.0
    scaling: Scaling | None = None
    fraction: float = 1.0


@dataclass(frozen=True)
class LayerKind:
    """What one layer sees of the row.

    Args:
        rope: None for a layer that rotates nothing.
        window: how many positions a token looks at, its own included; None for all before it.
    """

    rope: Rope | None = Rope()
    window: int | None = None


@dataclass(frozen=True)
class NormForm:
    """How features are normed.

    Args:
        kind: ``rms``; ``rms_plus_one``, whose scale is stored less one; or ``layer``, which
            takes off the mean and adds a bias.
        eps: added to the mean square before the root.
        after: attention's and the MLP's outputs are normed too, before they join the residual
            stream.
        heads: queries and keys are normed head by head, before they are rotated.
    """

    kind: Literal["rms", "rms_plus_one", "layer"] = "rms"
    eps: float = 1e-5
    after: bool = False
    heads: bool = False


@dataclass(frozen=True)
class AttentionForm:
    """How queries, keys and values are made and compared.

    Args:
        bias: the q, k and v projections carry a bias.
        out_bias: the o projection carries one; None: as ``bias`` says.
        fused: q, k and v are one projection, whose output is cut in three.
        query_scalar: scores are divided by the root of this; None: of ``head_dim``.
        softcap: scores are bent to stay within ± this; None: they aren't.
    """

    bias: bool = False
    out_bias: bool | None = None
    fused: bool = False
    query_scalar: float | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class MLPForm:
    """down(activation(gate(x)) · up(x)), or down(activation(up(x))).

    Args:
        kind: ``gated``; ``fused``, gated with gate and up as one projection; or ``plain``.
        activation: ``gelu_tanh`` is the approximation that GPT-2 and Gemma use.
        bias: every projection carries a bias.
    """

    kind: Literal["gated", "fused", "plain"] = "gated"
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    bias: bool = False


@dataclass(frozen=True)
class ExpertsForm:
    """A feed-forward block of which each token meets a few experts, gated MLPs without biases.

    Args:
        count: experts of a layer.
        per_token: experts that a token meets, those of the largest probability.
        width: inside each expert.
        renormalised: the probabilities of a token's experts are divided by their sum.
        shared_width: inside the expert that every token meets; 0 where there is none.
    """

    count: int
    per_token: int
    width: int
    renormalised: bool = False
    shared_width: int = 0
