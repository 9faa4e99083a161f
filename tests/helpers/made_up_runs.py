"""Runs that nobody has trained: what a finished one leaves in its folder, with a result of one's choice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from digitdist.config import dump_config, load_config
from digitdist.data import DATA_SETS
from digitdist.evaluate import Evaluation, save_predictions


def make_run(
    folder: Path,
    correct: int,
    total: int = 1000,
    held_out: float | None = None,
    options: Sequence[str] = (),
    train_seconds: float = 1.0,
    finished: bool = True,
) -> Path:
    """A run ``seed-K`` with seed K that got `correct` of `total` test images right, and this share of its held-out images."""
    folder.mkdir(parents=True)
    seed = folder.name.removeprefix("seed-")
    options = [f"seed={seed if seed.isdecimal() else 0}", *options]
    (folder / "config.yaml").write_bytes(dump_config(load_config((), options)))
    (folder / "data_set.json").write_text(DATA_SETS["mnist"].to_json())
    event = {"step": 10, "epoch": 1.0, "time": 1.0, "test/loss": 0.1, "test/correct": correct, "test/total": total}
    event |= {"test/accuracy": correct / total} | ({} if held_out is None else {"validation/accuracy": held_out})
    (folder / "metrics.jsonl").write_text(json.dumps(event) + "\n")
    result = {"test_correct": correct, "test_total": total, "test_accuracy": correct / total, "test_loss": 0.1, "epochs": 1.0}
    result |= {"steps": 10, "world_size": 1, "device": "cpu", "precision": "fp32", "images_per_second": 1000.0}
    result |= {"train_seconds": train_seconds, "weights_sha256": f"{int(options[0][5:]):064x}"}
    if finished:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def predict_as(folder: Path, label: Sequence[int], prediction: Sequence[int]) -> None:
    """Puts predictions of the first test images into a run's folder."""
    columns = np.arange(len(label)), np.array(label), np.array(prediction), np.full(len(label), 0.7), np.zeros(len(label))
    save_predictions(Evaluation(*columns, num_classes=10), folder / "predictions.npz")
