"""The result of an evaluation: one row an image, its counts, and its file ``predictions.npz``."""

from __future__ import annotations

import io
import math
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from digitdist.evaluate.statistics import share_in_words
from digitdist.files import MIB, atomic_write, read_plain

MAX_PACKED, MAX_UNPACKED = 256 * MIB, 1024 * MIB  # bytes of predictions


@dataclass(frozen=True)
class Evaluation:
    """One row an image, sorted by index: `index`, `label`, `prediction` int64 [n], `probability`, `loss` float32 [n].

    `probability` is the network's for the predicted class, `loss` the cross-entropy of the image in nats.
    """

    index: np.ndarray
    label: np.ndarray
    prediction: np.ndarray
    probability: np.ndarray
    loss: np.ndarray
    num_classes: int = field(kw_only=True)

    @property
    def total(self) -> int:
        return len(self.index)

    @property
    def correct(self) -> int:
        return int((self.label == self.prediction).sum())

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    @property
    def mean_loss(self) -> float:
        return math.fsum(self.loss.tolist()) / self.total

    @property
    def confusion(self) -> np.ndarray:
        """int64 [classes, classes]: how many images of class ``row`` were predicted as ``column``."""
        counts = np.bincount(self.label * self.num_classes + self.prediction, minlength=self.num_classes**2)
        return counts.reshape(self.num_classes, self.num_classes)

    @property
    def class_accuracy(self) -> list[float | None]:
        """Accuracy over the images of each class; None where there are none."""
        return [int(row[i]) / int(row.sum()) if row.sum() else None for i, row in enumerate(self.confusion)]

    def worst_mistakes(self, count: int) -> np.ndarray:
        """The rows of the wrong predictions with the highest losses, worst first: int64 [up to count]."""
        wrong = np.flatnonzero(self.label != self.prediction)
        return wrong[np.argsort(-self.loss[wrong], kind="stable")][:count]

    def metrics(self, split: str) -> dict[str, float]:
        """Loss and counts, each named ``split/…``."""
        values = {"loss": self.mean_loss, "accuracy": self.accuracy, "correct": self.correct, "total": self.total}
        return {f"{split}/{name}": value for name, value in values.items()}

    def __str__(self) -> str:
        share = share_in_words(self.correct, self.total)
        return f"{self.correct:,}/{self.total:,} correct = {share}, loss {self.mean_loss:.4f}"


def save_predictions(result: Evaluation, file: Path) -> None:
    """Writes index, label, prediction and probability of each image as `file`.

    Raises:
        OSError: it cannot be written.
    """
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer, index=result.index, label=result.label, prediction=result.prediction, probability=result.probability
    )
    atomic_write(file, buffer.getvalue())


def load_predictions(file: Path, num_classes: int) -> Evaluation:
    """What `save_predictions` wrote, of so many classes; its losses, which are not stored, are NaN.

    Raises:
        OSError, ValueError, KeyError, zipfile.BadZipFile: the file cannot be read, or does not hold predictions.
    """
    content = io.BytesIO(read_plain(file, MAX_PACKED))
    with zipfile.ZipFile(content) as packed:
        if sum(entry.file_size for entry in packed.infolist()) > MAX_UNPACKED:
            raise ValueError(f"it holds more than {MAX_UNPACKED // MIB:,} MiB")
    with np.load(content, allow_pickle=False) as saved:
        columns = [saved[name] for name in ("index", "label", "prediction", "probability")]
    if not columns[0].size or any(column.shape != (len(columns[0]),) for column in columns):
        raise ValueError("its columns are empty or of unequal length")
    if any(column.dtype.kind not in kinds for column, kinds in zip(columns, ("iu", "iu", "iu", "f"), strict=True)):
        raise ValueError("its columns are not numbers")
    index, label, prediction = (column.astype(np.int64) for column in columns[:3])
    probability = columns[3].astype(np.float64)
    if index[0] < 0 or (np.diff(index) <= 0).any():
        raise ValueError("its images are not sorted by index, once each")
    if not all(column.min() >= 0 and column.max() < num_classes for column in (label, prediction)):
        raise ValueError("it holds a class that does not exist")
    if not ((probability >= 0) & (probability <= 1)).all():  # NaN is neither
        raise ValueError("it holds a probability that is none")
    return Evaluation(index, label, prediction, probability, np.full(len(index), np.nan), num_classes=num_classes)
