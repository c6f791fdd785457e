"""Frequencies of rotary positions, plain and stretched, made in NumPy while a program is built."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lora_jax.models.config import DecoderConfig, rotated_features
from lora_jax.models.forms import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    Rope,
    YarnScaling,
)


class Frequencies(NamedTuple):
    """What turns positions into angles.

    Attributes:
        per_feature: float32 (pairs,), radians a position.
        amplitude: factor of cosine and sine.
        longer: the frequencies of a row longer than ``longest``; None: all rows are alike.
        longest: longest row that ``per_feature`` serves.
    """

    per_feature: np.ndarray
    amplitude: float = 1.0
    longer: np.ndarray | None = None
    longest: int = 0


def frequencies(config: DecoderConfig, rope: Rope) -> Frequencies:
    """theta^(-2i/h), stretched as the scaling says.

    Source: Su et al., RoFormer, https://arxiv.org/abs/2104.09864.

    >>> from lora_jax.models.presets import TINY
    >>> frequencies(TINY, Rope(theta=1e8)).per_feature[:3].tolist()
    [1.0, 0.10000000149011612, 0.009999999776482582]
    """
    width = rotated_features(config, rope)
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    waves = np.power(np.float32(rope.theta), exponents)
    if rope.scaling is None:
        return Frequencies((1.0 / waves).astype(np.float32))
    return _SCALED[type(rope.scaling)](waves, rope, rope.scaling)


def _linear(waves: np.ndarray, _: Rope, scaling: LinearScaling) -> Frequencies:
    return Frequencies((1.0 / waves / np.float32(scaling.factor)).astype(np.float32))


def _dynamic(waves: np.ndarray, _: Rope, __: DynamicScaling) -> Frequencies:
    return Frequencies((1.0 / waves).astype(np.float32))


def _llama3(waves: np.ndarray, _: Rope, scaling: Llama3Scaling) -> Frequencies:
    plain = 1.0 / waves.astype(np.float64)
    turns = scaling.original_max_positions * plain / (2 * math.pi)  # within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return Frequencies((plain * (kept + (1 - kept) / scaling.factor)).astype(np.float32))


def _yarn(waves: np.ndarray, rope: Rope, scaling: YarnScaling) -> Frequencies:
    pairs = len(waves)
    low, high = (
        _feature_turning(turns, rope.theta, 2 * pairs, scaling.original_max_positions)
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    steps = np.arange(pairs, dtype=np.float64)
    stretched = np.clip((steps - low) / ((high - low) or 0.001), 0.0, 1.0)
    plain = 1.0 / waves.astype(np.float64)
    mixed = plain * (1 - stretched + stretched / scaling.factor)
    return Frequencies(mixed.astype(np.float32), _yarn_amplitude(scaling))


def _feature_turning(turns: float, theta: float, width: int, positions: int) -> float:
    """The pair of features, as a real number, that turns so often within so many positions."""
    return width * math.log(positions / (turns * 2 * math.pi)) / (2 * math.log(theta))


def _yarn_amplitude(scaling: YarnScaling) -> float:
    def grown(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return grown(scaling.mscale) / grown(scaling.mscale_all_dim)
    return grown(1.0)


def _long(waves: np.ndarray, _: Rope, scaling: LongScaling) -> Frequencies:
    short, long = (
        (1.0 / (np.asarray(factors, np.float32) * waves)).astype(np.float32)
        for factors in (scaling.short_factor, scaling.long_factor)
    )
    longest = scaling.original_max_positions
    amplitude = scaling.attention_factor
    if amplitude is None:
        grown = max(scaling.factor, 1.0)
        amplitude = math.sqrt(1 + math.log(grown) / math.log(longest))
    return Frequencies(short, amplitude, long, longest)


_SCALED: dict[type, Callable[[np.ndarray, Rope, Any], Frequencies]] = {
    LinearScaling: _linear,
    DynamicScaling: _dynamic,
    Llama3Scaling: _llama3,
    YarnScaling: _yarn,
    LongScaling: _long,
}
