"""The optimizer: AdamW under a warm-up and cosine schedule, clipped by the adapter's norm."""

import optax


def warmup_cosine(peak: float, steps: int, warmup: int, floor: float = 0.0) -> optax.Schedule:
    """Learning rate by update: a linear rise to ``peak``, then half a cosine down.

    Update i (from 0) of the warm-up has ``peak * (i + 1) / warmup``: the first update learns
    something, and the last of the warm-up has the peak.

    Args:
      peak: largest learning rate.
      steps: updates in the whole run.
      warmup: updates in the warm-up, fewer than ``steps``.
      floor: what the rate falls towards, as a share of ``peak``; update ``steps`` would have it.

    Source of the cosine: Loshchilov and Hutter, "SGDR", arXiv:1608.03983, without restarts.

    >>> schedule = warmup_cosine(1e-3, steps=12, warmup=2)
    >>> [round(float(schedule(i)) * 1e3, 3) for i in (0, 1, 2, 7, 12)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    fall = optax.cosine_decay_schedule(peak, max(steps - warmup, 1), alpha=floor)
    return optax.join_schedules([rise, fall], [warmup])


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    clip_norm: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW with torch's defaults after clipping by the global norm.

    It only ever sees the adapter: that is what freezes the base.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101.
    """
    decay = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(clip_norm), decay)
