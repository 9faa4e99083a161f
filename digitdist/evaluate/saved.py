"""What a training has predicted at its end, beside what the same weights predict now."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass

import numpy as np

from digitdist.evaluate.result import Evaluation, load_predictions
from digitdist.files import MIB, parse_json, read_plain
from digitdist.runs import PREDICTIONS, RESULT, StoredRun

MAX_RESULT = MIB


@dataclass(frozen=True)
class SavedPredictions:
    """A run's ``predictions.npz``, and the precision and the type of device that it was computed in."""

    result: Evaluation
    precision: str
    device: str

    def compare(self, index: np.ndarray, prediction: np.ndarray) -> str:
        """How they compare with a `prediction` of each image of `index`, int64 [n] both, in words."""
        label = f"{PREDICTIONS}, in {self.precision} on {self.device}"
        if not np.array_equal(index, self.result.index):
            return f"{label}, is of other images"
        same, total = int((prediction == self.result.prediction).sum()), len(index)
        predicted = f"all {total:,} images" if same == total else f"{same:,} of {total:,} images"
        return f"{label}: {self.result.correct:,} correct, the same prediction on {predicted}"


def saved_predictions(run: StoredRun, weights_sha256: str) -> SavedPredictions | None:
    """The run's predictions of its test images, if there are any, and of these weights."""
    try:
        result = parse_json(read_plain(run.folder / RESULT, MAX_RESULT))
        if result["weights_sha256"] != weights_sha256:
            return None
        saved = load_predictions(run.folder / PREDICTIONS, run.info.num_classes)
        return SavedPredictions(saved, str(result["precision"]), str(result["device"]))
    except (OSError, ValueError, TypeError, KeyError, zipfile.BadZipFile):
        return None  # missing or damaged, as `report` tells; a comparison is an extra
