"""What has ended a training is what it says, whatever else fails at that moment."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from pathlib import Path

import psutil
import pytest
from helpers.disk import small_disk
from helpers.launching import BIN, CLEAN, QUIET, ROOT, accelerate, python, start_process, torchrun
from helpers.runs import result, wait_for_step
from helpers.variants import soak

from digitdist.runs import attempts

TRAIN = ("-m", "digitdist.train", *QUIET, "run.name=a", "train.log_every=5")
SHORT = (*TRAIN, "train.max_steps=2", "train.eval_every=0", "data.eval_batch_size=5000")


def test_an_end_that_cannot_be_recorded_is_a_line_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def refuse(folder: Path, content: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    attempts.write_attempts(tmp_path, [{"step": 0, "world_size": 1, "wandb_id": "x"}])
    monkeypatch.setattr(attempts, "write_attempts", refuse)
    attempts.record_end(tmp_path, fault="rank 1 was killed")
    assert "how this attempt ended is not recorded (No space left on device)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_rank_is_named_where_nothing_can_be_written(place: Path):
    process = start_process([str(BIN / "torchrun"), "--nproc_per_node", "2", *TRAIN], place, CLEAN)
    wait_for_step(place / "runs/a", 5, process)
    (place / "runs/a/environment.json").unlink()
    (place / "runs/a/environment.json").mkdir()  # so that writing it fails, as on a full disk
    worker = next(child for child in psutil.Process(process.pid).children() if child.environ()["RANK"] == "1")
    worker.send_signal(signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    assert out.count("fault: rank 1 was killed at step ") == 1
    assert "IsADirectoryError" not in out
    shutil.rmtree(place / "runs/a/environment.json")


@pytest.mark.slow
def test_a_mistake_of_one_rank_alone_is_told_once(place: Path):
    (place / "start.py").write_text(
        "import os, runpy, sys\nif os.environ['RANK'] == '1': sys.argv.append('optim.lr=-1')\n"
        "runpy.run_module('digitdist.train', run_name='__main__')\n"
    )
    done = torchrun(2, "start.py", *SHORT[2:], cwd=place)
    assert len(done.errors) == 1, done.err
    assert "optim.lr=-1" in done.errors[0]
    assert "join_timeout" not in done.err
    assert "exitcode  : 2" in done.err
    assert not (place / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["RANK", soak("LOCAL_RANK")])
def test_a_launchers_variable_alone_is_refused_and_one_that_says_nothing_is_not(place: Path, name: str):
    done = python(*SHORT, cwd=place, env={name: "1"}, timeout=60)
    assert (done.code, done.out) == (2, "")
    assert done.errors == [
        f"error: {name}='1', but WORLD_SIZE is not set; unset {name}, or start with torchrun or accelerate launch"
    ]
    done = python(*SHORT, cwd=place, env={name: "0", "WORLD_SIZE": "1"} if name == "RANK" else {name: "0"})
    assert done.code == 0, done.err
    assert result(place / "runs/a")["world_size"] == 1


@pytest.mark.slow
def test_a_forgotten_default_configuration_of_accelerate_is_named(place: Path):
    file = place / "hf/accelerate/default_config.yaml"
    file.parent.mkdir(parents=True)
    shutil.copy(ROOT / "launch/one_cpu.yaml", file)
    env = {"HF_HOME": str(place / "hf")}
    done = accelerate("--mixed_precision", "no", *SHORT, cwd=place, env=env)
    assert f"launcher   {file} decides distributed_type=NO, num_processes=1, use_cpu=True;" in done.out
    assert done.out.index("launcher ") < done.out.index("device ")
    done = accelerate("--config_file", str(ROOT / "launch/one_cpu.yaml"), *SHORT, "run.name=b", cwd=place, env=env)
    assert done.code == 0, done.err
    assert "launcher " not in done.out


@pytest.mark.cluster  # it mounts a disk
def test_a_disk_that_mnist_does_not_fit_is_named_and_left_as_it_was(tmp_path: Path):
    with small_disk(tmp_path / "disk", "20m"):
        free = shutil.disk_usage(tmp_path / "disk").free
        done = python(*SHORT, f"data.root={tmp_path / 'disk'}", cwd=tmp_path)
        assert done.code == 2
        (line,) = done.errors
        assert "train-images-idx3-ubyte" in line
        assert line.endswith("No space left on device; give a folder you can write to, with 55 MB of room")
        assert shutil.disk_usage(tmp_path / "disk").free >= free - 65536  # folders and a lock
