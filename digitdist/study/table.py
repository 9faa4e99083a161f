"""Studies as text and as JSON: a table of means, what differs, and which combination of a grid is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from digitdist.errors import UserError
from digitdist.evaluate import Difference
from digitdist.report import COLUMNS, Study, compare, finite, obstacle, summary, summary_row, verdict


def study_table(studies: Sequence[Study], held_out: bool = False) -> str:
    """A row of accuracies a study; `held_out`: on held-out images, else on test images."""
    rows: list[tuple[str, ...]] = [("held-out images" if held_out else "test images", "runs", *COLUMNS)]
    for study in studies:
        values = study.held_out if held_out else study.accuracies
        rows.append((study.name, str(len(values)), *summary_row(values, study.train_seconds)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        (row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))) for row in rows
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def against(study: Study, others: Sequence[Study]) -> tuple[list[str], list[dict[str, Any]]]:
    """`study` beside each of `others`, in words and as JSON has it; why not, of those that do not compare."""
    obstacles = {other.name: why for other in others if (why := obstacle(study, other))}
    comparable = [other for other in others if other.name not in obstacles]
    words, values = _told(study, comparable, *compare(study, comparable), len(comparable))
    return [*words, *obstacles.values()], values + [{"study": name, "verdict": why} for name, why in obstacles.items()]


def grid_summary(name: str, studies: Sequence[Study]) -> tuple[list[str], dict[str, Any]]:
    """The studies of a grid by their held-out images, best first, in words and as JSON has it; of the best alone, which is
    chosen, also what it reaches on the test images. Those without a finished run are left out, which is said.

    Raises:
        UserError: no study has a finished run with a held-out accuracy.
    """
    unranked = [study.name for study in studies if not study.held_out]
    if len(unranked) == len(studies):
        raise UserError(f"{name}: none of its runs is finished with a held-out accuracy; give --seeds N to train them")
    best, *others = sorted((study for study in studies if study.held_out), key=lambda study: -float(np.mean(study.held_out)))
    num_pairs = len(others) * (len(others) + 1) // 2
    words, found = _told(best, others, *compare(best, others, held_out=True), num_pairs)
    lines = [study_table([best, *others], held_out=True), "", *words]
    chosen = f"chosen by held-out images, which flatter it now: {best.name}; on the test images, which had no part in that:"
    lines += [*([""] if words else []), chosen, study_table([best])]
    lines += [f"note: {study} is not ranked: none of its runs is finished with a held-out accuracy" for study in unranked]
    ranked = [summary(study) for study in (best, *others)]
    for one in ranked[1:]:
        del one["test_accuracy"]
    values = {"grid": name, "chosen": best.name, "combinations": ranked, "unranked": unranked, "against": found}
    return lines, values


def _told(
    study: Study, others: Sequence[Study], differences: list[Difference], p_values: list[float], num_comparisons: int
) -> tuple[list[str], list[dict[str, Any]]]:
    words, values = [], []
    for other, found, p_value in zip(others, differences, p_values, strict=True):
        words.append(verdict(study, other, found, p_value, num_comparisons))
        numbers = {"difference": found.difference, "low": found.low, "high": found.high, "p_value": p_value}
        values.append({"study": other.name, **finite(numbers), "verdict": words[-1]})
    return words, values
