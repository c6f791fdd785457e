"""What a comparison with torch measured, what has to hold, and what does not."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from interop.differences import Difference, furthest

if TYPE_CHECKING:
    from interop.side_by_side import TrainingComparison


@dataclass(frozen=True)
class Criteria:
    """What has to hold for the two sides to count as the same function.

    Args:
      max_logit_difference: largest |ours - torch's| over all logits, base and adapted.
      min_effect: least value of the largest |adapted - base| over all logits.
      min_positions: tokens compared, all rows together.
      min_prompts: prompts answered.
      max_gradient_difference: largest ‖ours - torch's‖ / ‖torch's‖ of the gradient of any A or B.
      max_loss_difference: largest |ours - torch's| of the loss of any update.
      max_parameter_difference: as for the gradients, of any A or B after the last update.
    """

    max_logit_difference: float = 1e-3
    min_effect: float = 1.0
    min_positions: int = 256
    min_prompts: int = 5
    max_gradient_difference: float = 1e-3
    max_loss_difference: float = 1e-5
    max_parameter_difference: float = 1e-4


STANDARD = Criteria()


@dataclass(frozen=True)
class Flip:
    """The first token in which two greedy answers differ.

    ``margin`` is by how much torch's best logit exceeds its second best there, ``difference``
    the largest |ours - torch's| over the logits of this position.
    """

    ours: str
    theirs: str
    margin: float
    difference: float
    explained: bool
    """The two tokens are torch's two best, and ``margin`` is at most ``difference``."""


@dataclass(frozen=True)
class GreedyAnswer:
    """One prompt, continued by both sides with the most likely token each time."""

    prompt: str
    answer: str
    tokens: int
    agreeing: int
    """Tokens before the first that differs; the comparison stops there."""
    flip: Flip | None

    @property
    def agrees(self) -> bool:
        """Whether all tokens are the same, or the first other one is explained by rounding."""
        return self.flip is None or self.flip.explained


@dataclass(frozen=True)
class Comparison:
    """Ours against torch's, for the base or for the adapted model."""

    layers: tuple[Difference, ...]
    """Outputs (positions, hidden), named by their numbers."""
    max_logit_difference: float
    mean_logit_difference: float
    answers: tuple[GreedyAnswer, ...]


@dataclass(frozen=True)
class Report:
    """Everything that `verify` measured."""

    base: Comparison
    adapted: Comparison
    effect: float
    """Largest |adapted - base| over all logits of the torch side."""
    positions: int
    peft_warnings: tuple[str, ...]
    criteria: Criteria
    gradients: tuple[Difference, ...] = ()
    """Of A and B, if asked for."""
    training: "TrainingComparison | None" = None
    """Side by side from the adapter on, if asked for."""

    @property
    def reasons(self) -> tuple[str, ...]:
        """Every criterion that does not hold, in words."""
        return tuple(_reasons(self))

    @property
    def agrees(self) -> bool:
        """Whether every criterion holds."""
        return not self.reasons


def _reasons(report: Report) -> Iterator[str]:
    criteria = report.criteria
    if report.positions < criteria.min_positions:
        yield f"{report.positions} positions were compared, fewer than {criteria.min_positions}"
    if (prompts := len(report.base.answers)) < criteria.min_prompts:
        yield f"{prompts} prompts were answered, fewer than {criteria.min_prompts}"
    yield from _comparison_reasons("base", report.base, criteria)
    yield from _comparison_reasons("adapted model", report.adapted, criteria)
    if not report.effect > criteria.min_effect:
        yield (
            f"the adapter changes no logit by more than {report.effect:.2g}, which is not above "
            f"{criteria.min_effect:g}: agreement with torch says little"
        )
    yield from (f"PEFT warned: {message}" for message in report.peft_warnings)
    yield from _training_reasons(report)


def _training_reasons(report: Report) -> Iterator[str]:
    criteria, training = report.criteria, report.training
    limit = criteria.max_gradient_difference
    if apart := [each for each in report.gradients if not each.within(limit)]:
        worst = furthest(report.gradients)
        yield (
            f"{len(apart)} gradients differ from torch's by more than {limit:g}, most of all that "
            f"of {worst.name} by {worst.relative:.2g}"
        )
    if training is None:
        return
    if not training.loss_gap <= criteria.max_loss_difference:
        limit = criteria.max_loss_difference
        yield f"training: losses differ by up to {training.loss_gap:.2g}, more than {limit:g}"
    if not training.parameter_gap <= criteria.max_parameter_difference:
        yield (
            f"training: {furthest(training.final).name} ends {training.parameter_gap:.2g} apart, "
            f"more than {criteria.max_parameter_difference:g}"
        )
    if not training.moved > 0:
        yield "training moved nothing: agreement with torch says little"


def _comparison_reasons(name: str, comparison: Comparison, criteria: Criteria) -> Iterator[str]:
    difference, limit = comparison.max_logit_difference, criteria.max_logit_difference
    if not difference <= limit:
        yield f"{name}: logits differ from torch's by {difference:.2g}, more than {limit:g}"
    for number, answer in enumerate(comparison.answers, start=1):
        if (flip := answer.flip) and not flip.explained:
            yield (
                f"{name}: answer {number} differs at token {answer.agreeing + 1}: {flip.ours!r} "
                f"here, {flip.theirs!r} in torch, whose two best logits are {flip.margin:.2g} apart"
            )
