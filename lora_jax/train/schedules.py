"""Learning rates by update, each after a stated reference."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax.errors import InputError
from lora_jax.paths import nearest

Share = Callable[..., Any]
"""``(count, steps, warmup, floor, xp) -> learning rate as a share of the peak``."""


def schedule(
    name: str, peak: float, steps: int, warmup: float = 0, floor: float = 0.0
) -> optax.Schedule:
    """The learning rate as a function of the updates done so far.

    A count that is a JAX array gives float32, as an optimizer needs it inside a compiled step.
    A Python number or a NumPy array gives float64 on the host, without JAX: this is what the
    references compute, and what a log should show.

    Args:
      name: a key of `SCHEDULES`. ``cosine``, ``linear`` and ``constant`` give update i (from 0)
        of a warm-up of w updates ``peak * (i + 1) / w``, so that the first one learns something;
        ``hf_cosine``, ``hf_linear`` and ``hf_constant`` give it ``peak * i / w``, which starts
        from 0, as Hugging Face's Trainer does. ``minimind`` gives
        ``peak/10 + peak/2 * (1 + cos(pi * (i + 1) / steps))``: 1.1 peaks before the first
        update, a tenth after the last.
      peak: largest learning rate of the warm-up.
      steps: updates in the whole run; later ones keep the last rate.
      warmup: updates in the warm-up, or, below 1, their share of ``steps``, rounded up.
      floor: where the rate ends, as a share of ``peak``; update ``steps`` would have it.

    Raises:
      InputError: an unknown name, a number out of its range, or a warm-up or a floor for a
        schedule that has none.

    Source: Loshchilov and Hutter, "SGDR", arXiv:1608.03983 (cosine, without restarts);
    `transformers.get_{cosine,linear,constant}_schedule_with_warmup` and
    `get_cosine_with_min_lr_schedule_with_warmup` (``hf_*``); MiniMind's ``get_lr``.

    >>> rate = schedule("cosine", 1e-3, steps=12, warmup=2)
    >>> [round(float(rate(i)) * 1e3, 3) for i in (0, 1, 2, 7, 12)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    >>> schedule("hf_linear", 1.0, steps=10, warmup=0.2)(np.arange(5)).tolist()
    [0.0, 0.5, 1.0, 0.875, 0.75]
    """
    problems = list(_problems(name, peak, steps, warmup, floor))
    if problems:
        raise InputError("; ".join(problems))
    share, updates = SCHEDULES[name], warmup_updates(warmup, steps)

    def rate(count: Any) -> Any:
        xp, dtype = (jnp, jnp.float32) if isinstance(count, jax.Array) else (np, np.float64)
        return peak * share(xp.asarray(count, dtype), steps, updates, floor, xp)

    return rate


def warmup_updates(warmup: float, steps: int) -> int:
    """Updates in a warm-up given as a number of updates or, below 1, as a share of ``steps``.

    Source: `transformers.TrainingArguments.get_warmup_steps`.

    >>> warmup_updates(0.1, 25), warmup_updates(40, 100)
    (3, 40)
    """
    return int(warmup) if warmup >= 1 else math.ceil(steps * warmup)


def _cosine(progress: Any, xp: ModuleType) -> Any:
    return 0.5 * (1 + xp.cos(math.pi * progress))


def _linear(progress: Any, xp: ModuleType) -> Any:
    return 1 - progress


def _constant(progress: Any, xp: ModuleType) -> Any:
    return xp.ones_like(progress)


def _warmed(
    fall: Callable[[Any, ModuleType], Any],
    first: int,
    count: Any,
    steps: int,
    warmup: int,
    floor: float,
    xp: ModuleType,
) -> Any:
    progress = xp.clip((count - warmup) / max(steps - warmup, 1), 0, 1)
    fallen = floor + (1 - floor) * fall(progress, xp)
    return xp.where(count < warmup, (count + first) / max(warmup, 1), fallen)


def _minimind(count: Any, steps: int, warmup: int, floor: float, xp: ModuleType) -> Any:
    return 0.1 + _cosine(xp.minimum((count + 1) / steps, 1), xp)


SCHEDULES: dict[str, Share] = {
    "cosine": partial(_warmed, _cosine, 1),
    "linear": partial(_warmed, _linear, 1),
    "constant": partial(_warmed, _constant, 1),
    "hf_cosine": partial(_warmed, _cosine, 0),
    "hf_linear": partial(_warmed, _linear, 0),
    "hf_constant": partial(_warmed, _constant, 0),
    "minimind": _minimind,
}
"""Every schedule by its name."""

_WITHOUT_WARMUP = {"minimind"}
_WITHOUT_FLOOR = {"constant", "hf_constant", "minimind"}


def _problems(name: str, peak: float, steps: int, warmup: float, floor: float) -> Iterable[str]:
    if name not in SCHEDULES:
        known = ", ".join(SCHEDULES)
        yield f"no schedule {name!r} (nearest: {nearest(name, SCHEDULES, 1) or known})"
    if not (0 <= peak < math.inf):
        yield f"the peak learning rate is {peak}, expected a finite number of at least 0"
    if steps < 1:
        yield f"steps is {steps}, expected at least 1"
    if not (0 <= warmup < 1 or (1 <= warmup <= steps and warmup == int(warmup))):
        yield (
            f"warmup is {warmup}, expected a share below 1, or a whole number of updates up to "
            f"the run's {steps}"
        )
    if not 0 <= floor <= 1:
        yield f"floor is {floor}, expected a share of the peak between 0 and 1"
    if warmup and name in _WITHOUT_WARMUP:
        yield f"{name!r} has no warm-up, got {warmup}: leave it at 0"
    if floor and name in _WITHOUT_FLOOR:
        yield f"{name!r} has no floor to choose, got {floor}: leave it at 0"
