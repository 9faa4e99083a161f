"""Whether a run has come to its end, by what its files hold and not by their names alone."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from digitdist.checkpoint import Checkpoint, UnreadableCheckpoint, newest_good, weights_sha256
from digitdist.config import ENDS, KEYS, Config, as_dict, read_stored_config
from digitdist.errors import in_one_line
from digitdist.files import MIB, parse_json, read_plain
from digitdist.runs.folder import CONFIG, PREDICTIONS, RESULT
from digitdist.runs.metrics import METRICS, read_metrics

LARGEST_PREDICTIONS = 1024 * MIB


def is_trained(folder: Path, config: Config) -> bool:
    """Whether a training with this configuration has ended in `folder`, so that the same command would only say so.

    Where this is False, that command decides: it may still find that there is nothing to train.
    """
    stored, mistakes = read_stored_config(folder / CONFIG)
    before, wanted = as_dict(stored), as_dict(config)
    altering = [name for name, key in KEYS.items() if key.alters_result_in(config.sync.mode) or name in ENDS]
    if mistakes or any(before[name] != wanted[name] for name in altering):
        return False
    try:
        last = newest_good(folder / "checkpoints", lambda _: None)
    except UnreadableCheckpoint:
        return False
    return last is not None and is_finished(folder, last, lambda _: None)


def is_finished(folder: Path, stored: Checkpoint, report: Callable[[str], None]) -> bool:
    """Whether result and predictions are those of the weights in `stored`, the last checkpoint of a training; `report` gets a
    line about each file that is not, and so is made again, or that cannot be made again."""
    result = _read(folder / RESULT, parse_json, report)
    counts = _read(folder / PREDICTIONS, _counts, report)  # also where the result is damaged: each file is told
    if result is None or counts is None:
        return False
    weights = weights_sha256(stored.tensors.get("ema") or stored.tensors["model"])
    if not isinstance(result, dict) or (result.get("steps"), result.get("weights_sha256")) != (stored.step, weights):
        report(f"{folder / RESULT} is not of the weights in {stored.folder}; it is made again")
        return False
    if counts != (result.get("test_correct"), result.get("test_total")):
        report(f"{folder / PREDICTIONS} does not have the counts of {RESULT}; both are made again")
        return False
    if not any(event["step"] == stored.step for event in read_metrics(folder, report)[-1:]):
        report(f"{folder / METRICS} lacks its last lines, which cannot be made again")
    return True


def _read(file: Path, parse: Callable[[bytes], Any], report: Callable[[str], None]) -> Any:
    """What `parse` finds in a file; None where there is nothing, of which `report` gets a line."""
    try:
        return parse(read_plain(file, LARGEST_PREDICTIONS))
    except Exception as error:  # whatever damage raises
        reason = error.strerror if isinstance(error, OSError) else in_one_line(error)
        report(f"{file}: {reason}; it is made again")
        return None


def _counts(content: bytes) -> tuple[int, int]:
    """How many predictions are right, and how many there are."""
    with zipfile.ZipFile(io.BytesIO(content)):  # of anything else numpy says that it may be pickled
        pass
    with np.load(io.BytesIO(content), allow_pickle=False) as saved:
        columns: Mapping[str, np.ndarray] = {name: saved[name] for name in ("index", "label", "prediction", "probability")}
    if len({column.shape for column in columns.values()}) != 1:
        raise ValueError("its columns have unequal lengths")
    return int((columns["label"] == columns["prediction"]).sum()), columns["label"].size
