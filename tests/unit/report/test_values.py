"""No value in a run's files, and no damage to them, ends a report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from digitdist import report
from digitdist.data import DATA_SETS
from digitdist.evaluate import Evaluation, save_predictions
from digitdist.report.plots import plot_confusion, plot_throughput
from digitdist.report.record import read_record

RESULT = {
    "test_correct": 9,
    "test_total": 10,
    "test_loss": 0.5,
    "epochs": 0.1,
    "steps": 5,
    "world_size": 1,
    "device": "cpu",
    "ended": "train.patience",
    **{"precision": "fp32", "images_per_second": 1000.0, "train_seconds": 1.0, "weights_sha256": "0" * 64},  # noqa: PIE800
}
BAD = [None, True, -1, 0, 1.5, 10**30, 1e308, float("nan"), float("inf"), "", "text", "9" * 5000, [], [[1]], {}, {"a": None}]
FILES = ("result.json", "environment.json", "metrics.jsonl", "data_set.json", "config.yaml", "predictions.npz")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The files of a run, as a training leaves them."""
    (tmp_path / "config.yaml").write_text("seed: 1")
    (tmp_path / "data_set.json").write_text(DATA_SETS["mnist"].to_json())
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    start = {"step": 0, "world_size": 1, "wandb_id": "abcd1234", "threads": 2, "host": "here", "launchers": [1.5], "reached": 4}
    (tmp_path / "environment.json").write_text(json.dumps({"starts": [start, start | {"step": 3}]}))
    event = {"step": 5, "epoch": 0.1, "time": 1.0, "train/loss": 2.0, "train/images_per_second": 1000.0}
    event |= {"test/loss": 0.5, "test/correct": 9, "test/total": 10}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(event) + "\n" + json.dumps(event | {"step": 6}) + "\n")
    label = np.arange(10)
    half = np.full(10, 0.5)
    save_predictions(Evaluation(label, label, label[::-1].copy(), half, half, num_classes=10), tmp_path / "predictions.npz")
    return tmp_path


def changed(value: object, path: tuple[object, ...], new: object) -> object:
    """`value` with `new` at `path`."""
    if not path:
        return new
    whole: object = list(value) if isinstance(value, list) else dict(value)  # type: ignore[call-overload]
    whole[path[0]] = changed(value[path[0]], path[1:], new)  # type: ignore[index]
    return whole


def paths(value: object, path: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(inner for key, item in items for inner in paths(item, (*path, key)))]


@pytest.mark.parametrize(
    ("ended", "told"),
    [
        ("train.patience", "0.1 epochs, ended by train.patience, last on"),
        (None, "0.1 epochs, last on"),
        (7, "0.1 epochs, last on"),
    ],
)
def test_a_page_tells_by_what_a_run_has_ended_where_its_result_does(run: Path, ended: object, told: str):
    (run / "result.json").write_text(json.dumps(RESULT | {"ended": ended}))
    assert told in report.write_report(run).read_text()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", FILES[:4])
def test_a_page_is_made_whatever_stands_at_any_place(run: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda figure, file, **_: figure.canvas.get_renderer and file.write(b"x")
    )
    text = (run / name).read_text()
    first, rest = text.split("\n", 1) if name == "metrics.jsonl" else (text, "")
    whole = json.loads(first)
    changes = [changed(whole, path, bad) for path in paths(whole) for bad in BAD]
    for number, change in enumerate(changes):
        (run / name).write_text(json.dumps(change) + "\n" + rest)
        read_record(run)
        if number % 20 == 0:  # a page takes 50 times as long as a record
            report.write_report(run)
    report.write_comparison([run, run], run / "comparison.html")


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_record_is_read_whatever_bytes_a_file_holds(run: Path, name: str):
    content, rng = (run / name).read_bytes(), np.random.default_rng(0)
    for kind in range(0, 60, 2):
        damaged = bytearray(content)
        if kind < 20:
            del damaged[int(rng.integers(len(damaged))) :]
        elif kind < 50:
            for place in rng.integers(len(damaged), size=3):
                damaged[place] = rng.integers(256)
        else:
            damaged = bytearray(b"[" * 100_000 if kind == 50 else rng.bytes(1000))
        (run / name).write_bytes(damaged)
        read_record(run)


def test_thousands_of_attempts_or_classes_are_a_few_artists(run: Path):
    start = json.loads((run / "environment.json").read_text())["starts"][0]
    (run / "environment.json").write_text(
        json.dumps({"starts": [start | {"step": n % 7, "world_size": n + 1} for n in range(2000)]})
    )
    figure = plot_throughput(read_record(run)).figure
    assert figure
    assert all(len(axis.lines) + len(axis.collections) < 5 for axis in figure.axes)
    assert len(figure.axes[-1].get_yticks()) < 20
    for classes, shown in ((100, 100), (999, 100), (1001, None)):
        data = json.loads(DATA_SETS["mnist"].to_json()) | {"classes": [f"class {number}" for number in range(classes)]}
        (run / "data_set.json").write_text(json.dumps(data))
        figure = plot_confusion(read_record(run)).figure
        assert (figure and len(figure.axes[0].get_xticks())) == shown


def test_a_class_that_has_a_folders_name_of_any_bytes_is_drawn(run: Path):
    data = json.loads((run / "data_set.json").read_text())
    (run / "data_set.json").write_text(
        json.dumps(data | {"classes": ["\udcff", "\x1b[31m", "$\\frac{$", *data["classes"][3:]]})
    )
    report.write_report(run)
    assert (run / "plots/confusion.png").exists()
