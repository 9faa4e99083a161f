"""Trainings on users' data, with every command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from helpers import on_device
from helpers.data_sets import write_folder
from helpers.launching import BIN, CLEAN, QUIET, ROOT, python, torchrun
from helpers.runs import assert_same_run, reached, result, wait_until
from helpers.variants import soak

from digitdist.data import Splits

EXACT = ("sync.mode=exact", "train.log_every=1", "data.batch_size=32", "checkpoint.every_steps=4")
TRAIN = ("-m", "digitdist.train", *QUIET, *EXACT)
FOLDER = ("data.name=folder", "data.root=digits")
JITTERED = ("data.target=helpers.data_sets.Jittered", "model.name=cnn_batchnorm")


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_streamed_class_gives_the_same_weights_for_any_number_of_workers_and_processes(tmp_path: Path, env: dict[str, str]):
    options = (*TRAIN, *JITTERED, "train.max_steps=9", "data.validation=15")
    for number, (world_size, workers) in enumerate([(1, 0), (2, 3), (3, 1)]):
        arguments = (*options, f"run.name={number}", f"data.workers={workers}")
        done = torchrun(world_size, *arguments, cwd=tmp_path, env=env)
        assert done.code == 0, done.err
        assert_same_run(tmp_path / f"runs/{number}", tmp_path / "runs/0")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("data", [soak(FOLDER), (*JITTERED, "data.workers=1")], ids=["a folder", "a streamed class"])
def test_a_killed_run_on_own_images_ends_as_the_unbroken_one(
    tmp_path: Path, splits: Splits, env: dict[str, str], data: tuple[str, ...]
):
    write_folder(tmp_path / "digits", splits)
    options = (*TRAIN, *data, "train.max_steps=24")
    assert python(*options, "run.name=whole", cwd=tmp_path, env=env).code == 0
    command = [str(BIN / "torchrun"), "--nproc_per_node", "2", *options, "run.name=broken"]
    process = subprocess.Popen(command, cwd=tmp_path, env=CLEAN | env, start_new_session=True, stdout=subprocess.DEVNULL)
    wait_until(lambda: reached(tmp_path / "runs/broken") >= 9)
    started = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wait_until(lambda: not any(child.is_running() for child in started))
    assert torchrun(3, *options, "run.name=broken", cwd=tmp_path, env=env).code == 0
    assert_same_run(tmp_path / "runs/broken", tmp_path / "runs/whole")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGTERM, soak(signal.SIGUSR1)], ids=lambda number: number.name)
def test_workers_leave_a_request_to_stop_to_their_rank(tmp_path: Path, env: dict[str, str], number: signal.Signals):
    options = (*TRAIN, *JITTERED, "data.workers=2", "train.epochs=1000", "run.name=a")
    process = subprocess.Popen(
        [sys.executable, *options], cwd=tmp_path, env=CLEAN | env, start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: reached(tmp_path / "runs/a") >= 2)
    started = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, number)
    error = process.communicate(timeout=100)[1]
    assert (process.returncode, error) == (75, "")
    wait_until(lambda: not any(child.is_running() for child in started))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("data", "class_name"),
    [(FOLDER, "digit 3"), soak(("data.target=helpers.data_sets.Blocks",), "middle")],
    ids=["folder", "class"],
)
def test_own_images_give_the_same_weights_in_memory_and_streamed_and_every_command_works(
    tmp_path: Path, splits: Splits, env: dict[str, str], data: tuple[str, ...], class_name: str
):
    write_folder(tmp_path / "digits", splits)
    options = (*TRAIN, *data, "train.max_steps=8")
    for name, world_size, memory in (("kept", 1, "null"), ("kept3", 3, "null"), ("streamed", 2, "false")):
        done = torchrun(world_size, *options, f"run.name={name}", f"data.in_memory={memory}", cwd=tmp_path, env=env)
        assert done.code == 0, done.err
        assert_same_run(tmp_path / f"runs/{name}", tmp_path / "runs/kept")
    assert class_name in json.loads((tmp_path / "runs/kept/data_set.json").read_text())["classes"]

    picture = next((tmp_path / "digits/test/digit 7").glob("*.png"))
    commands = {
        "evaluate": ["digitdist.evaluate", "runs/streamed", "--json"],
        "predict": ["digitdist.predict", "streamed", str(picture), "--json"],
        "report": ["digitdist.report", "kept", "streamed"],
        "export": ["digitdist.export", "kept", "--format", "onnx"],
        "data": ["digitdist.data", *data, "--plot", "samples.png"],
        "checkpoint": ["digitdist.checkpoint", "verify", "kept"],
    }
    outputs = on_device.commands(commands, tmp_path, on_cpu=True, env=env)
    assert json.loads(outputs["evaluate"])["correct"] == result(tmp_path / "runs/streamed")["test_correct"]
    assert json.loads(outputs["predict"])["class"] in json.loads((tmp_path / "runs/kept/data_set.json").read_text())["classes"]
    assert class_name in (tmp_path / "runs/kept/report.html").read_text()
    assert (tmp_path / "samples.png").stat().st_size > 10_000


@pytest.mark.slow
def test_images_that_have_changed_are_not_trained_on_unnoticed(tmp_path: Path, splits: Splits, env: dict[str, str]):
    write_folder(tmp_path / "digits", splits)
    options = (*TRAIN, "data.name=folder", "data.root=digits", "run.name=a")
    assert python(*options, "train.max_steps=3", cwd=tmp_path, env=env).code == 0
    next((tmp_path / "digits/train/digit 0").glob("*.png")).unlink()
    done = python(*options, "train.max_steps=6", cwd=tmp_path, env=env)
    assert done.code == 2
    assert "are not those that the run began with" in done.err
    assert python(*options, "train.max_steps=6", "checkpoint.allow_change=true", cwd=tmp_path, env=env).code == 0


def test_a_bad_picture_is_a_mistake_before_there_is_a_run(tmp_path: Path, splits: Splits, env: dict[str, str]):
    write_folder(tmp_path / "digits", splits, train=20, test=20)
    (tmp_path / "digits/train/digit 1/bad.png").write_bytes(b"no")
    done = python("-m", "digitdist.train", *QUIET, "data.name=folder", "data.root=digits", cwd=tmp_path, env=env)
    assert done.code == 2
    assert done.errors == ["error: digits/train/digit 1/bad.png: it is not an image of a known format"]
    assert not (tmp_path / "runs").exists()
