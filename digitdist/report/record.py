"""What a run's folder holds, read for a page: what is missing or damaged is noted, and everything else is shown."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from digitdist.config import DataConfig, read_stored_config, stored_values
from digitdist.data import DATA_SETS, DataSetInfo, known_info
from digitdist.errors import in_one_line
from digitdist.evaluate import Evaluation, load_predictions
from digitdist.runs import DATA_SET, ENVIRONMENT, METRICS, PREDICTIONS, RESULT, read_attempts, read_metrics

T = TypeVar("T")


@dataclass(frozen=True)
class Record:
    """What a run's folder holds: None or empty where it is not there yet; `notes` say what is damaged.

    `config` is flat, dotted key to value; `predictions` has no losses, since they are not stored.
    """

    folder: Path
    config: dict[str, Any]
    data: DataConfig
    info: DataSetInfo
    attempts: list[dict[str, Any]]
    events: list[dict[str, float]]
    result: dict[str, Any] | None
    predictions: Evaluation | None
    notes: list[str]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def classes(self) -> tuple[str, ...]:
        return self.info.classes

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
    """What there is of a run. It never fails because of what a file holds."""
    notes: list[str] = []

    def read(name: str, reader: Callable[[Path], T], default: T) -> T:
        try:
            return reader(folder / name)
        except FileNotFoundError:
            return default
        except Exception as error:  # whatever damage raises, the other files are worth a page
            notes.append(f"{name} is damaged and left out ({type(error).__name__}: {in_one_line(error)}).")
            return default

    flat: dict[str, Any] = read("config.yaml", lambda file: _flat(stored_values(file)), {})
    config, _ = read_stored_config(folder / "config.yaml")
    attempts: list[dict[str, Any]] = read(ENVIRONMENT, _read_attempts, [])
    events: list[dict[str, float]] = read(METRICS, _read_events, [])
    result = read(RESULT, _read_result, None)
    info: DataSetInfo | None = read(DATA_SET, lambda file: DataSetInfo.from_json(file.read_text()), known_info(config.data))
    if info is None:
        info = DATA_SETS["mnist"]
        notes.append(f"There is no {DATA_SET}: classes are numbered.")
    predictions = read(PREDICTIONS, lambda file: load_predictions(file, info.num_classes), None)
    if predictions and result and (predictions.correct, predictions.total) != (result["test_correct"], result["test_total"]):
        notes.append(f"{PREDICTIONS} has {predictions.correct:,}/{predictions.total:,} correct, {RESULT} says otherwise.")
    if predictions and not result:
        notes.append(f"There is no {RESULT} beside {PREDICTIONS}, which may be of an earlier end of this run.")
    return Record(folder, flat, config.data, info, attempts, events, result, predictions, notes)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for part, value in tree.items():
        flat |= _flat(value, f"{prefix}{part}.") if isinstance(value, dict) and value else {f"{prefix}{part}": value}
    return flat


def _read_attempts(file: Path) -> list[dict[str, Any]]:
    return [attempt | {name: int(attempt[name]) for name in ("step", "world_size")} for attempt in read_attempts(file.parent)]


def _read_events(file: Path) -> list[dict[str, float]]:
    events = [{name: float(value) for name, value in event.items()} for event in read_metrics(file.parent)]
    if not all({"step", "epoch"} <= event.keys() for event in events):
        raise ValueError("a line has no step or no epoch")
    return events


def _read_result(file: Path) -> dict[str, Any]:
    result = json.loads(file.read_text())
    names = ("test_correct", "test_total", "test_loss", "steps", "epochs", "world_size", "device", "precision")
    return {name: result[name] for name in (*names, "images_per_second", "train_seconds", "weights_sha256")}
