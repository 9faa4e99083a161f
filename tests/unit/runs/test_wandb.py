"""W&B's side of a run: what decides whether it is online, what it is called there, and the thread that feeds it."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from helpers.wandb_server import Server

from digitdist.config import TrackingConfig
from digitdist.errors import UserError
from digitdist.runs import confusion_chart, image_table, read_metrics, sync_wandb, wandb_mistakes
from digitdist.runs.metrics import truncate_metrics
from digitdist.runs.tracker import RunTracker
from digitdist.runs.wandb_media import draw
from digitdist.runs.wandb_record import begin_record, keep_media, read_options, stored_rows
from digitdist.runs.wandb_run import WandbRun
from digitdist.runs.wandb_server import has_wandb_key, wandb_mode
from digitdist.runs.wandb_session import Session, prepare_environment
from digitdist.runs.wandb_settings import chosen_mode, init_options
from digitdist.runs.wandb_sync import are_lines_lost

NAMES = ("PROJECT", "NAME", "TAGS", "ENTITY", "RUN_GROUP", "NOTES", "RUN_ID", "DISABLED", "CONFIG_DIR", "DIR", "JOB_TYPE")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An own home and working directory, in which nothing is told to wandb; what is told it in a test ends with that."""
    before = dict(os.environ)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "keys"))
    for name in NAMES:
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]
    os.environ.update(before)


# Whether it is online


def test_a_key_is_found_without_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert not has_wandb_key()
    (tmp_path / "keys").write_text("machine api.wandb.ai login user password 0123\n")
    assert has_wandb_key()
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert not has_wandb_key()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert has_wandb_key()


def test_the_key_is_that_of_the_server_in_the_settings_file(tmp_path: Path):
    settings(tmp_path / ".config/wandb", "base_url = https://wandb.example.org")
    (tmp_path / "keys").write_text("machine api.wandb.ai login user password 0123\n")
    assert not has_wandb_key()
    (tmp_path / "keys").write_text("machine wandb.example.org login user password 0123\n")
    assert has_wandb_key()


def test_auto_is_offline_without_a_key_and_without_a_server(monkeypatch: pytest.MonkeyPatch):
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


@pytest.mark.parametrize(
    ("value", "meaning"),
    [
        *(("online", "online"), ("run", "online"), ("shared", "online")),
        *(("offline", "offline"), ("dryrun", "offline"), ("disabled", "disabled")),
        *((value, "offline") for value in ("Offline", "DRYRUN", "ONLINE", "Disabled", "on", "true", "", " online", "onlin")),
    ],
)
def test_each_value_of_wandb_mode_means_what_wandb_means_and_an_unknown_one_is_offline(
    value: str, meaning: str, server: Server, monkeypatch: pytest.MonkeyPatch
):
    for name, text in (server.environment | {"WANDB_MODE": value}).items():
        monkeypatch.setenv(name, text)
    mode, reason = wandb_mode("auto")
    assert mode == meaning
    assert bool(server.asked) == (meaning == "online")
    known = ("online", "run", "shared", "offline", "dryrun", "disabled")
    assert bool(reason) == (value not in known)
    assert not reason or f"WANDB_MODE={value} is none of" in reason


def test_the_values_of_wandb_mode_are_those_of_the_installed_wandb():
    import wandb

    from digitdist.runs.wandb_settings import MODES

    for mode, meaning in MODES.items():
        theirs = wandb.Settings(mode=mode)
        assert (theirs._offline, theirs._noop) == (meaning == "offline", meaning == "disabled")
    assert set(MODES) == set(wandb.Settings.model_fields["mode"].annotation.__args__)


@pytest.mark.parametrize(("value", "mode"), [("true", "disabled"), ("1", "disabled"), ("false", "online"), ("", "online")])
def test_wandb_disabled_is_heard(value: str, mode: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_DISABLED", value)
    assert chosen_mode()[0] == mode
    monkeypatch.setenv("WANDB_MODE", "online")
    assert chosen_mode()[0] == mode


def settings(folder: Path, *lines: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings").write_text("\n".join(("[default]", *lines)))


def test_the_settings_files_are_heard_the_working_directory_before_the_user_and_the_variable_before_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings(tmp_path / ".config/wandb", "mode = offline")
    assert chosen_mode() == ("offline", None)
    settings(tmp_path / "elsewhere", "mode = disabled")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "elsewhere"))
    assert chosen_mode() == ("disabled", None)
    settings(tmp_path / "wandb", "mode = dryrun")
    assert chosen_mode() == ("offline", None)
    settings(tmp_path / "wandb", "mode = online")
    assert chosen_mode() == ("online", None)
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    assert chosen_mode() == ("offline", None)


@pytest.mark.parametrize(
    "content",
    [b"mode = offline", b"[default]\nmode\n= \xff", b"[default]\nmode=online\nmode=offline", b"[default]\nmode=On", None],
)
def test_a_settings_file_that_cannot_be_read_keeps_the_run_offline(content: bytes | None, tmp_path: Path):
    file = tmp_path / "wandb/settings"
    file.parent.mkdir()
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    mode, reason = chosen_mode()
    assert mode == "offline"
    assert str(file) in str(reason)


def test_wandb_offline_of_an_earlier_version_is_heard(tmp_path: Path):
    settings(tmp_path / "wandb", "disabled = true")
    assert chosen_mode()[0] == "offline"


@pytest.mark.parametrize(("manner", "reason"), [("answer", None), ("fail", "answers 500"), ("close", "out of reach")])
def test_a_server_is_judged_by_its_answer(manner: str, reason: str | None, server: Server, monkeypatch: pytest.MonkeyPatch):
    server.manner = manner
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    mode, why = wandb_mode("auto")
    assert mode == ("offline" if reason else "online")
    assert (reason or "") in str(why)


# What it is called there


def test_wandbs_variables_name_the_run_where_the_configuration_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert init_options(TrackingConfig(), "a") == {
        "project": "digitdist",
        "entity": None,
        "group": None,
        "job_type": None,
        "name": "a",
        "notes": None,
        "tags": None,
    }
    settings(tmp_path / "wandb", "project = of-file", "entity = team")
    assert init_options(TrackingConfig(), "a")["project"] == "of-file"
    values = {"PROJECT": "p", "NAME": "n", "TAGS": "x, y", "ENTITY": "e", "RUN_GROUP": "g", "NOTES": "some", "JOB_TYPE": "j"}
    for name, value in values.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    theirs = {"project": "p", "entity": "e", "group": "g", "job_type": "j", "name": "n", "notes": "some", "tags": ["x", "y"]}
    assert init_options(TrackingConfig(), "a") == theirs
    ours = {"project": "P", "entity": "E", "group": "G", "name": "N", "notes": "S", "tags": ["z"]}
    assert init_options(TrackingConfig(**ours), "a") == ours | {"job_type": "j"}


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        *(("WANDB_PROJECT", f"a{sign}b", f"WANDB_PROJECT=a{sign}b: W&B takes no {sign}") for sign in "/\\#?%:"),
        ("WANDB_PROJECT", "p" * 129, "1 to 128"),
        *(("WANDB_RUN_ID", f"a{sign}b", f"WANDB_RUN_ID=a{sign}b: W&B takes no {sign}") for sign in ":;,#?/'"),
        ("WANDB_RUN_ID", " a", "no spaces"),
        ("WANDB_RUN_ID", " ", "no spaces"),
        ("WANDB_TAGS", f"a,{'t' * 65}", "has 65 characters"),
    ],
)
def test_names_that_wandb_would_refuse_are_told_at_the_start(
    variable: str, value: str, told: str, monkeypatch: pytest.MonkeyPatch
):
    import wandb

    assert wandb_mistakes(TrackingConfig()) == []
    monkeypatch.setenv(variable, value)
    (mistake,) = wandb_mistakes(TrackingConfig())
    assert told in mistake
    assert wandb_mistakes(TrackingConfig(wandb="disabled")) == []
    key = {"WANDB_PROJECT": "project", "WANDB_RUN_ID": "run_id", "WANDB_TAGS": "run_tags"}[variable]
    with pytest.raises((ValueError, wandb.errors.UsageError)):
        wandb.Settings(**{key: value.split(",") if key == "run_tags" else value})


def test_a_project_of_the_configuration_is_checked_too(monkeypatch: pytest.MonkeyPatch):
    (mistake,) = wandb_mistakes(TrackingConfig(project="my/project"))
    assert mistake.startswith("tracking.project=my/project: ")
    assert wandb_mistakes(TrackingConfig(project="")) != []
    monkeypatch.setenv("WANDB_PROJECT", "a/b")  # which wandb itself would refuse, whatever it is told
    assert wandb_mistakes(TrackingConfig(project="good"))[0].startswith("WANDB_PROJECT=a/b")


# The thread


class StandIn(types.ModuleType):
    """Stands in for the module wandb and its run, and keeps the rows; it fails at step `fails_at`."""

    Settings = dict

    def __init__(self, folder: Path, has: int = -1, fails_at: int | None = None):
        super().__init__("wandb")
        self.summary: dict = {}
        self.rows: list[tuple[int, dict]] = []
        self.fails_at, self.starting_step, self.preempting = fails_at, has + 1, False
        self.exit_code: int | None = None
        self.dir = str(folder / "wandb/offline-run-new/files")
        self.define_metric = lambda *_, **__: None

    def init(self, **options: Any) -> StandIn:
        self.options = options
        return self

    def log(self, row: dict, step: int, commit: bool) -> None:
        if step == self.fails_at:
            raise ValueError("two\nlines")
        self.rows.append((step, row))

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code

    def mark_preempting(self) -> None:
        self.preempting = True

    def teardown(self) -> None:
        pass

    def Table(self, columns: list, data: list) -> list:
        return data

    def plot_table(self, name: str, table: list, fields: dict, strings: dict) -> list:
        return table

    def Image(self, pixels: np.ndarray) -> np.ndarray:
        return pixels


CHART = confusion_chart(np.array([[1, 2], [3, 4]]), ["a", "b"])
CELLS = [["a", "a", 1], ["a", "b", 2], ["b", "a", 3], ["b", "b", 4]]


def wandb_tracker(folder: Path, said: list[str]) -> RunTracker:
    return RunTracker(folder, WandbRun("offline", folder, "id", {"name": "a"}, said.append), said.append)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    module = StandIn(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_each_offline_folder_has_the_whole_run_each_step_once_and_the_older_ones_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    said: list[str] = []
    for attempt, steps in enumerate(((1, 2, 4, 4, 6), (5, 6, 7))):
        module = StandIn(tmp_path)
        monkeypatch.setitem(sys.modules, "wandb", module)
        older = tmp_path / "wandb/offline-run-older"
        older.mkdir(parents=True)
        tracker = wandb_tracker(tmp_path, said)
        for count, step in enumerate(steps):
            tracker.log({f"train/{attempt}{count}": count}, step, 0.0, {"chart": CHART} if count == 2 else {})
        tracker.finish({"x": 1}, {"table": CHART})
        assert [step for step, _ in module.rows] == ([1, 2, 4, 6] if attempt == 0 else [1, 2, 4, 5, 6, 7])
        assert not older.exists()
        truncate_metrics(tmp_path, 4, pytest.fail)
    assert module.rows[2][1].items() >= {"train/02": 2, "train/03": 3, "chart": CELLS}.items()
    assert [step for step, row in module.rows if "table" in row] == [7]
    assert module.summary == {"x": 1}
    assert (module.exit_code, module.preempting) == (0, False)
    assert not said


def test_online_wandb_gets_what_the_server_does_not_have(tmp_path: Path, module: StandIn):
    tracker = wandb_tracker(tmp_path, [])
    for step in (1, 2, 3):
        tracker.log({"train/loss": 1 / step}, step, 0.0, {"chart": CHART})
    tracker.finish({})
    begin_record(tmp_path, "id", {"name": "a"})
    module.starting_step, module.rows = 3, []
    session = Session(module, tmp_path, "online", {"id": "id", "name": "a"}, {})
    session.replay(stored_rows(tmp_path))
    session.finish({}, None, stopped=False)
    assert [(step, row["chart"]) for step, row in module.rows] == [(3, CELLS)]
    assert module.options["resume"] == "allow"
    assert (session.num_rows, session.num_media) == (1, 1)


def test_a_run_that_only_had_to_end_still_sends_its_result(tmp_path: Path, module: StandIn):
    tracker = wandb_tracker(tmp_path, [])
    tracker.log({"train/loss": 1.0}, 5, 0.0)  # and is killed
    again = wandb_tracker(tmp_path, [])
    again.finish({"weights_sha256": "1"}, {"table": CHART})
    assert module.summary == {"weights_sha256": "1"}
    assert [(step, row["table"]) for step, row in module.rows] == [(5, CELLS)]


def test_a_stopped_run_is_preempting_and_a_failed_one_has_failed(tmp_path: Path, module: StandIn):
    tracker = wandb_tracker(tmp_path, [])
    tracker.stop()  # before its first line of the log
    assert (module.exit_code, module.preempting) == (75, True)
    module.preempting = False
    tracker = wandb_tracker(tmp_path, [])
    tracker.log({"train/loss": 1.0}, 1, 0.0)
    tracker.close()
    tracker.close()
    assert (module.exit_code, module.preempting) == (1, False)


def test_a_run_that_failed_before_it_began_starts_nothing(tmp_path: Path, module: StandIn):
    wandb_tracker(tmp_path, []).close()
    assert not hasattr(module, "options")


def test_what_wandb_raises_is_told_in_one_line(tmp_path: Path, module: StandIn):
    module.fails_at = 2
    said: list[str] = []
    tracker = wandb_tracker(tmp_path, said)
    for step in range(6):
        tracker.log({"train/loss": 1.0}, step, 0.0)
    tracker.finish({})
    assert [event["step"] for event in read_metrics(tmp_path)] == list(range(6))
    assert len(said) == 1
    assert "two lines" in said[0]
    assert f"later: python -m digitdist.report sync {tmp_path}" in said[0]


@pytest.mark.parametrize("name", ["last-step", "run.json", "media.jsonl", ".run.json.tmp"])
@pytest.mark.parametrize(
    "content", [b"", b"\0" * 9, b"\xff\xfe", b"nonsense", b'{"step": 1', b"[" * 100_000, b"null\n7\n{}\n", None]
)
def test_no_damage_to_wandbs_side_files_stops_a_run(name: str, content: bytes | None, tmp_path: Path, module: StandIn):
    file = tmp_path / "wandb" / name
    file.parent.mkdir()
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    said: list[str] = []
    tracker = wandb_tracker(tmp_path, said)
    tracker.log({"train/loss": 1.0}, 3, 0.0, {"chart": CHART})
    tracker.finish({"x": 1})
    assert module.summary == {"x": 1}
    assert [step for step, _ in module.rows] == [3]
    assert len(said) <= 1


def test_a_file_in_place_of_wandbs_folder_stops_no_run(tmp_path: Path, module: StandIn):
    (tmp_path / "wandb").write_text("mine")
    said: list[str] = []
    tracker = wandb_tracker(tmp_path, said)
    tracker.log({"train/loss": 1.0}, 3, 0.0, {"chart": CHART})
    tracker.finish({"x": 1})
    assert [event["step"] for event in read_metrics(tmp_path)] == [3]
    assert len(said) == 1
    assert "cannot be kept" in said[0]


def test_two_attempts_within_a_second_have_folders_of_their_own(tmp_path: Path, module: StandIn):
    def name() -> str:
        return f"offline-run-{time.strftime('%Y%m%d_%H%M%S')}-id"

    first = name()
    (tmp_path / "wandb" / first).mkdir(parents=True)
    Session(module, tmp_path, "offline", {"id": "id", "name": "a"}, {})
    assert name() != first


# What the folder keeps


def test_wandbs_own_log_on_a_full_disk_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    logger = logging.getLogger("wandb")
    monkeypatch.setattr(logger, "handlers", [logging.StreamHandler(Full())])
    monkeypatch.setattr(logging, "raiseExceptions", True)
    prepare_environment(tmp_path, "offline")
    logger.warning("this does not fit")
    assert capsys.readouterr().err == ""


def test_charts_and_tables_come_back_as_they_were(tmp_path: Path, module: StandIn):
    pixels = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    (tmp_path / "wandb").mkdir()
    keep_media(tmp_path, 3, {"t": image_table(pixels, {"index": [5, 6]}), "gray": image_table(pixels[..., 0], {})})
    _, media = stored_rows(tmp_path)[3]
    rows = draw(module, media["t"])
    assert [row[1] for row in rows] == [5, 6]
    assert all((row[0] == image).all() for row, image in zip(rows, pixels, strict=True))
    assert [row[0].shape for row in draw(module, media["gray"])] == [(4, 4), (4, 4)]


def test_charts_of_steps_that_are_taken_again_are_dropped(tmp_path: Path):
    tracker = RunTracker(tmp_path, None, print)
    tracker.log({"train/loss": 1.0}, 2, 0.0)
    tracker.finish({})
    begin_record(tmp_path, "id", {"name": "a"})
    for step in (2, 4):
        keep_media(tmp_path, step, {"chart": CHART})
    begin_record(tmp_path, "id", {"name": "b"})
    assert list(stored_rows(tmp_path)) == [2]
    assert dict(read_options(tmp_path) or {}).items() >= {"id": "id", "name": "b"}.items()


@pytest.mark.parametrize(
    "line",
    [
        {"step": 2, "name": ["chart"], "media": {}},
        {"step": 2, "name": "chart", "media": None},
        {"step": 2, "name": "chart", "media": {"kind": "sound"}},
        {"step": 2, "name": "chart", "media": {"kind": "confusion", "classes": ["0", "1"], "counts": [[1, 0]]}},
        {"step": 2, "name": "table", "media": {"kind": "images", "images": ["bm9uZQ=="], "columns": {}}},
        {"step": 2, "name": "table", "media": {"kind": "images", "images": [], "columns": {"index": [1]}}},
    ],
)
def test_a_damaged_line_of_charts_costs_that_chart_alone_and_is_told(line: dict, tmp_path: Path, module: StandIn):
    wandb_tracker(tmp_path, []).log({"train/loss": 1.0}, 2, 0.0, {"first": CHART})
    with (tmp_path / "wandb/media.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    told: list[str] = []
    assert {*stored_rows(tmp_path, told.append)[2][1]} == {"first"}
    said: list[str] = []
    tracker = wandb_tracker(tmp_path, said)
    tracker.log({"train/loss": 1.0}, 3, 0.0, {"chart": CHART})
    tracker.finish({"x": 1})
    assert module.summary == {"x": 1}
    assert said == told == [f"{tmp_path}/wandb/media.jsonl: 1 damaged lines are left out"]


@pytest.mark.parametrize("name", ["run.json", "media.jsonl"])
def test_nothing_but_plain_files_is_waited_for(name: str, tmp_path: Path):
    begin_record(tmp_path, "id", {"name": "a"})
    (tmp_path / "wandb" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "wandb" / name)
    said: list[str] = []
    assert (read_options(tmp_path) is None) == (name == "run.json")
    assert stored_rows(tmp_path, said.append) == {}
    assert len(said) == (name == "media.jsonl")


# Sending later


def test_metrics_that_are_lost_are_noticed_though_their_charts_are_there(tmp_path: Path):
    begin_record(tmp_path, "id", {"name": "a"})
    keep_media(tmp_path, 4, {"chart": CHART})
    assert are_lines_lost(stored_rows(tmp_path), {"steps": 4})
    assert not are_lines_lost(stored_rows(tmp_path), {})
    RunTracker(tmp_path, None, print).log({"train/loss": 1.0}, 4, 0.0)
    assert not are_lines_lost(stored_rows(tmp_path), {"steps": 4})


def test_a_sync_without_anything_to_send_or_a_key_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="no offline W&B run"):
        sync_wandb(tmp_path, print)
    (tmp_path / "wandb/offline-run-1-a").mkdir(parents=True)
    with pytest.raises(UserError, match=r"offline-run-1-a: wandb sync it"):
        sync_wandb(tmp_path, print)
    begin_record(tmp_path, "a", {"name": "a"})
    with pytest.raises(UserError, match="no key"):
        sync_wandb(tmp_path, print)


def test_a_run_that_is_being_trained_is_not_sent(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch):
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    begin_record(tmp_path, "a", {"name": "a"})
    with FileLock(tmp_path / ".lock"), pytest.raises(UserError, match="is being trained, and is not sent"):
        sync_wandb(tmp_path, print)
    assert not server.runs


def test_the_record_of_a_run_can_be_read_by_another_program(tmp_path: Path):
    begin_record(tmp_path, "id", {"name": "a", "config": {"seed": 1}})
    assert json.loads((tmp_path / "wandb/run.json").read_text()) == {"id": "id", "name": "a", "config": {"seed": 1}}
