from __future__ import annotations

import json
from pathlib import Path

from digitdist.runs import read_metrics
from digitdist.runs.metrics import truncate_metrics
from digitdist.runs.tracker import RunTracker


def logged(folder: Path, *steps: int) -> None:
    tracker = RunTracker(folder, None, print)
    for step in steps:
        tracker.log({"train/loss": 1 / step}, step, step / 10)
    tracker.finish({})


def test_an_event_is_one_flushed_line(tmp_path: Path):
    tracker = RunTracker(tmp_path, None, print)
    tracker.log({"train/loss": 0.5}, 20, 0.2)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    event = json.loads(line)
    assert event.pop("time") > 1e9
    assert event == {"step": 20, "epoch": 0.2, "train/loss": 0.5}


def test_a_line_cut_short_is_left_out(tmp_path: Path):
    logged(tmp_path, 1, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "epo')
    assert [event["step"] for event in read_metrics(tmp_path)] == [1, 2]


def test_what_came_after_a_step_is_cut_off(tmp_path: Path):
    logged(tmp_path, 1, 2, 3, 4)
    truncate_metrics(tmp_path, 2)
    logged(tmp_path, 3)
    assert [event["step"] for event in read_metrics(tmp_path)] == [1, 2, 3]


def test_there_is_nothing_to_cut_in_a_new_run(tmp_path: Path):
    truncate_metrics(tmp_path, -1)
    assert read_metrics(tmp_path) == []
