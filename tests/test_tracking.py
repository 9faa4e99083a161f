from __future__ import annotations

import json
from pathlib import Path

import pytest

from digitdist import tracking
from digitdist.tracking import RunTracker, read_metrics


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
    tracking.cut_metrics(tmp_path, 2)
    logged(tmp_path, 3)
    assert [event["step"] for event in read_metrics(tmp_path)] == [1, 2, 3]


def test_there_is_nothing_to_cut_in_a_new_run(tmp_path: Path):
    tracking.cut_metrics(tmp_path, -1)
    assert read_metrics(tmp_path) == []


def test_a_key_is_found_without_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "keys"))
    assert not tracking.has_wandb_key()
    (tmp_path / "keys").write_text("machine api.wandb.ai login user password 0123\n")
    assert tracking.has_wandb_key()
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert not tracking.has_wandb_key()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert tracking.has_wandb_key()


def test_auto_is_offline_without_a_key_and_without_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert tracking.wandb_mode("disabled", tmp_path, said.append) is None
    assert tracking.wandb_mode("offline", tmp_path, said.append) == "offline"
    assert not said
    assert tracking.wandb_mode("auto", tmp_path, said.append) == "offline"
    assert "no key" in said.pop()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert tracking.wandb_mode("auto", tmp_path, said.append) == "offline"
    assert "out of reach" in said.pop()
