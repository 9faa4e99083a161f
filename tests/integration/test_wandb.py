from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.launching import CLEAN, QUIET, ROOT, on_a_terminal, python, torchrun
from helpers.runs import assert_same_run, events, result, wait_until
from helpers.variants import soak
from helpers.wandb_server import Server, StoredRun, records, rows

from digitdist.config import load_config
from digitdist.errors import UserError
from digitdist.runs import confusion_chart, read_metrics, sync_wandb
from digitdist.runs.tracker import RunTracker
from digitdist.runs.wandb_record import begin_record, keep_media

TRAIN = ("-m", "digitdist.train", "run.name=a")
STEPS = ("train.max_steps=100", "train.log_every=5", "train.threads=1")
MORE_S = 45  # that a run with W&B may take longer on a busy machine; wandb's own waits would be 90 s and more


def segments(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("offline-run-*"))


def steps_of(folder: Path) -> list[int]:
    return sorted({event["step"] for event in read_metrics(folder)})


def assert_all_at_server(run: StoredRun, folder: Path) -> None:
    """The server has each step once, with all metrics of its lines but the wall time, which a step taken again has anew, and
    the result."""
    assert run.steps == steps_of(folder)
    for row in run.rows:
        lines = [event for event in events(folder) if event["step"] == row["step"]]
        merged = {key: value for line in lines for key, value in line.items()}
        assert {key: row[key] for key in merged} == merged
    assert run.summary["weights_sha256"] == result(folder)["weights_sha256"]
    assert (run.state, run.exit_code) == ("finished", 0)


@pytest.fixture
def with_server(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server with which this process would talk."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server


@pytest.mark.slow
def test_what_goes_to_wandb_and_what_a_sync_sends_of_it(with_server: Server, place: Path):
    arguments = ("tracking.artifacts=true", "tracking.tags=[a, b]", "tracking.group=g")
    names = {"WANDB_MODE": "dryrun", "WANDB_PROJECT": "theirs", "WANDB_NOTES": "noted", "WANDB_RUN_GROUP": "not this one"}
    env = with_server.environment | names
    done = python(*TRAIN, *arguments, "train.max_steps=45", "checkpoint.every_steps=0", cwd=place, env=env)
    assert done.code == 0, done.err
    assert not with_server.asked
    (segment,) = segments(place / "runs/a")
    found = records(segment)
    (run,) = [record.run for record in found if record.HasField("run")]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (run.display_name, run.project, run.run_group, run.notes, list(run.tags)) == (
        "a",
        "theirs",
        "g",
        "noted",
        ["a", "b"],
    )
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

    said: list[str] = []
    sync_wandb(place / "runs/a", said.append)
    assert "sent 3 of 3 steps, 2 charts and tables, the result, the weights" in said[0]
    assert_all_at_server(with_server.run, place / "runs/a")
    given = with_server.run.upserted
    assert (given["project"], given["displayName"], given["groupName"], given["notes"]) == ("theirs", "a", "g", "noted")
    assert given["tags"] == ["a", "b"]
    assert with_server.run.config["environment"] == config["environment"]
    tables = {
        Path(name).name.partition("_table")[0].partition("_mistakes")[0] for name in with_server.run.files if "media" in name
    }
    assert tables == {"confusion", "worst"}
    kinds = {given["input"]["artifactCollectionName"]: given["input"]["artifactTypeName"] for given in with_server.artifacts}
    assert kinds["a-weights"] == "model"


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


def assert_unharmed(folder: Path, disabled: tuple[Path, float], start: float) -> None:
    seconds = time.monotonic() - start
    print(f"{seconds:.1f} s, disabled {disabled[1]:.1f} s")
    assert_same_run(folder, disabled[0])
    assert seconds < disabled[1] + MORE_S


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "env"),
    [
        ("auto", {}),
        ("auto", {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}),
        soak("offline", {}),
        ("online", {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}),
    ],
    ids=["no key", "a key and a dead server", "offline", "online with a dead server"],
)
def test_without_a_server_nothing_is_lost(mode: str, env: dict[str, str], place: Path, disabled: tuple[Path, float]):
    start = time.monotonic()
    code, shown = on_a_terminal(*TRAIN, *STEPS, f"tracking.wandb={mode}", cwd=place, env=env | {"HOME": str(place)})
    assert code == 0, shown
    assert_unharmed(place / "runs/a", disabled, start)
    assert ("later: python -m digitdist.report sync runs/a" in shown) == (mode != "offline")
    assert "W&B failed" not in shown
    (segment,) = segments(place / "runs/a")
    assert [row["step"] for row in rows(segment)] == list(range(5, 101, 5))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("manner", "when"),
    [
        *(("hang", "start"), ("fail", "after"), soak("close", "after")),
        *(soak("hang", "after"), soak("fail", "start"), soak("close", "start")),
    ],
)
def test_a_server_that_misbehaves_changes_nothing_and_what_is_promised_for_later_is_there(
    manner: str, when: str, with_server: Server, place: Path, disabled: tuple[Path, float]
):
    server = with_server
    server.manner = "answer" if when == "after" else manner
    server.then = (b"UpsertBucket", manner) if when == "after" else None
    start = time.monotonic()
    done = python(*TRAIN, *STEPS, cwd=place, env=server.environment)
    assert done.code == 0, done.err
    assert_unharmed(place / "runs/a", disabled, start)
    (line,) = [line for line in done.out.splitlines() if line.startswith("W&B")]
    server.manner, server.then = "answer", None
    sync_wandb(place / line.partition("digitdist.report sync ")[2], lambda _: None)
    assert_all_at_server(server.run, place / "runs/a")


@pytest.mark.slow
def test_a_server_that_answers_gets_it_all_from_one_rank_and_no_temporary_folder_is_left(server: Server, place: Path):
    (place / "tmp").mkdir()
    env = server.environment | {"TMPDIR": str(place / "tmp")}
    done = torchrun(2, *TRAIN, *STEPS, "tracking.artifacts=true", cwd=place, env=env)
    assert done.code == 0, done.err
    assert "W&B" not in done.out
    assert sum(b"RunResumeStatus" in body for _, body in server.asked) == 1
    assert_all_at_server(server.run, place / "runs/a")
    assert [left.name for left in (place / "tmp").iterdir() if not left.name.startswith("torch")] == []


@pytest.mark.slow
def test_a_run_that_is_stopped_killed_and_killed_at_its_end_is_one_run_of_the_server(server: Server, place: Path):
    (place / "slow.py").write_text(
        "import os, time\nfrom digitdist.models import Cnn\nclass Net(Cnn):\n  def forward(self, images):\n"
        "    time.sleep(float(os.environ['SLOW_S']) if self.training else 0)\n    return super().forward(images)\n"
    )
    arguments = (*TRAIN, *STEPS, "checkpoint.every_steps=30", "model.target=slow.Net", "run.report=false")
    env = CLEAN | server.environment | {"PYTHONPATH": f"{place}:{ROOT}", "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "2"}

    def start(slow_s: str, fault: str = "") -> subprocess.Popen:
        own = env | {"SLOW_S": slow_s, "DIGITDIST_FAULT": fault}
        return subprocess.Popen([sys.executable, *arguments], cwd=place, env=own, stdout=subprocess.DEVNULL)

    stopped = start("0.2")
    wait_until(lambda: server.runs and server.run.steps)
    (place / "runs/a/STOP").touch()
    assert stopped.wait() == 75
    assert (server.run.state, server.run.exit_code) == ("preempted", 75)
    before = server.run.steps
    killed = start("0.3")  # so long that wandb sends steps, as it is to do every 2 s, before the end
    wait_until(lambda: server.run.steps != before)
    killed.kill()
    killed.wait()
    assert start("0", "kill rank=0 step=100 phase=end").wait() == -9
    assert start("0").wait() == 0
    assert_all_at_server(server.run, place / "runs/a")


@pytest.mark.slow
def test_a_resumed_offline_run_is_sent_once_in_the_middle_and_at_its_end(with_server: Server, place: Path):
    folder, said = place / "runs/a", []
    for steps in (20, 40, 60):
        arguments = (*TRAIN, "tracking.wandb=offline", "train.log_every=5", "run.report=false", f"train.max_steps={steps}")
        assert python(*arguments, cwd=place).code == 0
        (segment,) = segments(folder)
        assert [row["step"] for row in rows(segment)] == steps_of(folder)
        if steps == 40:
            with_server.manner = "refuse"
            with pytest.raises(UserError, match="401"):
                sync_wandb(folder, said.append)
            with_server.manner = "answer"
            sync_wandb(folder, said.append)
            assert_all_at_server(with_server.run, folder)
    sync_wandb(folder, said.append)
    sync_wandb(folder, said.append)
    assert [line.split(" steps")[0].rpartition("sent ")[2] for line in said] == ["8 of 8", "4 of 12", "0 of 12"]
    assert_all_at_server(with_server.run, folder)

    (run_id,) = with_server.runs
    del with_server.runs[run_id]
    command = [sys.executable, "-m", "wandb", "sync", str(segment)]
    subprocess.run(command, check=True, capture_output=True, env=CLEAN | with_server.environment | {"HOME": str(place)})
    assert_all_at_server(with_server.run, folder)


@pytest.mark.slow
def test_a_sync_that_the_server_does_not_acknowledge_has_failed(
    with_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("digitdist.runs.wandb_sync.ACKNOWLEDGE_TIMEOUT_S", 2.0)
    tracker = RunTracker(tmp_path, None)
    for step in (5, 10):
        tracker.log({"train/loss": 1 / step}, step, 0.0)
    tracker.finish({})
    begin_record(tmp_path, "a", {"name": "a", "project": "p"})
    keep_media(tmp_path, 10, {"chart": confusion_chart(np.eye(2, dtype=int), ["a", "b"])})
    said: list[str] = []
    manners = (("refuse", "401"), ("drop", "shows steps up to -1, not 10"), ("lose", "does not show media/table"))
    for manner, told in manners:
        with_server.manner = manner
        with pytest.raises(UserError, match=told):
            sync_wandb(tmp_path, said.append)
    assert not said
    assert with_server.run.steps == [5, 10]
    assert not [name for name in with_server.run.files if "media" in name]
    with_server.manner = "answer"
    sync_wandb(tmp_path, said.append)
    assert "sent 0 of 2 steps" in said[0]
    assert [name for name in with_server.run.files if "media" in name]
    assert not (tmp_path / "wandb/unsent").exists()
    assert with_server.run.steps == [5, 10]
    assert with_server.run.state == "failed"  # it has no result


@pytest.mark.slow
def test_a_name_that_wandb_would_refuse_is_an_error_at_the_start(place: Path):
    done = python(*TRAIN, cwd=place, env={"WANDB_PROJECT": "a/b", "WANDB_RUN_ID": "c:d"})
    assert done.code == 2
    assert done.err.startswith("error: WANDB_PROJECT=a/b: W&B takes no /")
    assert "WANDB_RUN_ID=c:d" in done.err
    assert not (place / "runs").exists()


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
    assert load_config((), command[4:]).data.validation > 0
