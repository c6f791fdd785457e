"""What is written about a run: one JSON line an update, and a picture of the loss."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_jax.files import atomic_file


def append_metrics(path: Path, **record: Any) -> None:
    """Append one JSON object as a line of ``path``.

    >>> import tempfile
    >>> log = Path(tempfile.mkdtemp()) / "metrics.jsonl"
    >>> append_metrics(log, step=1, loss=2.5)
    >>> log.read_text()
    '{"step": 1, "loss": 2.5}\\n'
    """
    with path.open("a", encoding="utf-8") as log:
        log.write(json.dumps(record, allow_nan=False) + "\n")


def plot_loss(path: Path, losses: Sequence[float | None], heldout: dict[int, float]) -> None:
    """Draw the loss over updates as a PNG, with the held-out loss at the updates it was taken.

    Args:
      path: where the picture goes.
      losses: mean loss a token of each update, nats; None where it was not finite.
      heldout: loss on the held-out rows by updates done; empty for none.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    finite = [math.nan if loss is None else loss for loss in losses]
    axes.plot(range(1, len(losses) + 1), finite, color="tab:blue", label="training")
    if heldout:
        steps, values = zip(*sorted(heldout.items()), strict=True)
        axes.plot(steps, values, "o--", color="tab:orange", label="held out")
        for step, value in heldout.items():
            axes.annotate(f"{value:.2f}", (step, value), xytext=(4, 6), textcoords="offset points")
    axes.set(xlabel="update", ylabel="loss (nats a token)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(path) as file:
        figure.savefig(file, dpi=120)
