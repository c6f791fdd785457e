"""What has happened in a run so far: everything that a resumed one has to know of it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lora_jax.cli.tasks import Judgement


@dataclass
class History:
    """The record of a run, filled as it goes.

    Attributes:
      before: the base, judged.
      losses: of each update; None where it was not finite.
      heldout: held-out loss by updates done; None where it was not finite.
      kept: updates of which there is a checkpoint, or was a worse one; not part of the record.
      seconds: of each update since this process started; not part of the record.
      gave_up: whether too many updates in a row were not finite since then; not part of it.
    """

    before: Judgement
    losses: list[float | None] = field(default_factory=list)
    heldout: dict[int, float | None] = field(default_factory=dict)
    kept: set[int] = field(default_factory=set, compare=False)
    seconds: list[float] = field(default_factory=list, compare=False)
    gave_up: bool = field(default=False, compare=False)

    @property
    def best(self) -> int | None:
        """The updates after which the held-out loss was lowest, the first of equals."""
        return self._best_of(step for step in self.heldout if step)

    def best_kept(self, *more: int) -> int | None:
        """The best of those that are kept, and of ``more``.

        >>> history = History(Judgement([], 2.5), [], {10: 1.5, 20: 1.0, 30: 1.2}, kept={10})
        >>> history.best, history.best_kept(), history.best_kept(30)
        (20, 10, 30)
        """
        return self._best_of(sorted({*self.kept, *more}))

    def _best_of(self, steps: Iterable[int]) -> int | None:
        losses = self.finite_heldout
        judged = [step for step in steps if step in losses]
        return min(judged, key=losses.__getitem__) if judged else None

    @property
    def finite_heldout(self) -> dict[int, float]:
        """The held-out losses that are numbers."""
        return {step: loss for step, loss in self.heldout.items() if loss is not None}

    def stale(self) -> int:
        """Evaluations since the best."""
        return sum(step > (self.best or 0) for step in self.heldout)

    def as_json(self) -> dict[str, Any]:
        """The record as it is now, as JSON values; `from_json` gives it back."""
        heldout = {str(step): loss for step, loss in self.heldout.items()}
        before = {**self.before._asdict(), "loss": finite(self.before.loss)}
        return {"before": before, "losses": [*self.losses], "heldout": heldout}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "History":
        """The record that `as_json` wrote.

        >>> history = History(Judgement([], 2.5), [3.0], {0: 2.5, 10: 1.5})
        >>> History.from_json(history.as_json()) == history, history.best
        (True, 10)
        """
        heldout = {int(step): _number(loss) for step, loss in values["heldout"].items()}
        before = Judgement(**values["before"])
        answers = [str(answer) for answer in before.answers]
        losses = [_number(loss) for loss in values["losses"]]
        return cls(Judgement(answers, _number(before.loss)), losses, heldout)


def finite(value: Any) -> Any:
    """The value as JSON has it: what is not finite is null.

    >>> finite(float("nan")), finite(1.5), finite(2)
    (None, 1.5, 2)
    """
    return value if not isinstance(value, float) or math.isfinite(value) else None


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
