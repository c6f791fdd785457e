"""What has happened in a run so far: everything that a resumed one has to know of it."""

from dataclasses import dataclass, field
from typing import Any

from lora_jax.cli.tasks import Judgement


@dataclass
class History:
    """The record of a run, filled as it goes.

    Attributes:
      before: the base, judged.
      losses: of each update; None where it was not finite.
      heldout: held-out loss by updates done.
      seconds: of each update since this process started; not part of the record.
    """

    before: Judgement
    losses: list[float | None] = field(default_factory=list)
    heldout: dict[int, float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list, compare=False)

    @property
    def best(self) -> int | None:
        """The updates after which the held-out loss was lowest, the first of equals."""
        trained = {step: loss for step, loss in self.heldout.items() if step}
        return min(trained, key=trained.__getitem__) if trained else None

    def stale(self) -> int:
        """Evaluations since the best."""
        return sum(step > (self.best or 0) for step in self.heldout)

    def as_json(self) -> dict[str, Any]:
        """The record as it is now, as JSON values; `from_json` gives it back."""
        heldout = {str(step): loss for step, loss in self.heldout.items()}
        return {"before": self.before._asdict(), "losses": [*self.losses], "heldout": heldout}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "History":
        """The record that `as_json` wrote.

        >>> history = History(Judgement([], 2.5), [3.0], {0: 2.5, 10: 1.5})
        >>> History.from_json(history.as_json()) == history, history.best
        (True, 10)
        """
        heldout = {int(step): loss for step, loss in values["heldout"].items()}
        return cls(Judgement(**values["before"]), values["losses"], heldout)
