from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launching import CLEAN, QUIET, ROOT, events, python, result, torchrun
from wandb_server import Server, records, rows

from digitdist import tracking
from digitdist.config import UserError, load
from digitdist.tracking import RunTracker, read_metrics

TRAIN = ("-m", "digitdist.train", "run.name=a")
STEPS = ("train.max_steps=100", "train.log_every=5", "train.threads=1")


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def with_key(url: str) -> dict[str, str]:
    return {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": url}


def segments(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("offline-run-*"))


def wait_until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def on_a_terminal(*arguments: str, cwd: Path, env: dict[str, str]) -> tuple[int, str]:
    """Exit code and output of a command that has a terminal on which nobody types."""
    main, secondary = pty.openpty()
    streams = {"stdin": secondary, "stdout": secondary, "stderr": secondary}
    process = subprocess.Popen([sys.executable, *arguments], cwd=cwd, env=CLEAN | {"COLUMNS": "200"} | env, **streams)
    os.close(secondary)
    shown = b""
    try:
        while chunk := os.read(main, 65536):
            shown += chunk
    except OSError:  # the other end has closed
        pass
    os.close(main)
    return process.wait(timeout=60), shown.decode()


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
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert tracking.wandb_mode("disabled") == ("disabled", None)
    assert tracking.wandb_mode("offline") == ("offline", None)
    assert tracking.wandb_mode("auto") == ("offline", "no key (wandb login)")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    mode, reason = tracking.wandb_mode("auto")
    assert mode == "offline"
    assert "out of reach" in str(reason)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert tracking.wandb_mode("auto") == ("disabled", None)


@pytest.mark.parametrize(("manner", "reason"), [("answer", None), ("fail", "answers 500"), ("close", "out of reach")])
def test_a_server_is_judged_by_its_answer(manner: str, reason: str | None, server: Server, monkeypatch: pytest.MonkeyPatch):
    server.manner = manner
    for name, value in with_key(server.url).items():
        monkeypatch.setenv(name, value)
    mode, why = tracking.wandb_mode("auto")
    assert mode == ("offline" if reason else "online")
    assert (reason or "") in str(why)


def test_a_sync_without_anything_to_send_or_a_key_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(UserError, match="no offline W&B run"):
        tracking.sync(tmp_path, print)
    (tmp_path / "wandb/offline-run-1-a").mkdir(parents=True)
    with pytest.raises(UserError, match="no key"):
        tracking.sync(tmp_path, print)


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
    return RunTracker(folder, tracking.Wandb("offline", folder, "id", {"name": "a"}, said.append), said.append)


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
        tracking.cut_metrics(tmp_path, 4)
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


@pytest.mark.slow
def test_what_goes_to_wandb(place: Path):
    arguments = ("tracking.wandb=offline", "tracking.artifacts=true", "tracking.tags=[a, b]", "tracking.group=g")
    done = python(*TRAIN, *arguments, "train.max_steps=45", "checkpoint.every_steps=0", cwd=place)
    assert done.code == 0, done.err
    (segment,) = segments(place / "runs/a")
    found = records(segment)
    (run,) = [record.run for record in found if record.HasField("run")]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (run.display_name, run.run_group, list(run.tags)) == ("a", "g", ["a", "b"])
    assert (config["data.batch_size"], config["environment"]["world_size"]) == (100, 1)

    logged = rows(segment)
    assert [row["step"] for row in logged] == [20, 40, 45]
    lines = read_metrics(place / "runs/a")
    last = {key: value for line in lines if line["step"] == 45 for key, value in line.items()}
    assert last == {key: logged[-1][key] for key in last}
    assert {"train/gradient_norm", "train/weight_norm", "time/compute"} <= set(logged[0])
    mistakes = logged[-1]["test/worst_mistakes"]
    final = result(place / "runs/a")
    assert mistakes["nrows"] == min(50, final["test_total"] - final["test_correct"])
    table = json.loads((segment / "files" / mistakes["path"]).read_text())
    assert table["columns"] == ["image", "index", "label", "prediction", "probability", "loss"]
    assert all(row[2] != row[3] for row in table["data"])
    confusion = next((segment / "files/media/table/test").glob("confusion*.json"))
    counts = [row[2] for row in json.loads(confusion.read_text())["data"]]
    assert (len(counts), sum(counts)) == (100, 10000)

    summary = {u.key: json.loads(u.value_json) for r in found if r.HasField("summary") for u in r.summary.update}
    assert summary["weights_sha256"] == final["weights_sha256"]
    models = [r.request.log_artifact.artifact for r in found if r.request.HasField("log_artifact")]
    models += [r.artifact for r in found if r.HasField("artifact")]
    (model,) = [artifact for artifact in models if artifact.type == "model"]
    assert json.loads(model.metadata)["test_correct"] == final["test_correct"]
    assert [entry.path for entry in model.manifest.contents] == ["weights.safetensors"]


@pytest.fixture(scope="module")
def disabled(tmp_path_factory: pytest.TempPathFactory, mnist_root: Path) -> tuple[Path, float]:
    """The folder of a run without W&B, which was not even imported, and its seconds."""
    place = tmp_path_factory.mktemp("disabled")
    (place / "data").symlink_to(mnist_root)
    (place / "wandb.py").write_text("raise SystemExit('imported')")
    start = time.monotonic()
    done = python(*TRAIN, *QUIET, *STEPS, cwd=place)
    assert done.code == 0, done.err
    return place / "runs/a", time.monotonic() - start


def same_run(folder: Path, disabled: tuple[Path, float], start: float, more_s: float) -> None:
    seconds = time.monotonic() - start
    print(f"{seconds:.1f} s, disabled {disabled[1]:.1f} s")
    assert result(folder)["weights_sha256"] == result(disabled[0])["weights_sha256"]
    assert events(folder) == events(disabled[0])
    assert seconds < disabled[1] + more_s


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "env"),
    [
        ("auto", {}),
        ("auto", {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}),
        ("offline", {}),
        ("online", {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}),
    ],
    ids=["no key", "a key and a dead server", "offline", "online with a dead server"],
)
def test_without_a_server_nothing_is_lost(mode: str, env: dict[str, str], place: Path, disabled: tuple[Path, float]):
    start = time.monotonic()
    code, shown = on_a_terminal(*TRAIN, *STEPS, f"tracking.wandb={mode}", cwd=place, env=env | {"HOME": str(place)})
    assert code == 0, shown
    same_run(place / "runs/a", disabled, start, more_s=30)
    assert ("wandb sync runs/a/wandb/offline-run-*" in shown) == (mode != "offline")
    assert "W&B failed" not in shown
    (segment,) = segments(place / "runs/a")
    assert [row["step"] for row in rows(segment)] == list(range(5, 101, 5))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("manner", "when"),
    [
        *(("hang", "start"), ("fail", "after"), ("close", "after")),
        *(pytest.param(*case, marks=pytest.mark.soak) for case in (("hang", "after"), ("fail", "start"), ("close", "start"))),
    ],
)
def test_a_server_that_misbehaves_changes_nothing(
    manner: str, when: str, server: Server, place: Path, disabled: tuple[Path, float]
):
    server.manner = "answer" if when == "after" else manner
    server.then = (b"UpsertBucket", manner) if when == "after" else None
    start = time.monotonic()
    done = python(*TRAIN, *STEPS, cwd=place, env=with_key(server.url))
    assert done.code == 0, done.err
    same_run(place / "runs/a", disabled, start, more_s=15)
    assert sum(line.startswith("W&B") for line in done.out.splitlines()) == 1


@pytest.mark.slow
def test_a_server_that_answers_gets_it_all_from_one_rank(server: Server, place: Path):
    done = torchrun(2, *TRAIN, *STEPS, cwd=place, env=with_key(server.url))
    assert done.code == 0, done.err
    assert "W&B" not in done.out
    assert sum(b"RunResumeStatus" in body for _, body in server.asked) == 1
    streamed = b"".join(body for path, body in server.asked if path.endswith("file_stream"))
    assert b"train/gradient_norm" in streamed
    assert b"weights_sha256" in streamed


@pytest.mark.slow
def test_a_killed_and_resumed_run_is_one_run(server: Server, place: Path, monkeypatch: pytest.MonkeyPatch):
    (place / "slow.py").write_text(
        "import os, time\nfrom digitdist.models import Cnn\nclass Net(Cnn):\n  def forward(self, images):\n"
        "    time.sleep(float(os.environ['SLOW_S']) if self.training else 0)\n    return super().forward(images)\n"
    )
    arguments = (*TRAIN, *STEPS, "tracking.wandb=offline", "checkpoint.every_steps=30", "model.target=slow.Net")
    env = CLEAN | {"PYTHONPATH": f"{place}:{ROOT}", "SLOW_S": "0.06"}
    process = subprocess.Popen([sys.executable, *arguments], cwd=place, env=env, stdout=subprocess.DEVNULL)
    mark = place / "runs/a/wandb/last-step"
    wait_until(lambda: mark.exists() and int(mark.read_text()) >= 35)
    time.sleep(1.2)
    process.kill()
    process.wait()
    assert python(*arguments, cwd=place, env=env | {"SLOW_S": "0"}).code == 0
    first, second = segments(place / "runs/a")
    assert first.name.rpartition("-")[2] == second.name.rpartition("-")[2]
    steps = [row["step"] for segment in (first, second) for row in rows(segment)]
    assert steps == sorted(set(steps))
    assert steps[-1] == 100
    assert len(steps) >= 15  # of 20 lines: those of the last second may be lost with it

    for name, value in with_key(server.url).items():
        monkeypatch.setenv(name, value)
    said: list[str] = []
    tracking.sync(place / "runs/a", said.append)
    assert "2 segments" in said[0]
    assert any(path.endswith("file_stream") for path, _ in server.asked)


# The sweep


def test_the_sweep_is_one_that_wandb_takes_and_train_too():
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args, load_sweep_config

    sweep = load_sweep_config(str(ROOT / "configs/sweep.yaml"))
    assert sweep is not None
    assert sweep["method"] in ("grid", "random", "bayes")
    assert sweep["metric"]["name"] == "validation/accuracy"
    drawn = {
        name: {"value": p.get("value", p.get("min", p.get("values", [None])[0]))} for name, p in sweep["parameters"].items()
    }
    command = create_sweep_command(sweep["command"])
    at = command.index("${args_no_hyphens}")
    command[at : at + 1] = create_sweep_command_args({"args": drawn})["args_no_hyphens"]
    assert command[:4] == ["accelerate", "launch", "-m", "digitdist.train"]
    assert load((), command[4:]).data.validation > 0
