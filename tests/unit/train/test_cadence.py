from __future__ import annotations

import pytest

from digitdist.train.cadence import Cadence, Due

CADENCE = Cadence(last_step=100, log_every=20, evaluate_every=30, save_every=50, check_every=25)


@pytest.mark.parametrize(
    ("before", "step", "due"),
    [
        (0, 1, ""),
        (18, 19, ""),
        (19, 20, "log"),
        (20, 21, ""),
        (24, 25, "check"),
        (29, 30, "evaluate"),
        (49, 50, "save check"),
        (59, 60, "log evaluate"),
        (98, 99, ""),
        (99, 100, "log evaluate save check last"),
        # Ranks that synchronise only now and then: whatever has been reached since.
        (10, 35, "log evaluate check"),
        (21, 29, "check"),
        (41, 49, ""),
        (0, 50, "log evaluate save check"),
        (50, 100, "log evaluate save check last"),
    ],
)
def test_what_is_due_is_that_of_which_a_multiple_has_been_reached(before: int, step: int, due: str):
    names = due.split()
    assert CADENCE.between(before, step) == Due(
        **{name: name in names for name in ("log", "evaluate", "save", "check", "last")}
    )


def test_zero_means_at_the_end_only_and_for_comparisons_never():
    rarely = Cadence(last_step=10, log_every=100, evaluate_every=0, save_every=0, check_every=0)
    assert rarely.between(0, 9) == Due(False, False, False, False, False)
    assert rarely.between(9, 10) == Due(log=True, evaluate=True, save=True, check=False, last=True)


def test_weights_are_compared_at_the_end_of_a_short_run_too():
    assert Cadence(last_step=10, log_every=20, evaluate_every=0, save_every=0, check_every=200).between(9, 10).check


def test_weights_must_be_equal_where_they_are_evaluated_or_saved():
    assert [step for step in range(1, 101) if CADENCE.needs_equal_weights(step)] == [30, 50, 60, 90, 100]
    rarely = Cadence(last_step=10, log_every=1, evaluate_every=0, save_every=0, check_every=1)
    assert [step for step in range(1, 11) if rarely.needs_equal_weights(step)] == [10]
