from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from digitdist.evaluate import calibration, holm, mcnemar, wilson_interval


def test_the_interval_is_wilsons():
    low, high = wilson_interval(9863, 10000)  # scipy.stats.binomtest(9863, 10000).proportion_ci(method="wilson")
    assert (low, high) == (pytest.approx(0.98382, abs=1e-5), pytest.approx(0.98839, abs=1e-5))
    assert wilson_interval(10, 10)[1] == pytest.approx(1.0)
    assert wilson_interval(0, 10)[0] == pytest.approx(0.0)


def test_the_expected_calibration_error_is_that_of_its_definition():
    draw = np.random.default_rng(0)
    probability = np.concatenate([draw.uniform(0, 1, 500), np.arange(16) / 15])
    correct = draw.uniform(size=516) < probability
    bins = calibration(probability, correct, num_bins=15)
    error, counts = 0.0, []
    for low, high in zip(np.arange(15) / 15, np.arange(1, 16) / 15, strict=True):
        inside = ((probability > low) | ((low == 0) & (probability == 0))) & (probability <= high)
        counts.append(int(inside.sum()))
        error += counts[-1] / 516 * abs(correct[inside].mean() - probability[inside].mean())
    assert bins.count.tolist() == counts
    assert bins.error == pytest.approx(error, abs=1e-12)


def test_the_calibration_error_by_hand():
    bins = calibration(np.array([0.9, 0.9, 0.5, 0.5]), np.array([True, False, True, False]), num_bins=15)
    assert bins.error == pytest.approx(0.5 * 0.4 + 0.5 * 0.0)
    assert np.isnan(bins.accuracy).sum() == 13


@pytest.mark.parametrize("only_a", range(9))
@pytest.mark.parametrize("only_b", [0, 1, 2, 7, 8])
def test_mcnemars_p_is_the_exact_binomial(only_a: int, only_b: int):
    count = only_a + only_b
    chance = [Fraction(math.comb(count, k), 2**count) for k in range(count + 1)]
    expected = sum(c for k, c in enumerate(chance) if abs(2 * k - count) >= abs(only_a - only_b))
    assert mcnemar(only_a, only_b) == pytest.approx(float(expected), rel=1e-14)


def test_mcnemars_p_by_hand_and_for_many_images():
    assert mcnemar(1, 8) == 2 * (1 + 9) / 512
    assert mcnemar(0, 0) == mcnemar(6, 6) == 1.0
    assert mcnemar(5000, 5000) == 1.0
    assert 0 <= mcnemar(0, 10000) < 1e-300


def test_holms_adjustment_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.2]) == [0.2]
    assert holm([]) == []
