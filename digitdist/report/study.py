"""What a study has found: its finished runs, their accuracies as a row of a table, and whether it differs from another."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from digitdist.config import ENDS, KEYS, shown
from digitdist.evaluate import SIGNIFICANT, Difference, Mean, holm, mean_interval, p_in_words, welch
from digitdist.report.record import Record, read_record
from digitdist.runs import seeds_in

COLUMNS = ("mean", "deviation", "95 % interval", "least", "greatest", "train_seconds")


@dataclass(frozen=True)
class Study:
    """The runs of a study that have a result, by their seeds, and how many are there without one."""

    name: str
    records: list[Record]
    num_unfinished: int = 0

    @cached_property
    def accuracies(self) -> list[float]:
        """Of each run on the test images, as a share."""
        return [record.result["test_correct"] / record.result["test_total"] for record in self.records if record.result]

    @cached_property
    def held_out(self) -> list[float]:
        """Of each run on its held-out images at its end, as a share; empty where they have none."""
        points = [record.points("validation/accuracy", "step")[1] for record in self.records]
        return [float(values[-1]) for values in points] if all(map(len, points)) else []

    @cached_property
    def train_seconds(self) -> list[float]:
        return [record.result["train_seconds"] for record in self.records if record.result]

    @property
    def notes(self) -> list[str]:
        """What a reader of the mean must know: runs without a result, and runs that differ in more than their seeds."""
        notes = [f"{self.num_unfinished} of its runs are not finished, and left out."] if self.num_unfinished else []
        notes += [f"Its runs differ in {text}." for text in differing([{**_settings(r), **_where(r)} for r in self.records])]
        return notes + [f"{record.name}: {note}" for record in self.records for note in record.notes]


def read_study(folder: Path, name: str | None = None) -> Study:
    """The study in `folder`; see `read_record`."""
    return as_study([*seeds_in(folder).values()], name or shown(folder.resolve().name))


def as_study(runs: Sequence[Path], name: str) -> Study:
    """These runs as one study."""
    records = [read_record(run) for run in runs]
    finished = [record for record in records if record.result]
    return Study(name, finished, len(records) - len(finished))


def summary_row(values: Sequence[float], train_seconds: Sequence[float]) -> tuple[str, ...]:
    """The row of `COLUMNS` of a study with these accuracies."""
    mean = mean_interval(values)
    return (
        f"{100 * mean.mean:.3f} %",
        *(("none", "none") if mean.count < 2 else (f"{100 * mean.deviation:.3f}", interval(mean))),
        f"{100 * min(values):.2f} %",
        f"{100 * max(values):.2f} %",
        f"{float(np.median(train_seconds)):.2f}",
    )


def interval(of: Mean | Difference) -> str:
    """A 95 % interval in percent."""
    return f"{100 * of.low:.3f} to {100 * of.high:.3f}"


def obstacle(study: Study, other: Study) -> str | None:
    """Why the accuracies of two studies do not compare, if so: they were tested on other images."""
    tested = [{(record.info.name, (record.result or {})["test_total"]) for record in one.records} for one in (study, other)]
    if len(tested[0] | tested[1]) == 1:
        return None
    sets = [" and ".join(f"{total:,} images of {shown(name)}" for name, total in sorted(found)) for found in tested]
    return f"{study.name} and {other.name} cannot be compared: they were tested on {sets[0]}, and on {sets[1]}"


def compare(study: Study, others: Sequence[Study], held_out: bool = False) -> tuple[list[Difference], list[float]]:
    """`study` beside each of `others`: Welch's differences of mean accuracies, and p values adjusted for their number (Holm),
    NaN where nothing can be said.

    `held_out`: of accuracies on held-out images, on which `study` is the best of all. Any of them might have been, so that p is
    adjusted for the number of all pairs.
    """
    values = [one.held_out if held_out else one.accuracies for one in (study, *others)]
    found = [welch(values[0], other) for other in values[1:]]
    pairs = [welch(*pair) for pair in itertools.combinations(values[1:], 2)] if held_out else []
    p_values = [one.p_value for one in (*found, *pairs)]
    adjusted = iter(holm([p_value for p_value in p_values if not math.isnan(p_value)]))
    return found, [math.nan if math.isnan(p_value) else next(adjusted) for p_value in p_values][: len(found)]


def verdict(study: Study, other: Study, found: Difference, p_value: float, num_comparisons: int) -> str:
    """Whether the two differ, in words; `p_value` is adjusted for so many comparisons."""
    start = f"{study.name} minus {other.name}: {100 * found.difference:+.3f} points"
    settings = differing([_settings(one.records[0]) for one in (study, other)])
    end = f" (they differ in {'; '.join(settings)})" if settings else ""
    if math.isnan(p_value):
        counts = min(len(study.records), len(other.records))
        why = "neither varies" if counts > 1 else "two runs of each are needed, at least"
        return f"{start}; whether they differ cannot be said: {why}{end}"
    better = study.name if found.difference > 0 else other.name
    finding = f"{better} is better" if p_value < SIGNIFICANT else "no difference is shown"
    adjusted = f", Holm for {num_comparisons} comparisons" if num_comparisons > 1 else ""
    return f"{start} (95 % interval {interval(found)}, Welch): {finding}, {p_in_words(p_value)}{adjusted}{end}"


def summary(study: Study) -> dict[str, Any]:
    """What a study has found, as JSON has it; a number that does not exist is null."""
    values = {"test_accuracy": study.accuracies, "validation_accuracy": study.held_out}
    return {
        "study": study.name,
        "runs": [str(record.folder) for record in study.records],
        "seeds": [record.seed for record in study.records],
        "ended": [record.result["ended"] for record in study.records if record.result],
        "unfinished": study.num_unfinished,
        **{name: _spread(found) if found else None for name, found in values.items()},
        "train_seconds": {"median": float(np.median(study.train_seconds)), "values": study.train_seconds},
    }


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return finite(dataclasses.asdict(mean_interval(values))) | {"least": min(values), "greatest": max(values), "values": values}


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with None for NaN, which JSON has not."""
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values.items()}


def differing(settings: Sequence[dict[str, Any]]) -> list[str]:
    """The keys in which `settings` differ, each with its values."""
    names = dict.fromkeys(name for one in settings for name in one)
    values = {name: list(dict.fromkeys(str(one.get(name)) for one in settings)) for name in names}
    return [f"{name} ({', '.join(found)})" for name, found in values.items() if len(found) > 1]


def _settings(record: Record) -> dict[str, Any]:
    """What of a run's configuration alters its result, but for the seed."""
    mode = str(record.config.get("sync.mode", "ddp"))
    altering = {name for name, key in KEYS.items() if key.alters_result_in(mode)} - {"seed", "train.precision"} | {*ENDS}
    mappings = ("model.args.", "data.args.")
    return {name: value for name, value in record.config.items() if name in altering or name.startswith(mappings)}


def _where(record: Record) -> dict[str, Any]:
    """On what a run was trained, as far as it may alter its result, and by which key it has ended."""
    result = {name: (record.result or {}).get(name) for name in ("device", "precision", "world_size", "ended")}
    return result | {"threads": record.attempts[-1].get("threads") if record.attempts else None}
