"""The command, run as a person runs it, on one process."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from helpers.launching import QUIET, ROOT, on_a_terminal, python
from helpers.runs import events, only_run, result

from digitdist.checkpoint import folders, read, weights_sha256
from digitdist.distributed import describe_instructions
from digitdist.runs import read_metrics

TRAIN = ("-m", "digitdist.train")


def test_a_run_leaves_the_files_of_the_readme(place: Path):
    done = python(*TRAIN, *QUIET, "train.max_steps=45", "data.validation=1000", "run.name=a", cwd=place)
    assert done.code == 0, done.err
    folder = place / "runs/a"
    final = result(folder)
    assert set(final) == {
        *("test_correct", "test_total", "test_accuracy", "test_loss", "epochs", "steps", "world_size", "device"),
        *("precision", "images_per_second", "train_seconds", "weights_sha256", "peak_memory_mb", "ended"),
    }
    assert (final["test_total"], final["steps"], final["world_size"]) == (10000, 45, 1)
    assert (final["device"], final["precision"]) == ("cpu", "fp32")
    (memory,) = final["peak_memory_mb"]
    assert memory["host"] > 100
    assert memory["device"] is None
    saved = np.load(folder / "predictions.npz")
    assert saved["index"].tolist() == list(range(10000))
    assert int((saved["label"] == saved["prediction"]).sum()) == final["test_correct"]
    assert [(e["step"], "train/loss" in e, "test/accuracy" in e) for e in events(folder)] == [
        *((20, True, False), (40, True, False), (45, True, False), (45, False, True))
    ]
    assert events(folder)[-1]["validation/total"] == 1000
    (stored,) = folders(folder / "checkpoints")
    assert weights_sha256(read(stored).tensors["model"]) == final["weights_sha256"]
    (start,) = json.loads((folder / "environment.json").read_text())["starts"]
    assert {"torch", "accelerate", "device", "world_size", "precision", "git_commit", "cpu_instructions"} <= set(start)
    assert "batch_size: 100" in (folder / "config.yaml").read_text()
    for line in (line for line in read_metrics(folder) if "train/loss" in line):
        times = {key[5:]: value for key, value in line.items() if key.startswith("time/")}
        total = times.pop("total")
        assert set(times) == {"data", "compute", "sync", "optimizer", "evaluation", "checkpoint", "other"}
        assert sum(times.values()) == pytest.approx(total, rel=0.02)
        assert times["compute"] > total / 2
        assert line["train/gradient_norm"] > 0
        assert line["train/weight_norm"] > 1


def test_it_says_what_it_runs_on_and_how_it_went(place: Path):
    done = python(*TRAIN, *QUIET, "train.max_steps=40", "train.accumulate=3", cwd=place)
    for part in (
        f", {describe_instructions()}), world size 1",
        "fp32",
        "100 global = 33 or 34 per rank × 1 rank × 3 accumulated",
        "60,000 images to train",
    ):
        assert part in done.out
    folder = only_run(place).name
    lines = done.out.splitlines()
    assert any(line.startswith("Train epoch 1 [ 2,000/60,000 (  3 %)] loss") for line in lines)
    assert any(f"{result(place / 'runs' / folder)['test_correct']}/10000" in line for line in lines)
    assert "95 % interval" in done.out
    assert f"python -m digitdist.evaluate runs/{folder}" in lines[-1]
    assert done.err == ""


def test_a_terminal_gets_a_bar(place: Path):
    code, text = on_a_terminal(*TRAIN, *QUIET, "train.max_steps=60", cwd=place, env={"COLUMNS": "100"})
    assert code == 0, text
    assert "epoch 1/9" in text
    assert "6000/60000" in text
    assert "Train epoch" not in text
    rates = [float(rate) for rate in re.findall(r"([\d.]+) images/s", text)]
    assert rates
    assert max(rates) < 1e6, "the first rate too is that of the images since the bar began"


def test_a_bar_moves_between_lines_of_the_log_and_other_lines_do_not_tear_it(place: Path):
    """Steps of half a second, no line of the log among them, and W&B's own line in their midst."""
    (place / "slow.py").write_text(
        "import time\nfrom digitdist.models import Cnn\nclass Net(Cnn):\n  def forward(self, images):\n"
        "    time.sleep(0.3 if self.training else 0)\n    return super().forward(images)\n"
    )
    options = ("run.report=false", "model.target=slow.Net", "train.max_steps=8", "train.log_every=1000", "train.epochs=1")
    env = {"COLUMNS": "100", "PYTHONPATH": f"{place}:{ROOT}", "HOME": str(place)}
    code, text = on_a_terminal(*TRAIN, *options, cwd=place, env=env)
    assert code == 0, text
    shown = re.findall(r"(\d+)/60000 \[", text)
    assert {"100", "200", "300", "400"} <= set(shown)
    (line,) = [line for line in re.split(r"[\r\n]", text) if "W&B is offline" in line]
    assert line.startswith("W&B is offline: no key (wandb login)")
    assert "images" not in line


@pytest.mark.slow
def test_evaluations_and_checkpoints_have_their_time_and_steps_a_profile(place: Path):
    options = ("train.max_steps=15", "train.eval_every=1", "data.batch_size=12000", "checkpoint.every_steps=5", "run.name=a")
    done = python(*TRAIN, *QUIET, *options, "train.log_every=1", "train.profile=4", cwd=place)
    assert done.code == 0, done.err
    lines = {line["step"]: line for line in read_metrics(place / "runs/a") if "train/loss" in line}
    assert [step for step, line in lines.items() if line["time/evaluation"] > 0] == [6, 11]
    assert [step for step, line in lines.items() if line["time/checkpoint"] > 0] == [6, 11]
    walls = [lines[step + 1]["time"] - lines[step]["time"] for step in range(1, 15)]
    assert walls == pytest.approx([lines[step]["time/total"] for step in range(2, 16)], rel=0.02, abs=0.03)
    trace = json.loads((place / "runs/a/trace.json").read_text())["traceEvents"]
    assert len([event for event in trace if str(event.get("name")).startswith("ProfilerStep")]) == 4
    assert any("conv" in str(event.get("name")) for event in trace)


def test_evaluate_gives_the_same_count(place: Path):
    assert python(*TRAIN, *QUIET, "train.max_steps=20", "run.name=a", "optim.ema=0.9", cwd=place).code == 0
    done = python("-m", "digitdist.evaluate", "a", "--json", "data.root=data", cwd=place)
    assert done.code == 0, done.err
    assert json.loads(done.out)["correct"] == result(place / "runs/a")["test_correct"]
    assert len(json.loads(done.out)["confusion"]) == 10


@pytest.mark.parametrize(
    "extra", [("data.batch_size=0", "optim.lr=-1", "model.name=x"), ("--bogus",), ("data.validation=60000",)]
)
def test_a_mistake_ends_with_2_and_leaves_nothing(place: Path, extra: tuple[str, ...]):
    done = python(*TRAIN, *QUIET, *extra, cwd=place)
    assert done.code == 2
    assert len(done.errors) == 1
    assert all(argument.split("=")[0] in done.err for argument in extra)
    assert "Traceback" not in done.err
    assert not (place / "runs").exists()


@pytest.mark.slow
def test_a_run_ends_with_its_report(place: Path):
    done = python(*TRAIN, *QUIET, "run.report=true", "train.max_steps=20", "run.name=a", cwd=place)
    assert done.code == 0
    assert "report in runs/a/report.html" in done.out
    assert len(list((place / "runs/a/plots").glob("*.png"))) == 5
    assert b"<html" in (place / "runs/a/report.html").read_bytes()


def test_a_loss_that_is_not_finite_stops_before_it_reaches_a_weight(place: Path):
    done = python(*TRAIN, *QUIET, "optim.name=sgd", "optim.lr=1e15", "checkpoint.every_steps=1", cwd=place)
    assert done.code == 1
    assert "on rank 0" in done.err
    assert "the loss of step" in done.err
    step = int(done.err.rpartition("the loss of step ")[2].split()[0])
    stored = folders(only_run(place) / "checkpoints")[-1]
    assert read(stored).step == step - 1
    assert all(tensor.isfinite().all() for tensor in read(stored).tensors["model"].values())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_options_of_training_all_work_together(place: Path):
    options = (
        "optim.name=adamw",
        "optim.weight_decay=0.01",
        "optim.clip_norm=1",
        "optim.ema=0.95",
        "train.label_smoothing=0.1",
    )
    more = ("schedule.name=onecycle", "augment.rotate=10", "augment.shift=2", "train.precision=bf16", "data.batch_size=1000")
    last = ("train.epochs=0.5", "train.log_every=1", "model.name=cnn_batchnorm", "optim.lr=0.01", "run.name=a")
    done = python(*TRAIN, *QUIET, *options, *more, *last, cwd=place, timeout=280)  # bf16 without instructions for it is slow
    assert done.code == 0, done.err
    assert result(place / "runs/a")["precision"] == "bf16"
    assert result(place / "runs/a")["steps"] == 30
    assert result(place / "runs/a")["test_accuracy"] > 0.5
    rates = [event["train/lr"] for event in events(place / "runs/a") if "train/lr" in event]
    assert len(rates) == 30
    assert 0.009 < max(rates) <= 0.01
    assert rates[0] == pytest.approx(0.01 / 25)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_compiled_model_trains_and_its_weights_keep_their_names(place: Path):
    options = ("train.max_steps=30", "data.batch_size=1000", "data.eval_batch_size=10000", "train.compile=default")
    done = python(*TRAIN, *QUIET, *options, "run.name=a", cwd=place, timeout=280)
    assert done.code == 0, done.err
    plain = python(*TRAIN, *QUIET, *options[:-1], "run.name=b", cwd=place)
    assert plain.code == 0, plain.err
    a, b = (read(folders(place / "runs" / name / "checkpoints")[-1]).tensors["model"] for name in "ab")
    assert set(a) == set(b)
    losses = [[line["train/loss"] for line in events(place / "runs" / name) if "train/loss" in line] for name in "ab"]
    assert losses[0] == pytest.approx(losses[1], rel=0.2)  # dropout draws other numbers in compiled code
