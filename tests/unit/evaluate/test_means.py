from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from digitdist.evaluate import mean_interval, welch


def test_the_interval_of_a_mean_is_students():
    """Student's own example: hours of sleep that hyoscyamine gained ten patients."""
    hours = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = mean_interval(hours)
    assert (found.count, round(found.mean, 2), round(found.deviation, 3)) == (10, 2.33, 2.002)
    assert (found.low, found.high) == pytest.approx(
        (0.8976775, 3.7623225), abs=1e-6
    )  # R: t.test(subset(sleep, group == 2)$extra)


def test_a_single_value_has_no_interval():
    found = mean_interval([0.99])
    assert found.mean == 0.99
    assert math.isnan(found.deviation)
    assert math.isnan(found.low)


def test_a_difference_has_welchs_interval():
    found = welch([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4], [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0])
    # R: t.test(extra ~ group, data = sleep), whose groups are the other way round
    assert found.difference == pytest.approx(1.58)
    assert (found.low, found.high, found.p_value) == pytest.approx((-0.2054832, 3.3654832, 0.07939414), abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_both_are_what_scipy_says(seed: int):
    generator = np.random.default_rng(seed)
    a, b = generator.normal(0.99, 0.001, 3 + seed), generator.normal(0.991, 0.003, 12)
    theirs = stats.ttest_ind(a, b, equal_var=False)
    interval = theirs.confidence_interval(0.95)
    ours = welch(a, b)
    assert (ours.low, ours.high, ours.p_value) == pytest.approx((interval.low, interval.high, theirs.pvalue), rel=1e-9)
    mean, low_high = mean_interval(b), stats.ttest_1samp(b, 0).confidence_interval(0.95)
    assert (mean.low, mean.high) == pytest.approx((low_high.low, low_high.high), rel=1e-12)


@pytest.mark.parametrize(("a", "b"), [([0.9], [0.8, 0.7]), ([0.9, 0.8], [0.7]), ([0.9, 0.9], [0.8, 0.8])])
def test_nothing_is_said_without_two_of_each_or_without_spread(a: list[float], b: list[float]):
    found = welch(a, b)
    assert found.difference == pytest.approx(np.mean(a) - np.mean(b))
    assert math.isnan(found.low)
    assert math.isnan(found.p_value)
