"""The picture of a sweep."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

LEGEND_ROWS = 24


def plot_curves(path: Path, curves: Mapping[str, Sequence[float]]) -> None:
    """Draw the loss of every adapter over updates as a PNG, the best in the darkest colour.

    The axis ends a little above where the adapters start, which is one loss for all, so that
    one which diverges doesn't flatten the others.

    Args:
      path: where the picture goes.
      curves: mean loss a token of each update, nats, by the adapter's name, best first; not a
        number where it was not finite.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, (name, losses) in enumerate(curves.items()):
        color = colormaps["viridis"](place / max(len(curves) - 1, 1) * 0.9)
        axes.plot(range(1, len(losses) + 1), losses, color=color, label=name, zorder=-place)
    starts = [losses[0] for losses in curves.values() if len(losses) and math.isfinite(losses[0])]
    axes.set(xlabel="update", ylabel="loss (nats a token)", ylim=(0, 1.2 * max(starts, default=1)))
    axes.grid(alpha=0.3)
    columns = math.ceil(len(curves) / LEGEND_ROWS)
    figure.legend(loc="outside right upper", title="best first", fontsize="small", ncols=columns)
    figure.savefig(path, dpi=120)
