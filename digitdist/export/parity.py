"""Writes a run's model as a file, and keeps it only if it predicts every test image as the run's model does."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import secrets
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import digitdist
from digitdist.checkpoint import Checkpoint, weights_sha256
from digitdist.config import Config
from digitdist.data import AnySet, load_splits
from digitdist.errors import UserError, in_one_line
from digitdist.evaluate import saved_predictions
from digitdist.export.formats import FORMATS, AnyClassifier, Classifier, Classify, Metadata
from digitdist.files import write_synced
from digitdist.model_state import model_state
from digitdist.runs import StoredRun, seeds_in

PRECISION = "fp32"  # of an exported file


def export(run: StoredRun, which: str, form: str, file: Path) -> str:
    """Writes checkpoint `which` of `run` as `file`; returns how the file compares with the run on all test images.

    The file computes in fp32, and is compared with the run's model in fp32; the training's own predictions, in whatever
    precision, are told beside. It is written under a temporary name, loaded again from the disk and tried before it gets its
    own name.

    Raises:
        UserError: there is no such checkpoint or data set, or the model cannot be traced.
        RuntimeError: the file does not predict as the run's model does. Whatever is raised, `file` is left as it was.
    """
    config, info = run.config, run.info
    splits = load_splits(config.data, config.seed)
    run.check_form(splits.info)
    test = splits.test
    stored = run.checkpoint(which)
    network = run.model(stored)
    classifier = Classifier(network, info)
    expected, labels = probabilities(classifier, test)
    correct, total = int((expected.argmax(1) == labels).sum()), len(test)
    saved = saved_predictions(run, weights_sha256(model_state(network)))
    metadata = describe(run, stored, network, correct, total)
    if saved:  # the training's own count, in its precision
        metadata["trained_test_correct"] = saved.result.correct
    agreement = write_checked(classifier, metadata, form, file, expected, test, config)
    report = f"{run.folder} at step {stored.step:,}, {splits.info.name} test: {counted(correct, total)}\n{agreement}"
    compared = saved.compare(test.indices.numpy(), expected.argmax(1).numpy()) if saved else None
    return f"{report}\n{compared}" if compared else report


def write_checked(
    classifier: AnyClassifier, metadata: Metadata, form: str, file: Path, expected: Tensor, test: AnySet, config: Config
) -> str:
    """Writes `classifier` as `file`, and keeps that only if it gives, for the images of `test`, the predictions of `expected`,
    float32 [n, classes]; returns how it compares with them. `config` names the network of a file that holds weights alone.

    Raises:
        UserError: the file cannot be written, or the classifier not be traced.
        RuntimeError: the file predicts otherwise.
    """
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
    try:
        with quiet():
            write_synced(temporary, FORMATS[form].write(classifier, metadata))
            found, _ = probabilities(FORMATS[form].read(temporary, config, classifier.info), test)
            difference = compare(found, expected)
        os.replace(temporary, file)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or in_one_line(error)}; make room, or give another --output") from None
    finally:
        temporary.unlink(missing_ok=True)
    return agreement(file, len(test), difference)


def agreement(place: Path, total: int, difference: float) -> str:
    """That what was exported to `place` predicts `total` images alike, with this largest `difference` of a probability."""
    return f"{place}: the same prediction on all {total:,} images, largest difference of a probability {difference:.2g}"


def counted(correct: int, total: int) -> str:
    return f"{correct:,}/{total:,} correct = {100 * correct / total:.2f} %, in {PRECISION}"


def describe(run: StoredRun, stored: Checkpoint, network: nn.Module, correct: int, total: int) -> Metadata:
    """What a file tells of itself: the run, its weights, how to normalise and to name classes, and how many it gets right."""
    model, info = run.config.model, run.info
    return {
        "digitdist_version": digitdist.__version__,
        "run": run_name(run),
        "step": stored.step,
        "weights_sha256": weights_sha256(model_state(network)),
        "model": model.target or model.name,
        "model_args": model.args,
        "data_set": info.name,
        "classes": info.classes,
        "pixel_mean": _pixels(info.mean),
        "pixel_std": _pixels(info.std),
        "test_correct": correct,
        "test_total": total,
        "test_accuracy": correct / total,
        "precision": PRECISION,  # of the file, and of these counts
        "trained_precision": run.trained_precision(stored),
    }


def run_name(run: StoredRun) -> str:
    """The name of a run's folder, after that of its study where it is of one: every study has a ``seed-0``."""
    folder = run.folder.resolve()
    return f"{folder.parent.name} {folder.name}" if folder in seeds_in(folder.parent).values() else folder.name


@torch.no_grad()
def probabilities(classify: Classify, images: AnySet) -> tuple[Tensor, Tensor]:
    """Probabilities, float32 [n, classes], and labels, int64 [n], in batches of 1, 7, 1,000 and the rest, since a graph must
    take any size."""
    positions = torch.arange(len(images))
    batches = [images.read(part) for part in (positions[:1], positions[1:8], *positions[8:].split(1000)) if len(part)]
    return torch.cat([classify(batch.images) for batch in batches]), torch.cat([batch.labels for batch in batches])


def _pixels(values: tuple[float, ...]) -> float | list[float]:
    """A mean or deviation in units of a raw pixel: one number for grey images, else one for each channel."""
    scaled = [255 * value for value in values]
    return scaled[0] if len(scaled) == 1 else scaled


def compare(found: Tensor, expected: Tensor) -> float:
    """The largest difference between two sets of probabilities, float32 [n, classes], that predict the same.

    Raises:
        RuntimeError: they do not predict the same.
    """
    different = int((found.argmax(1) != expected.argmax(1)).sum())
    difference = (found - expected).abs().max().item()
    if different:
        raise RuntimeError(
            f"the exported model predicts {different:,} of {len(expected):,} test images differently than the run's"
            f" (largest difference of a probability {difference:.2g}): it was not kept"
        )
    return difference


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppresses the exporters' warnings and progress, about which a user can do nothing; errors are raised and logged."""
    level, output = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
