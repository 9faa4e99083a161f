"""Statistics of predictions, each with its source."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SIGNIFICANT = 0.05  # a difference with a lower p value counts as shown


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (E. B. Wilson, JASA 22, 1927)."""
    z = 1.959963984540054
    share, scale = correct / total, 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / scale
    return centre - half, centre + half


def share_in_words(correct: int, total: int) -> str:
    """An accuracy in percent, with its 95 % interval."""
    low, high = wilson_interval(correct, total)
    return f"{100 * correct / total:.2f} % (95 % interval {100 * low:.2f} to {100 * high:.2f} %)"


@dataclass(frozen=True)
class Calibration:
    """Each bin's number of images, mean probability and accuracy (NaN where it has none), and the expected error."""

    count: np.ndarray
    probability: np.ndarray
    accuracy: np.ndarray
    error: float


def calibration(probability: np.ndarray, correct: np.ndarray, num_bins: int) -> Calibration:
    """Bins of equal width, open below, over the probability of the predicted class, float [n]; `correct` is bool [n].

    `error` is the expected calibration error, the sum over bins of ``count / n * |accuracy - mean probability|``
    (C. Guo et al., On Calibration of Modern Neural Networks, ICML 2017, equation 3).
    """
    bins = np.digitize(probability, np.linspace(0, 1, num_bins + 1)[1:-1], right=True)
    count = np.bincount(bins, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(bins, weights=probability, minlength=num_bins) / count
        accuracy = np.bincount(bins, weights=correct, minlength=num_bins) / count
    return Calibration(count, mean, accuracy, float(np.nansum(count * abs(accuracy - mean)) / count.sum()))


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p value of `only_a` against `only_b`, the images that just one of two networks predicts right.

    Under the null hypothesis each falls to either side with probability 1/2 (Q. McNemar, Psychometrika 12, 1947).
    """
    count, ways, tail = only_a + only_b, 1, 0
    for k in range(min(only_a, only_b) + 1):
        tail += ways
        ways = ways * (count - k) // (k + 1)
    return min(1.0, 2 * tail / 2**count)  # whole numbers until here, so nothing is rounded away


def p_in_words(p_value: float) -> str:
    """A p value as it is printed."""
    return f"p = {p_value:.2g}" if p_value >= 0.0001 else "p < 0.0001"


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for their number (S. Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
