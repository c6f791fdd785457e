"""What a stage learns from, what it came to, and its lines on the screen."""

from collections.abc import Callable
from typing import Any, NamedTuple

from minimind_modes import Batch
from minimind_options import Options
from minimind_training import Record


class Lesson(NamedTuple):
    """The rows of a stage as it trains on them, and as they are judged."""

    trained: list[Batch]
    judged: list[Batch]


class Outcome(NamedTuple):
    """What a stage came to."""

    records: list[Record]
    before: float
    """Loss of the next token, whatever the mode trains."""
    after: float


def printer(lesson: Lesson, options: Options) -> Callable[[Record, Any], None]:
    """Prints the line of an update, as the notebook does."""
    batches, epochs, every = len(lesson.trained), options.epochs, max(options.log_interval, 1)

    def show(record: Record, _: Any) -> None:
        if record.batch % every and record.batch != batches:
            return
        print(
            f"Epoch:[{record.epoch}/{epochs}]({record.batch}/{batches}), "
            f"loss: {record.loss:.4f}, logits_loss: {record.logits_loss:.4f}, "
            f"aux_loss: {record.aux_loss:.4f}, lr: {record.learning_rate:.8f}, "
            f"time: {record.seconds:.2f}s"
        )

    return show


def moved(before: float, after: float) -> str:
    """How a stage changed what it is judged by."""
    return f"loss of the next token {before:.4f} -> {after:.4f}"
