"""Means over runs that differ in their seeds, and differences of such means, each with its interval and source."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95  # of every interval


@dataclass(frozen=True)
class Mean:
    """The mean of `count` values, their standard deviation (of a sample, n - 1), and the 95 % interval of the mean.

    Deviation and interval are NaN where there is a single value.
    """

    count: int
    mean: float
    deviation: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """The difference of two means, its 95 % interval and the two-sided p value; NaN, but for `difference`, where nothing can be
    said: there are fewer than two values of either, or neither varies."""

    difference: float
    low: float
    high: float
    p_value: float


def mean_interval(values: Sequence[float]) -> Mean:
    """The mean of at least one value with Student's t interval, ``mean ± t s / √n`` with n - 1 degrees of freedom (Student, The
    Probable Error of a Mean, Biometrika 6, 1908)."""
    count, mean = len(values), float(np.mean(values))
    if count < 2:
        return Mean(count, mean, math.nan, math.nan, math.nan)
    deviation = float(np.std(values, ddof=1))
    half = _t_quantile(count - 1) * deviation / math.sqrt(count)
    return Mean(count, mean, deviation, mean - half, mean + half)


def welch(a: Sequence[float], b: Sequence[float]) -> Difference:
    """The mean of `a` minus that of `b`, whose deviations may differ (B. L. Welch, The Generalization of "Student's" Problem
    when Several Different Population Variances are Involved, Biometrika 34, 1947)."""
    from scipy.special import stdtr  # of scipy, whose statistics take a second to import

    difference = float(np.mean(a) - np.mean(b))
    if min(len(a), len(b)) < 2 or not (np.ptp(a) or np.ptp(b)):
        return Difference(difference, math.nan, math.nan, math.nan)
    parts = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)
    error = math.sqrt(sum(parts))
    freedom = float(sum(parts) ** 2 / (parts[0] ** 2 / (len(a) - 1) + parts[1] ** 2 / (len(b) - 1)))
    half = _t_quantile(freedom) * error
    return Difference(difference, difference - half, difference + half, float(2 * stdtr(freedom, -abs(difference) / error)))


def _t_quantile(freedom: float) -> float:
    """What Student's t with so many degrees of freedom stays below, in absolute value, with probability `LEVEL`."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + LEVEL) / 2))
