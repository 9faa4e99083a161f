"""``--format card``: a run's model as a folder that the Hugging Face Hub takes, kept only if it predicts as the run does."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from digitdist.checkpoint import weights_sha256
from digitdist.data import AnySet, load_splits
from digitdist.errors import UserError, in_one_line
from digitdist.evaluate import Evaluation, saved_predictions, share_in_words
from digitdist.export.card import card_text
from digitdist.export.parity import agreement, compare
from digitdist.files import sync, write_synced
from digitdist.loading import CARD_FILES, TrainedModel, card_content, load_folder
from digitdist.model_state import model_state
from digitdist.runs import StoredRun

BATCH = 1000  # images read at once


def check_card_folder(folder: Path) -> None:
    """Refuses, before any work is done, a folder that is not to be written.

    Raises:
        UserError: it is a file or a link, holds anything but an earlier card, or there is no permission to write there.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        others = sorted({path.name for path in folder.iterdir()} - CARD_FILES.keys()) if folder.is_dir() else []
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; give another folder by --output") from None
    reason = None
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        reason = "is a link or a file"
    elif others:
        reason = f"holds other files than a card's ({', '.join(others[:3])})"
    elif not os.access(folder if folder.exists() else folder.parent, os.W_OK | os.X_OK):
        reason = "no permission to write there"
    if reason:
        raise UserError(f"{folder}: {reason}; give a new folder by --output")


def export_card(run: StoredRun, which: str, folder: Path, licence: str) -> str:
    """Writes the model of checkpoint `which` of `run`, with its card, into `folder`; returns how it predicts all test images.

    It is written under another name, loaded again as `digitdist.load` does, and tried before it gets its place.

    Raises:
        UserError: there is no such checkpoint or data set, or `folder` cannot be written.
        RuntimeError: what was written does not predict as the run's model does. Whatever is raised, `folder` is left as it was.
    """
    splits = load_splits(run.config.data, run.config.seed)
    run.check_form(splits.info)
    test, stored = splits.test, run.checkpoint(which)
    network = run.model(stored)
    expected, labels = _probabilities(TrainedModel(network, run.info, run.precision(stored, "cpu")), test)
    result = _evaluation(expected, labels, test)
    content = card_content(run, stored, network, card_text(run, stored, network, result, licence))
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir()
        for name, data in content.items():
            write_synced(temporary / name, data)
        found, _ = _probabilities(load_folder(temporary, trust=True), test)  # what it executes, the run has executed here
        difference = compare(found, expected)
        _put(temporary, folder)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or in_one_line(error)}; make room, or give another --output") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    saved = saved_predictions(run, weights_sha256(model_state(network)))
    lines = [
        f"{run.folder} at step {stored.step:,}, {run.info.name} test: {result.correct:,}/{result.total:,} correct ="
        f" {share_in_words(result.correct, result.total)}, in {run.precision(stored, 'cpu')}",
        agreement(folder, result.total, difference),
        *([saved.compare(result.index, result.prediction)] if saved else []),
    ]
    return "\n".join(lines)


def _put(temporary: Path, folder: Path) -> None:
    """Gives what is in `temporary` its place: at once where there is nothing yet, else file by file."""
    if not folder.exists():
        os.replace(temporary, folder)
    else:
        for file in temporary.iterdir():
            os.replace(file, folder / file.name)
    sync(folder)
    sync(folder.parent)


def _probabilities(model: TrainedModel, images: AnySet) -> tuple[Tensor, Tensor]:
    """Probabilities, float32 [n, classes], and labels, int64 [n], of all images."""
    batches = [images.read(part) for part in torch.arange(len(images)).split(BATCH)]
    found = [torch.from_numpy(model.probabilities(batch.images)) for batch in batches]
    return torch.cat(found), torch.cat([batch.labels for batch in batches])


def _evaluation(probabilities: Tensor, labels: Tensor, images: AnySet) -> Evaluation:
    highest, prediction = probabilities.max(1)
    index, label, told, probability = (column.cpu().numpy() for column in (images.indices, labels, prediction, highest))
    losses = np.full(len(label), np.nan, np.float32)  # of which a card tells nothing
    return Evaluation(index, label, told, probability, losses, num_classes=probabilities.shape[1])
