"""1, 2, 3 and 4 processes through the real launchers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.launching import QUIET, ROOT, Outcome, accelerate, python, torchrun, worlds
from helpers.runs import events, only_run, result
from helpers.variants import soak

from digitdist.runs import read_metrics

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


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow), soak(4)])
def test_gradients_and_rounds_are_those_of_the_reference(mnist_root: Path, world_size: int):
    done = worlds([world_size], "helpers.gradient_worker", str(mnist_root), cwd=mnist_root)[world_size]
    assert "all gradients and rounds as in the reference" in done.out


@pytest.mark.slow
def test_losses_agree_across_world_sizes_without_dropout(place: Path):
    """Of a network without maxima, whose choice rounding may change, which training then amplifies."""
    options = ("model.target=helpers.networks.Smooth", "train.max_steps=100", "train.log_every=1")
    env = {"PYTHONPATH": str(ROOT / "tests")}
    assert python(*TRAIN, *options, "run.name=w1", cwd=place, env=env).code == 0
    assert torchrun(3, *TRAIN, *options, "run.name=w3", "train.accumulate=2", cwd=place, env=env).code == 0
    losses = [[e["train/loss"] for e in events(place / f"runs/{n}") if "train/loss" in e] for n in ("w1", "w3")]
    assert len(losses[0]) == 100
    assert losses[0][-1] < losses[0][0] / 2
    assert np.abs(np.subtract(*losses)).max() < 1e-5


@pytest.mark.slow
def test_more_processes_than_images_in_a_batch(place: Path):
    done = torchrun(4, *TRAIN, "data.batch_size=3", "train.max_steps=12", "data.eval_batch_size=100000", cwd=place)
    check_run(done, only_run(place), 4)


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_a_mistake_is_reported_once_for_all_ranks(place: Path, launcher: str):
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


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_exact_gives_the_same_bits_on_any_world_and_a_mutation_would_show(mnist_root: Path):
    """Over batch, shards, accumulate and images, tail batches and empty shards included."""
    outcomes = worlds(WORLDS, "helpers.exact_worker", str(mnist_root), cwd=mnist_root)
    hashes = {n: json.loads(done.out) for n, done in outcomes.items()}
    for name in (name for name in hashes[1] if name.startswith("case")):
        assert len({hashes[n][name] for n in WORLDS}) == 1, name
    for name in ("seed", "order", "tree"):
        assert hashes[3][f"mutation {name}"] != hashes[1][f"mutation {name}"], name
    assert all(hashes[n]["comparison equal"] == "equal" for n in WORLDS)
    assert all("step 5: rank 1 and rank 0 differ in b" in hashes[n]["comparison different"] for n in WORLDS[1:])


EXACT = (*TRAIN, "sync.mode=exact", "run.name=a")
OPTIONS = {
    "everything at once": (
        *("model.name=cnn_batchnorm", "optim.name=adamw", "optim.ema=0.9", "optim.clip_norm=0.5", "train.precision=bf16"),
        *("schedule.name=onecycle", "augment.rotate=10", "augment.scale=0.1", "train.accumulate=2", "data.batch_size=1001"),
        *("train.label_smoothing=0.1", "train.max_steps=8", "train.log_every=1", "data.validation=500", "sync.check_every=3"),
    ),
    "batches of 7000, sgd, focused": soak(
        ("data.batch_size=7000", "train.epochs=2", "optim.name=sgd", "optim.lr=0.05", "train.log_every=1", "data.focus=4")
    ),
}


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize("worlds", [(1, 3), soak(WORLDS)], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_exact_run_is_the_same_run_on_any_world(
    tmp_path: Path, mnist_root: Path, options: tuple[str, ...], worlds: tuple[int, ...]
):
    found = []
    for world_size in worlds:
        place = tmp_path / str(world_size)
        place.mkdir()
        (place / "data").symlink_to(mnist_root)
        check_run(torchrun(world_size, *EXACT, *options, cwd=place, timeout=200), place / "runs/a", world_size)
        saved = np.load(place / "runs/a/predictions.npz")
        found.append((result(place / "runs/a")["weights_sha256"], events(place / "runs/a"), saved["probability"].tobytes()))
    assert all(other == found[0] for other in found)
    assert len(found[0][1]) > 8


def test_a_short_exact_run_has_the_same_weights_on_three_processes_as_on_one(place: Path):
    options = ("train.max_steps=6", "train.log_every=1", "data.batch_size=101")
    assert python(*EXACT, *options, cwd=place).code == 0
    assert torchrun(3, *EXACT, "run.name=b", *options, cwd=place).code == 0
    assert result(place / "runs/a")["weights_sha256"] == result(place / "runs/b")["weights_sha256"]
    assert events(place / "runs/a") == events(place / "runs/b")


def test_exact_takes_no_more_processes_than_shards(place: Path):
    done = torchrun(3, *EXACT, "sync.shards=2", cwd=place)
    assert len(done.errors) == 1
    assert "sync.shards=2" in done.errors[0]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", soak("exact")])
def test_a_slow_rank_is_named(place: Path, mode: str):
    (place / "slow.py").write_text(
        "import os, time\nfrom digitdist.models import Cnn\nclass Net(Cnn):\n  def forward(self, images):\n"
        "    time.sleep(0.03 if self.training and os.environ['RANK'] == '1' else 0)\n    return super().forward(images)\n"
    )
    options = ("model.target=slow.Net", "train.max_steps=30", "train.log_every=10", "run.name=a", f"sync.mode={mode}")
    done = torchrun(2, *TRAIN, *options, cwd=place, env={"PYTHONPATH": f"{place}:{ROOT}"})
    assert done.code == 0, done.err
    assert done.out.count("rank 1 is slow") == 1
    lines = [line for line in read_metrics(place / "runs/a") if "train/loss" in line]
    assert [line["time/slowest_rank"] for line in lines] == [1, 1, 1]
    assert all(line["time/sync"] > 0.2 for line in lines)  # the main rank waits for the other, which is not work of its own
    assert all(line["time/sync"] > line["time/compute"] for line in lines)
    assert len(result(place / "runs/a")["peak_memory_mb"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("compress", [soak("bf16"), soak("fp16"), "powersgd"])
def test_a_compressed_run_has_equal_ranks_an_exact_loss_and_nearly_the_accuracy(place: Path, compress: str):
    options = ("data.batch_size=500", "train.epochs=1", "train.log_every=1", "sync.check_every=1")
    for name, extra in (("plain", []), ("compressed", [f"sync.compress={compress}"])):
        assert torchrun(2, *TRAIN, *options, *extra, f"run.name={name}", cwd=place).code == 0
    plain, compressed = (place / "runs" / name for name in ("plain", "compressed"))
    assert events(compressed)[0]["train/loss"] == pytest.approx(events(plain)[0]["train/loss"], rel=1e-6)
    assert result(compressed)["weights_sha256"] != result(plain)["weights_sha256"]
    assert result(compressed)["test_accuracy"] > result(plain)["test_accuracy"] - 0.04


@pytest.mark.slow
def test_in_local_mode_lines_evaluations_and_checkpoints_lie_where_ranks_synchronise(place: Path):
    options = ("sync.mode=local", "sync.every=30", "train.log_every=20", "checkpoint.every_steps=50", "sync.check_every=1")
    sizes = ("data.batch_size=600", "train.epochs=2", "optim.ema=0.9", "model.name=cnn_batchnorm")
    assert torchrun(3, *TRAIN, *options, *sizes, "run.name=a", cwd=place).code == 0
    lines = events(place / "runs/a")
    assert [e["step"] for e in lines if "train/loss" in e] == [30, 50, 60, 90, 100, 120, 150, 180, 200]
    assert [e["step"] for e in lines if "test/accuracy" in e] == [100, 200]
    assert result(place / "runs/a")["test_accuracy"] > 0.9


def test_compression_is_refused_where_no_gradient_is_sent(place: Path):
    done = python(*TRAIN, "sync.mode=local", "sync.compress=bf16", cwd=place)
    assert done.code == 2
    assert "sync.compress=bf16 is not allowed with sync.mode=local" in done.errors[0]
