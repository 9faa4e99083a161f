"""1, 2, 3 and 4 processes through the real launchers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from launching import QUIET, ROOT, Outcome, accelerate, events, only_run, python, result, torchrun

TRAIN = ("-m", "digitdist.train", *QUIET)
WORLDS = (1, 2, 3, 4)


def check_run(done: Outcome, folder: Path, world_size: int) -> None:
    assert done.code == 0, done.err
    final = result(folder)
    assert (final["world_size"], final["test_total"]) == (world_size, 10000)
    saved = np.load(folder / "predictions.npz")
    assert saved["index"].tolist() == list(range(10000))
    assert int((saved["label"] == saved["prediction"]).sum()) == final["test_correct"]
    assert "UserWarning" not in done.err
    assert "FutureWarning" not in done.err


def test_accelerate_launch_makes_one_run_of_two_processes(place: Path):
    arguments = ("--multi_gpu", "--num_processes", "2", *TRAIN, "train.max_steps=40", "data.eval_batch_size=384")
    check_run(accelerate(*arguments, cwd=place), only_run(place), 2)


def test_torchrun_makes_one_run_of_three_processes_and_evaluates_on_two(place: Path):
    done = torchrun(3, *TRAIN, "train.max_steps=30", "data.batch_size=97", "model.name=cnn_batchnorm", cwd=place)
    folder = only_run(place)
    check_run(done, folder, 3)
    assert done.out.count("world size 3") == 1
    again = torchrun(2, "-m", "digitdist.evaluate", str(folder), "--json", cwd=place)
    assert json.loads(again.out)["correct"] == result(folder)["test_correct"]


@pytest.mark.parametrize("world_size", WORLDS[1:])
def test_the_gradient_is_that_of_the_mean_loss(mnist_root: Path, world_size: int):
    done = torchrun(world_size, str(ROOT / "tests/gradient_worker.py"), str(mnist_root), cwd=ROOT / "tests")
    assert done.code == 0, done.err
    assert "all gradients as in the reference" in done.out


def test_losses_agree_across_world_sizes_without_dropout(place: Path):
    options = ("model.target=nodropout.Net", "train.max_steps=100", "train.log_every=1")
    (place / "nodropout.py").write_text(
        "from digitdist.models import Cnn\nclass Net(Cnn):\n  def __init__(self):\n    super().__init__()\n"
        "    self.channel_dropout.p = self.dropout.p = 0.0\n"
    )
    env = {"PYTHONPATH": str(place)}
    assert python(*TRAIN, *options, "run.name=w1", cwd=place, env=env).code == 0
    assert torchrun(3, *TRAIN, *options, "run.name=w3", "train.accumulate=2", cwd=place, env=env).code == 0
    losses = [[e["train/loss"] for e in events(place / f"runs/{n}") if "train/loss" in e] for n in ("w1", "w3")]
    assert len(losses[0]) == 100
    assert np.abs(np.subtract(*losses)).max() < 1e-4


def test_more_processes_than_images_in_a_batch(place: Path):
    done = torchrun(4, *TRAIN, "data.batch_size=3", "train.max_steps=12", "data.eval_batch_size=100000", cwd=place)
    check_run(done, only_run(place), 4)


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_a_mistake_is_told_once_for_all_ranks(place: Path, launcher: str):
    arguments = (*TRAIN, "data.batch_size=0", "train.precision=fp16")
    if launcher == "torchrun":
        done = torchrun(3, *arguments, cwd=place)
    else:
        done = accelerate("--multi_gpu", "--num_processes", "2", *arguments, cwd=place)
    assert len(done.errors) == 1, done.err
    assert "exitcode  : 2" in done.err
    assert not (place / "runs").exists()


def test_a_loss_that_is_not_finite_stops_all_ranks(place: Path):
    done = torchrun(2, *TRAIN, "optim.name=sgd", "optim.lr=1e15", cwd=place, timeout=60)
    assert done.code == 1
    assert "the loss of step" in done.err
    assert "on rank 0, 1" in done.err
