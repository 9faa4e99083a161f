"""Several networks as one that averages their probabilities, beside the best of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from digitdist.evaluate.evaluating import Scores
from digitdist.evaluate.result import Evaluation
from digitdist.evaluate.statistics import SIGNIFICANT, mcnemar, p_in_words


def mean_probabilities(members: Sequence[Tensor]) -> Tensor:
    """The mean, float64 [n, classes], of the probabilities that each of the `members` gives, float32 or float64 [n, classes].

    They are sorted before they are summed, so that the order of the members has no influence on any bit. What one member gives
    comes back as it is.
    """
    return torch.stack([probabilities.double() for probabilities in members]).sort(0).values.mean(0)


def average(members: Sequence[Scores]) -> Scores:
    """What the ensemble of several networks makes of the images that each of them was given."""
    first = members[0]
    assert all(torch.equal(member.index, first.index) and torch.equal(member.label, first.label) for member in members)
    mean = mean_probabilities([member.log_probability.double().exp() for member in members])
    return Scores(first.index, first.label, mean.log())


@dataclass(frozen=True)
class Comparison:
    """An ensemble beside the best of its members, that of number `best`: how many images only one of the two predicts right.

    `held_out`: it was chosen by images that the members' trainings held out. Else it was chosen on these same images, which
    favours it: a member that was only lucky here looks better than it is.
    """

    best: int
    held_out: bool
    only_ensemble: int
    only_best: int

    @property
    def p_value(self) -> float:
        """McNemar's, exact."""
        return mcnemar(self.only_ensemble, self.only_best)

    def __str__(self) -> str:
        chosen = "held-out images" if self.held_out else "these same images, which favours it"
        better = "the ensemble" if self.only_ensemble > self.only_best else "that run"
        finding = f"{better} is better" if self.p_value < SIGNIFICANT else "no difference shown"
        counts = f"{self.only_ensemble:,} images only the ensemble got right, {self.only_best:,} only that run"
        return f"the best of them on {chosen}: {finding}, {p_in_words(self.p_value)} (McNemar); {counts}"


def compare_with_best(ensemble: Evaluation, members: Sequence[Evaluation], held_out: Sequence[float | None] = ()) -> Comparison:
    """The ensemble beside the member with the highest accuracy on held-out images, `held_out`, where all have one; else beside
    that with the most of these images right, of several such the one with the lowest loss."""
    known = [accuracy for accuracy in held_out if accuracy is not None]
    chosen_by_them = len(known) == len(members)
    scores = [(a, 0.0) for a in known] if chosen_by_them else [(float(m.correct), -m.mean_loss) for m in members]
    best = max(range(len(members)), key=lambda number: scores[number])
    right, theirs = (result.label == result.prediction for result in (ensemble, members[best]))
    return Comparison(best, chosen_by_them, int((right & ~theirs).sum()), int((theirs & ~right).sum()))
