"""W&B's side of a run: what decides whether it is online, and the thread that feeds it."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
from helpers.wandb_server import Server

from digitdist.errors import UserError
from digitdist.runs import read_metrics, sync_wandb
from digitdist.runs.metrics import truncate_metrics
from digitdist.runs.tracker import RunTracker
from digitdist.runs.wandb_run import WandbRun
from digitdist.runs.wandb_server import has_wandb_key, wandb_mode


def logged(folder: Path, *steps: int) -> None:
    tracker = RunTracker(folder, None, print)
    for step in steps:
        tracker.log({"train/loss": 1 / step}, step, step / 10)
    tracker.finish({})


def test_a_key_is_found_without_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "keys"))
    assert not has_wandb_key()
    (tmp_path / "keys").write_text("machine api.wandb.ai login user password 0123\n")
    assert has_wandb_key()
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert not has_wandb_key()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert has_wandb_key()


def test_auto_is_offline_without_a_key_and_without_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert wandb_mode("disabled") == ("disabled", None)
    assert wandb_mode("offline") == ("offline", None)
    assert wandb_mode("auto") == ("offline", "no key (wandb login)")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    mode, reason = wandb_mode("auto")
    assert mode == "offline"
    assert "out of reach" in str(reason)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode("auto") == ("disabled", None)


@pytest.mark.parametrize(("manner", "reason"), [("answer", None), ("fail", "answers 500"), ("close", "out of reach")])
def test_a_server_is_judged_by_its_answer(manner: str, reason: str | None, server: Server, monkeypatch: pytest.MonkeyPatch):
    server.manner = manner
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    mode, why = wandb_mode("auto")
    assert mode == ("offline" if reason else "online")
    assert (reason or "") in str(why)


def test_a_sync_without_anything_to_send_or_a_key_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(UserError, match="no offline W&B run"):
        sync_wandb(tmp_path, print)
    (tmp_path / "wandb/offline-run-1-a").mkdir(parents=True)
    with pytest.raises(UserError, match="no key"):
        sync_wandb(tmp_path, print)


class StandIn(types.ModuleType):
    """Stands in for the module wandb and its run, and keeps the rows; it fails at step `fails_at`."""

    def __init__(self, fails_at: int | None = None):
        super().__init__("wandb")
        self.summary: dict = {}
        self.rows: list[tuple[int, dict]] = []
        self.fails_at = fails_at
        self.Settings, self.init = dict, lambda **_: self
        self.define_metric, self.finish, self.teardown = lambda *_, **__: None, lambda: None, lambda: None

    def log(self, row: dict, step: int, commit: bool) -> None:
        if step == self.fails_at:
            raise ValueError("two\nlines")
        self.rows.append((step, row))


def wandb_tracker(folder: Path, said: list[str]) -> RunTracker:
    return RunTracker(folder, WandbRun("offline", folder, "id", {"name": "a"}, said.append), said.append)


def test_wandb_gets_each_step_once_and_what_an_earlier_start_could_not_send(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "wandb").mkdir()
    logged(tmp_path, 1, 2, 3)
    (tmp_path / "wandb/last-step").write_text("1")
    said: list[str] = []
    for steps in ((4, 4, 6), (5, 6, 7)):
        module = StandIn()
        monkeypatch.setitem(sys.modules, "wandb", module)
        tracker = wandb_tracker(tmp_path, said)
        for count, step in enumerate(steps):
            tracker.log({f"train/{count}": count}, step, 0.0)
        tracker.finish({"x": 1}, {"picture": lambda wandb: wandb.__name__})
        assert [step for step, _ in module.rows] == ([2, 3, 4, 6] if steps[0] == 4 else [7])
        truncate_metrics(tmp_path, 4)
    assert module.rows[-1][1]["picture"] == "wandb"
    assert module.summary == {"x": 1}
    assert not said


def test_what_wandb_raises_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", StandIn(fails_at=2))
    (tmp_path / "wandb").mkdir()
    said: list[str] = []
    tracker = wandb_tracker(tmp_path, said)
    for step in range(6):
        tracker.log({"train/loss": 1.0}, step, 0.0)
    tracker.finish({})
    assert [event["step"] for event in read_metrics(tmp_path)] == list(range(6))
    assert len(said) == 1
    assert "two lines" in said[0]
