from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.launching import CLEAN, QUIET, ROOT, on_a_terminal, python, torchrun
from helpers.runs import assert_same_run, result, wait_until
from helpers.wandb_server import Server, records, rows

from digitdist.config import load_config
from digitdist.runs import read_metrics, sync_wandb

TRAIN = ("-m", "digitdist.train", "run.name=a")
STEPS = ("train.max_steps=100", "train.log_every=5", "train.threads=1")
MORE_S = 45  # that a run with W&B may take longer on a busy machine; wandb's own waits would be 90 s and more


def segments(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("offline-run-*"))


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
        ("offline", {}),
        ("online", {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}),
    ],
    ids=["no key", "a key and a dead server", "offline", "online with a dead server"],
)
def test_without_a_server_nothing_is_lost(mode: str, env: dict[str, str], place: Path, disabled: tuple[Path, float]):
    start = time.monotonic()
    code, shown = on_a_terminal(*TRAIN, *STEPS, f"tracking.wandb={mode}", cwd=place, env=env | {"HOME": str(place)})
    assert code == 0, shown
    assert_unharmed(place / "runs/a", disabled, start)
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
    done = python(*TRAIN, *STEPS, cwd=place, env=server.environment)
    assert done.code == 0, done.err
    assert_unharmed(place / "runs/a", disabled, start)
    assert sum(line.startswith("W&B") for line in done.out.splitlines()) == 1


@pytest.mark.slow
def test_a_server_that_answers_gets_it_all_from_one_rank(server: Server, place: Path):
    done = torchrun(2, *TRAIN, *STEPS, cwd=place, env=server.environment)
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

    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    said: list[str] = []
    sync_wandb(place / "runs/a", said.append)
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
    assert load_config((), command[4:]).data.validation > 0
