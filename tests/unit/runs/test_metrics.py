from __future__ import annotations

import json
from pathlib import Path

import pytest

from digitdist.runs import last_event, read_metrics
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


def test_damaged_lines_are_left_out_and_told(tmp_path: Path):
    logged(tmp_path, 1, 2)
    good = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    damaged = [
        *(b"\n", b"7\n", b"[]\n", b"{}\n", good[0][:-9] + b"\n", bytes(90) + b"\n", b"\xff\n", b"[" * 10**5 + b"\n"),
        *(b'{"step": "3", "epoch": 1}\n', b'{"step": true, "epoch": 1}\n', b'{"step": 3}\n', b'{"step": 3, "epoch": null}\n'),
    ]
    filled_up = bytes(4000) + good[1]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join([good[0], *damaged, filled_up]))
    said: list[str] = []
    truncate_metrics(tmp_path, 2, said.append)
    assert said == [f"{tmp_path}/metrics.jsonl: {len(damaged)} damaged lines are left out"]
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(good)


def test_a_full_disk_is_told_at_first_and_when_it_is_over(tmp_path: Path):
    said: list[str] = []
    tracker = RunTracker(tmp_path, None, said.append)
    file = tracker._metrics._file
    with open("/dev/full", "ab", buffering=0) as full:
        tracker._metrics._file = full
        for step in range(100):
            tracker.log({}, step, 0)
    assert said == ["metrics.jsonl cannot be written now (No space left on device); its lines wait in memory"]
    tracker._metrics._file = file
    for step in range(100, 200):
        tracker.log({}, step, 0)
    assert said[1:] == ["metrics.jsonl is written again; no line is lost"]
    assert [event["step"] for event in read_metrics(tmp_path)] == [*range(200)]


def test_no_checkpoint_may_follow_lines_that_wait_for_room(tmp_path: Path):
    tracker = RunTracker(tmp_path, None, lambda _: None)
    file = tracker._metrics._file
    with open("/dev/full", "ab", buffering=0) as full:
        tracker._metrics._file = full
        tracker.log({}, 1, 0)
        with pytest.raises(OSError, match=r"the lines of metrics\.jsonl before it cannot be written .No space left on device"):
            tracker.flush()
    tracker._metrics._file = file
    tracker.flush()
    assert [event["step"] for event in read_metrics(tmp_path)] == [1]


def test_what_came_after_a_step_is_cut_off(tmp_path: Path):
    logged(tmp_path, 1, 2, 3, 4)
    truncate_metrics(tmp_path, 2, pytest.fail)
    logged(tmp_path, 3)
    assert [event["step"] for event in read_metrics(tmp_path)] == [1, 2, 3]


def test_there_is_nothing_to_cut_in_a_new_run(tmp_path: Path):
    truncate_metrics(tmp_path, -1, pytest.fail)
    assert read_metrics(tmp_path) == []


def test_the_last_event_is_found_without_reading_the_others(tmp_path: Path):
    assert last_event(tmp_path) is None
    lines = [json.dumps({"step": step, "epoch": step / 10, "train/loss": 1.0}) for step in range(5000)]
    file = tmp_path / "metrics.jsonl"
    file.write_text("\n".join(lines) + '\n{"step": 5000, "epo')
    assert last_event(tmp_path) == {"step": 4999, "epoch": 499.9, "train/loss": 1.0}
    file.write_text(lines[0] + "\nnonsense\n")
    assert last_event(tmp_path) == {"step": 0, "epoch": 0.0, "train/loss": 1.0}
    file.write_text("")
    assert last_event(tmp_path) is None
