"""The picture of a training side by side: the loss curves, and how far they are apart."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from interop.side_by_side import TrainingComparison

_FLOOR = 1e-8
"""Where an exact zero is drawn on the logarithmic axis."""
_COLORS = ("#d1495b", "#2e6f95", "#66a182", "#8d5a97")
_DASHES = ((0, (5, 3)), (2.5, (2, 3)), (0, (1, 2)), "-.")


def plot_training(
    path: str | os.PathLike,
    found: Mapping[str, TrainingComparison],
    *,
    title: str,
    loss_limit: float = 1e-5,
    parameter_limit: float = 1e-4,
) -> None:
    """Draw one run of ours beside those in torch as a PNG.

    Args:
      path: where it goes.
      found: from `interop.side_by_side.compare_runs`, at most four.
      title: what was trained on what.
      loss_limit: drawn among the differences of the loss.
      parameter_limit: drawn among the differences of A and B.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize="large")
    curves, losses, parameters = figure.subplots(
        3, 1, sharex=True, gridspec_kw={"height_ratios": [4, 3, 3]}
    )
    _curves(curves, found)
    gaps = {name: [u.loss_gap for u in each.updates] for name, each in found.items()}
    _gaps(losses, gaps, loss_limit, "loss\n|JAX − torch|")
    gaps = {name: [u.parameter_gap for u in each.updates] for name, each in found.items()}
    _gaps(parameters, gaps, parameter_limit, "furthest of A and B\n‖JAX − torch‖ / ‖torch‖")
    parameters.set_xlabel("update")
    figure.savefig(path, dpi=110)


def _curves(axes: Any, found: Mapping[str, TrainingComparison]) -> None:
    ours = [update.loss for update in next(iter(found.values())).updates]
    axes.plot(_numbers(ours), ours, color="#f2b134", linewidth=5, label="lora_jax")
    for (name, each), color, dash in zip(found.items(), _COLORS, _DASHES, strict=False):
        theirs = [update.their_loss for update in each.updates]
        axes.plot(_numbers(theirs), theirs, color=color, linestyle=dash, linewidth=1.6, label=name)
    axes.set_ylabel("loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()


def _gaps(axes: Any, gaps: Mapping[str, Sequence[float]], limit: float, label: str) -> None:
    sizes = range(8, 0, -2)  # The later ones inside the earlier ones, where they are alike.
    for values, color, size in zip(gaps.values(), _COLORS, sizes, strict=False):
        shown = np.maximum(values, _FLOOR)
        style = {"color": color, "markersize": size, "markeredgewidth": 1.2, "fillstyle": "none"}
        axes.plot(_numbers(shown), shown, "o", **style)
    axes.axhline(limit, color="black", linestyle="--", linewidth=1)
    axes.text(1, 1.25 * limit, f"limit {limit:g}", fontsize="small", va="bottom")
    highest = max(limit, *(np.nanmax(values, initial=0.0) for values in gaps.values()))
    axes.set(yscale="log", ylabel=label, ylim=(0.5 * _FLOOR, 8 * highest))
    ticks = [tick for tick in 10.0 ** np.arange(-8, 3) if tick <= 8 * highest]
    names = ["equal", *(f"$10^{{{round(np.log10(tick))}}}$" for tick in ticks[1:])]
    axes.set_yticks(ticks, names)
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def _numbers(values: Sequence[float] | np.ndarray) -> range:
    return range(1, len(values) + 1)
