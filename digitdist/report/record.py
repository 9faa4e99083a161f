"""What a run's folder holds, read for a page: what is missing or damaged is noted, and everything else is shown."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from digitdist.config import Config, DataConfig, read_stored_config, shown, stored_values
from digitdist.data import DATA_SETS, DataSetInfo, known_info
from digitdist.errors import in_one_line
from digitdist.evaluate import Evaluation, load_predictions
from digitdist.files import MIB, parse_json, read_plain
from digitdist.runs import (
    CONFIG,
    DATA_SET,
    ENVIRONMENT,
    METRICS,
    PREDICTIONS,
    RESULT,
    made_here,
    read_attempts,
    read_metrics,
)

T = TypeVar("T")
LARGEST = 16 * MIB  # bytes of a file of JSON
MAX_STEP, LARGEST_NUMBER = 2**53, 1e100  # which no run comes near
RESULT_TYPES: dict[str, tuple[type, ...]] = {
    "test_correct test_total steps world_size": (int,),
    "test_loss epochs train_seconds": (int, float),
    "images_per_second": (int, float, type(None)),
    "device precision weights_sha256": (str,),
}


@dataclass(frozen=True)
class Record:
    """What a run's folder holds: None or empty where it is not there yet; `notes` say what is damaged.

    `config` is flat, dotted key to value; `predictions` has no losses, since they are not stored.
    """

    folder: Path
    config: dict[str, Any]
    data: DataConfig
    seed: int
    made_here: bool  # by a training of this user
    info: DataSetInfo
    attempts: list[dict[str, Any]]
    events: list[dict[str, float]]
    result: dict[str, Any] | None
    predictions: Evaluation | None
    notes: list[str]

    @property
    def name(self) -> str:
        return shown(self.folder.resolve().name)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """As text that can be drawn: a folder's name may be any bytes."""
        return tuple(map(shown, self.info.classes))

    @property
    def last_step(self) -> int:
        return int(self.events[-1]["step"]) if self.events else 0

    def points(self, metric: str, by: str) -> tuple[np.ndarray, np.ndarray]:
        """Where (`by` step or epoch) a metric was logged, and its finite values: float64 [n] both."""
        pairs = [(event[by], event[metric]) for event in self.events if math.isfinite(event.get(metric, math.nan))]
        return np.array([x for x, _ in pairs]), np.array([y for _, y in pairs])

    def reached(self, number: int) -> int:
        """The step that an attempt reached: by its heartbeats, else where the next one began or the last line was logged."""
        attempt, later = self.attempts[number], self.attempts[number + 1 :]
        return max(attempt["step"], attempt.get("reached") or (later[0]["step"] if later else self.last_step))

    def ending(self, number: int) -> str:
        """How an attempt ended, in words."""
        attempt = self.attempts[number]
        if attempt.get("stopped"):
            return "stopped on request"
        if attempt.get("fault"):
            return str(attempt["fault"])
        if number + 1 < len(self.attempts):
            return "no fault noted"
        return "finished" if self.result else "still running, or ended without a word"


def read_record(folder: Path) -> Record:
    """What there is of a run. It never fails because of what a file holds, and executes nothing."""
    notes: list[str] = []

    def read(name: str, reader: Callable[[Path], T], default: T) -> T:
        try:
            return reader(folder / name)
        except FileNotFoundError:
            return default
        except Exception as error:  # whatever damage raises, the other files are worth a page
            reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {in_one_line(error)}"
            notes.append(f"{name} is damaged and left out ({reason}).".replace(f"{folder}/", ""))
            return default

    def read_lines(reader: Callable[[Path, Callable[[str], None]], list[T]]) -> Callable[[Path], list[T]]:
        """`reader` of the folder, whose lines about what it leaves out are notes, or an error where nothing is left."""

        def wrapped(file: Path) -> list[T]:
            lines: list[str] = []
            found = reader(folder, lines.append)
            if lines and not found:
                raise ValueError(lines[0])
            notes.extend(line.replace(f"{folder}/", "") for line in lines)
            return found

        return wrapped

    flat: dict[str, Any] = read(CONFIG, _read_config, {})
    config = read_stored_config(folder / CONFIG)[0] if flat else Config()
    attempts: list[dict[str, Any]] = read(ENVIRONMENT, read_lines(read_attempts), [])
    events: list[dict[str, float]] = read(METRICS, read_lines(_read_events), [])
    result = read(RESULT, _read_result, None)
    info = read(DATA_SET, lambda file: DataSetInfo.from_json(read_plain(file, LARGEST)), known_info(config.data))
    if info is None:
        info = DATA_SETS["mnist"]
        notes.append(f"There is no {DATA_SET}: classes are numbered.")
    predictions = read(PREDICTIONS, lambda file: load_predictions(file, info.num_classes), None)
    if predictions and result and (predictions.correct, predictions.total) != (result["test_correct"], result["test_total"]):
        notes.append(f"{PREDICTIONS} has {predictions.correct:,}/{predictions.total:,} correct, {RESULT} says otherwise.")
    if predictions and not result:
        notes.append(f"There is no {RESULT} beside {PREDICTIONS}, which may be of an earlier end of this run.")
    own = made_here(folder, config)
    return Record(folder, flat, config.data, config.seed, own, info, attempts, events, result, predictions, notes)


def _read_config(file: Path) -> dict[str, Any]:
    read_plain(file, LARGEST)  # refuses what is none, a link too
    values = stored_values(file)
    if not values:  # a training writes every key
        raise ValueError("it holds no key")
    return _flat(values)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for part, value in tree.items():
        flat |= _flat(value, f"{prefix}{part}.") if isinstance(value, dict) and value else {f"{prefix}{part}": value}
    return flat


def _read_events(folder: Path, report: Callable[[str], None]) -> list[dict[str, float]]:
    """The events whose step and epoch are places on an axis."""
    found = read_metrics(folder, report)
    events = [{name: _float(value) for name, value in event.items()} for event in found]
    events = [event for event in events if all(0 <= event[name] < MAX_STEP for name in ("step", "epoch"))]  # not NaN
    if len(events) < len(found):
        report(f"{METRICS}: {len(found) - len(events)} lines of impossible steps are left out")
    return events


def _float(value: float) -> float:
    """`value` as a float that plots bear; NaN, which they leave out, for one that is larger."""
    return float(value) if abs(value) < LARGEST_NUMBER else math.nan


def _read_result(file: Path) -> dict[str, Any]:
    """What ``result.json`` holds.

    Raises:
        OSError, ValueError, KeyError, TypeError: it is not of a run.
    """
    found = parse_json(read_plain(file, LARGEST))
    result: dict[str, Any] = {}
    for names, kinds in RESULT_TYPES.items():
        for name in names.split():
            value = found[name]
            if type(value) not in kinds or (isinstance(value, float | int) and not 0 <= value < LARGEST_NUMBER):
                raise ValueError(f"its {name} is {shown(repr(value))}")
            result[name] = value
    result["ended"] = ended if isinstance(ended := found.get("ended"), str) else None  # which earlier versions do not tell
    if not 0 <= result["test_correct"] <= result["test_total"] > 0:
        raise ValueError(f"it has {result['test_correct']} of {result['test_total']} correct")
    return result
