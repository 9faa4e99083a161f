"""What a run's folder holds is read tolerantly, and none of it passes for another training's."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.data_sets import write_folder
from helpers.launching import QUIET
from helpers.runs import assert_same_run, attempts, events, result

from digitdist.checkpoint import folders, read, step_of, weights_sha256
from digitdist.data import Splits
from digitdist.errors import Fault, Stopped, UserError
from digitdist.runs.attempts import is_restart
from digitdist.train import train

OWN = ("data.name=folder", "data.root=digits", "data.batch_size=20", "train.max_steps=12", "train.log_every=2")
ARGUMENTS = (*QUIET, *OWN, "train.eval_every=0", "checkpoint.every_steps=4", "run.name=a", "train.threads=1")
A = Path("runs/a")


def train_until_fault(fault: str, *arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIGITDIST_FAULT", fault)
        with pytest.raises(RuntimeError, match="a fault that a test has asked for"):
            train(arguments)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, splits: Splits) -> Path:
    """A folder with images, a finished run `a`, and that run as an error has left it after step 8, in `stopped`."""
    place = tmp_path_factory.mktemp("trained")
    write_folder(place / "digits", splits)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        train_until_fault("raise rank=0 step=9 phase=update", *ARGUMENTS)
        (place / "runs").rename(place / "stopped")
        train(ARGUMENTS)
    return place


@pytest.fixture
def here(tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with the images and no run."""
    (tmp_path / "digits").symlink_to(trained / "digits")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def as_stopped(trained: Path) -> None:
    shutil.copytree(trained / "stopped", "runs", dirs_exist_ok=True)


def as_finished(trained: Path) -> None:
    shutil.copytree(trained / "runs", "runs", dirs_exist_ok=True)


def assert_result_is_of_the_weights() -> None:
    stored = read(folders(A / "checkpoints")[-1])
    assert result(A)["weights_sha256"] == weights_sha256(stored.tensors["model"])
    assert result(A)["steps"] == stored.step
    with np.load(A / "predictions.npz") as saved:
        assert (saved["label"] == saved["prediction"]).sum() == result(A)["test_correct"]


# Beginning anew


def test_a_training_that_begins_takes_nothing_over(here: Path, trained: Path):
    as_finished(trained)
    (A / "wandb").mkdir()
    (A / "wandb/last-step").write_text("12")
    (A / "report.html").write_text("the former run's")
    shutil.rmtree(A / "checkpoints")
    train_until_fault("raise rank=0 step=12 phase=eval nth=2", *ARGUMENTS, "seed=1")
    names = {path.name for path in A.iterdir() if not path.name.startswith(".")}
    assert names == {"checkpoints", "config.yaml", "data_set.json", "environment.json", "metrics.jsonl"}
    assert len(attempts(A)) == 1
    train([*ARGUMENTS, "seed=1"])
    assert_result_is_of_the_weights()
    train([*ARGUMENTS, "seed=1", "run.name=b"])
    assert_same_run(A, Path("runs/b"))


def test_the_same_training_from_step_0_keeps_its_attempts(here: Path, trained: Path):
    as_stopped(trained)
    shutil.rmtree(A / "checkpoints")
    ids = [attempt["wandb_id"] for attempt in attempts(A)]
    train(ARGUMENTS)
    assert [attempt["wandb_id"] for attempt in attempts(A)] == 2 * ids
    assert_same_run(A, trained / "runs/a")


def test_never_acts_once_a_launch(here: Path, trained: Path, monkeypatch: pytest.MonkeyPatch):
    slurm = {"SLURM_JOB_ID": "7"}
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    as_stopped(trained)
    never = [*ARGUMENTS, "checkpoint.resume=never"]
    train_until_fault("raise rank=0 step=6 phase=update", *never)
    assert attempts(A)[-1]["slurm"] == ["7", "0"]
    assert len(attempts(A)) == 1
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    train_until_fault("raise rank=0 step=9 phase=update", *never)
    assert [attempt["step"] for attempt in attempts(A)] == [0, 4]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    train(never)
    assert [attempt["step"] for attempt in attempts(A)] == [0, 4, 8]
    assert_same_run(A, trained / "runs/a")
    train(never)  # again by hand in the same job
    assert [attempt["step"] for attempt in attempts(A)] == [0]


@pytest.mark.parametrize(
    ("last", "environment", "restarts"),
    [
        ({"launchers": [5.0]}, {}, True),
        ({"launchers": [6.0]}, {}, False),
        ({"launchers": []}, {}, False),
        ({"slurm": ["7", "0"]}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, True),
        ({"slurm": ["7", "1"]}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, False),
        ({"slurm": ["7", "0"]}, {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"}, False),
        ({"slurm": ["7", "0"]}, {"SLURM_JOB_ID": "7"}, False),
        (None, {"TORCHELASTIC_RESTART_COUNT": "1"}, True),
        (None, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, True),
        (None, {"SLURM_JOB_ID": "7"}, False),
        (None, {}, False),
    ],
)
def test_a_restart_is_known_by_its_launcher_and_by_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: dict | None, environment: dict[str, str], restarts: bool
):
    """None: the record is damaged, and what is there must not be removed on a restart."""
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert not is_restart(tmp_path, [5.0])
    known = [{"step": 0, "world_size": 1, "wandb_id": "x", **last}] if last is not None else []
    (tmp_path / "environment.json").write_text(json.dumps({"starts": known}))
    assert is_restart(tmp_path, [5.0]) == restarts


# Resuming


def test_a_stray_file_costs_no_checkpoint(here: Path, trained: Path, capsys: pytest.CaptureFixture[str]):
    as_stopped(trained)
    for folder in folders(A / "checkpoints"):
        (folder / ".DS_Store").write_bytes(b"Bud1")
    shutil.copytree(A / "checkpoints/step-000000004", A / "checkpoints/step-000000004-keep")
    train(ARGUMENTS)
    assert "resumes at step 8" in capsys.readouterr().out
    assert sorted(path.name for path in (A / "checkpoints").iterdir()) == [
        *("step-000000004", "step-000000004-keep", "step-000000008", "step-000000012")
    ]
    assert_same_run(A, trained / "runs/a")


def test_a_checkpoint_that_is_not_resumed_is_kept_under_another_name(
    here: Path, trained: Path, capsys: pytest.CaptureFixture[str]
):
    as_finished(trained)
    damaged = A / "checkpoints/step-000000012/model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    train(ARGUMENTS)
    assert "resumes at step 8" in capsys.readouterr().out
    assert [step_of(folder) for folder in folders(A / "checkpoints")] == [4, 8, 12]
    assert (A / "checkpoints/skipped-step-000000012/model.safetensors").is_file()
    assert_same_run(A, trained / "runs/a")


def test_checkpoints_that_cannot_be_read_now_are_not_trained_over(here: Path, trained: Path, monkeypatch: pytest.MonkeyPatch):
    as_stopped(trained)
    before = {path: path.read_bytes() for path in A.rglob("*") if path.is_file()}
    real = os.open

    def fail(path, *arguments, **options):
        if "checkpoints/step" in str(path):
            raise OSError(5, os.strerror(5), str(path))
        return real(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail)
        with pytest.raises(UserError, match=r"Input/output error; make it readable, or set checkpoint.resume=never"):
            train(ARGUMENTS)
    assert {path: path.read_bytes() for path in A.rglob("*") if path.is_file()} == before
    train(ARGUMENTS)
    assert_same_run(A, trained / "runs/a")


def test_an_explicit_checkpoint_is_obeyed_and_its_own_successors_go_on(
    here: Path, trained: Path, capsys: pytest.CaptureFixture[str]
):
    as_finished(trained)
    train([*ARGUMENTS, "run.name=b", "seed=1", "train.max_steps=8"])
    resume = f"checkpoint.resume={A}/checkpoints/step-000000004"
    train_until_fault("raise rank=0 step=9 phase=update", *ARGUMENTS, "run.name=b", resume)
    assert "resumes at step 4" in capsys.readouterr().out
    b = Path("runs/b")
    assert [attempt["step"] for attempt in attempts(b)] == [4]
    train([*ARGUMENTS, "run.name=b", resume])
    assert "resumes at step 8" in capsys.readouterr().out
    assert result(b)["weights_sha256"] == result(A)["weights_sha256"]
    assert [event["step"] for event in events(b)] == [6, 8, 10, 12, 12]
    train([*ARGUMENTS, "run.name=b", resume])
    assert "is finished" in capsys.readouterr().out
    assert sorted(path.name for path in (b / "checkpoints").glob("skipped*")) == [
        *("skipped-step-000000004", "skipped-step-000000008")
    ]


def test_a_run_is_taken_back_to_a_checkpoint_of_its_own(here: Path, trained: Path, capsys: pytest.CaptureFixture[str]):
    as_finished(trained)
    train([*ARGUMENTS, f"checkpoint.resume={A.resolve()}/checkpoints/step-000000004"])
    assert "resumes at step 4" in capsys.readouterr().out
    assert [attempt["step"] for attempt in attempts(A)] == [0, 4]
    assert_same_run(A, trained / "runs/a")


def test_a_file_stop_from_before_the_start_stops_nothing(here: Path, trained: Path, capsys: pytest.CaptureFixture[str]):
    as_stopped(trained)
    (A / "STOP").touch()
    train(ARGUMENTS)
    assert "STOP was left by an earlier attempt, and is removed" in capsys.readouterr().out
    assert_same_run(A, trained / "runs/a")


# Damage


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size) + b"\n")


def not_utf8(path: Path) -> None:
    path.write_bytes(b"\xff\xfe" + path.read_bytes())


def nested(path: Path) -> None:
    path.write_bytes(b"[" * 100_000 + b"\n")


def braces(path: Path) -> None:
    path.write_bytes(b"{}\n")


def number(path: Path) -> None:
    path.write_bytes(b"7\n")


def wrong_kinds(path: Path) -> None:
    path.write_bytes(b'{"starts": [{"step": "x"}, 5, null], "steps": [], "step": null, "test_correct": {}}\n')


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "inside").touch()


def a_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES = (emptied, cut, zeros, not_utf8, nested, braces, number, wrong_kinds, a_folder, a_link, a_pipe, Path.unlink)
RECORDS = ("environment.json", "metrics.jsonl", "config.yaml", "data_set.json", ".lock")


def told(out: str, name: str) -> int:
    """How many lines name this file."""
    return sum(name in line for line in out.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_whatever_has_become_of_its_records_a_run_goes_on(
    here: Path, trained: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
):
    for name in RECORDS:
        shutil.rmtree("runs", ignore_errors=True)
        as_stopped(trained)
        damage(A / name)
        train(ARGUMENTS)
        out = capsys.readouterr().out
        assert "resumes at step 8" in out, name
        assert result(A)["weights_sha256"] == result(trained / "runs/a")["weights_sha256"]
        assert events(A)[-3:] == events(trained / "runs/a")[-3:], "the steps that are trained again have their lines"
        if name == "environment.json" and damage is not Path.unlink:
            assert told(out, "environment.json") == 1, out
        if name == "metrics.jsonl" and damage in (zeros, braces, number, nested, wrong_kinds, a_folder, a_link, a_pipe):
            assert told(out, "metrics.jsonl") == 1, out


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_finished_run_says_what_is_damaged_and_makes_it_again(
    here: Path, trained: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
):
    for name in ("result.json", "predictions.npz", "config.yaml", "data_set.json"):
        shutil.rmtree("runs", ignore_errors=True)
        as_finished(trained)
        damage(A / name)
        train(ARGUMENTS)
        assert name in capsys.readouterr().out
        assert_same_run(A, trained / "runs/a")
        assert_result_is_of_the_weights()
        for file in ("config.yaml", "data_set.json"):
            assert (A / file).read_text() == (trained / "runs/a" / file).read_text()
        train(ARGUMENTS)
        assert "is finished" in capsys.readouterr().out


def test_a_finished_run_keeps_nothing_of_an_attempt_that_was_killed(here: Path, trained: Path):
    as_finished(trained)
    (A / ".heartbeat-x").write_bytes(bytes(48))
    (A / f".{'0' * 16}.tmp").touch()
    (A / "STOP").touch()
    train(ARGUMENTS)
    assert sorted(path.name for path in A.iterdir()) == sorted(path.name for path in (trained / "runs/a").iterdir())


def test_lines_of_a_finished_run_that_are_lost_are_told(here: Path, trained: Path, capsys: pytest.CaptureFixture[str]):
    as_finished(trained)
    file = A / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([lines[0], "7\n", lines[1][:9] + "\n", "\n", *lines[2:]]))
    train(ARGUMENTS)
    out = capsys.readouterr().out
    assert "3 damaged lines are left out" in out
    assert "is finished" in out
    file.unlink()
    train(ARGUMENTS)
    out = capsys.readouterr().out
    assert "cannot be made again" in out
    assert "is finished" in out


def test_another_run_that_is_damaged_does_not_matter(here: Path, trained: Path):
    for name, content in (("b", "{}"), ("c", ""), ("d", "[" * 100_000), ("e", '{"starts": 5}'), ("f", '{"starts": [5]}')):
        folder = Path("runs") / name
        folder.mkdir(parents=True)
        (folder / "environment.json").write_text(content)
    unnamed = [argument for argument in ARGUMENTS if not argument.startswith("run.name")]
    first, second = train([*unnamed, "train.max_steps=1"]), train([*unnamed, "train.max_steps=1"])
    assert first["folder"] != second["folder"]


@pytest.mark.parametrize("content", [b"", b"\x01", b"\xff" * 48, b"\xff" * 1000, bytes(47)])
def test_a_damaged_heartbeat_does_not_matter(here: Path, trained: Path, content: bytes):
    as_stopped(trained)
    (A / ".heartbeat-x").write_bytes(content)
    (A / ".heartbeat-y").mkdir()
    train(ARGUMENTS)
    assert not [*A.glob(".heartbeat*")]
    assert_same_run(A, trained / "runs/a")


def test_what_a_killed_writer_has_left_is_removed(here: Path, trained: Path):
    as_stopped(trained)
    (A / f".{'0' * 16}.tmp").write_bytes(bytes(100))
    (A / f".{'1' * 16}.tmp").mkdir()
    (A / ".mine.tmp").touch()
    (A / "checkpoints/.step-000000012.tmp").write_bytes(b"")
    train(ARGUMENTS)
    assert [path.name for path in A.rglob("*.tmp")] == [".mine.tmp"]


def test_a_refused_run_is_not_touched(here: Path, trained: Path):
    as_finished(trained)

    def content() -> dict[str, str]:
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in A.rglob("*") if path.is_file()}

    before = content()
    with pytest.raises(UserError, match="seed was 0 and is now 1"):
        train([*ARGUMENTS, "seed=1"])
    with pytest.raises(UserError, match=r"give auto, never or a good checkpoint's folder"):
        train([*ARGUMENTS, "checkpoint.resume=digits"])
    assert content() == before


def test_a_full_disk_is_told_once_and_leaves_no_folder(here: Path, trained: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(file: Path, content: bytes) -> None:
        raise OSError(28, os.strerror(28), str(file))

    with monkeypatch.context() as patch:
        patch.setattr("digitdist.runs.attempts.atomic_write", fail)
        with pytest.raises(UserError, match=r"run.dir=runs: .*: No space left on device; make room"):
            train(ARGUMENTS)
        assert not A.exists()
    train(ARGUMENTS)
    assert_same_run(A, trained / "runs/a")


@pytest.mark.parametrize(("writer", "name"), [("atomic_write", "result.json"), ("save_predictions", "predictions.npz")])
def test_a_disk_that_is_full_at_the_end_is_a_fault_and_the_run_ends_later(
    here: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, writer: str, name: str
):
    def fail(*_: object) -> None:
        raise OSError(28, os.strerror(28), name)

    with monkeypatch.context() as patch:
        patch.setattr(f"digitdist.train.recorder.{writer}", fail)
        with pytest.raises(Fault, match=rf"^{name} cannot be written \(.*No space left.*\); the last checkpoint is there"):
            train(ARGUMENTS)
        assert not (A / "result.json").exists()
    train(ARGUMENTS)
    assert_same_run(A, trained / "runs/a")


def test_restarts_in_vain_end_with_their_cause_also_where_that_is_not_known(here: Path):
    from digitdist.runs.attempts import check_progress

    known = [{"step": 0, "world_size": 1, "wandb_id": "x", "launchers": [5.0]} for _ in range(3)]
    with pytest.raises(Fault, match="the cause: not known"):
        check_progress(A, known, [5.0], 1)
    known[-1]["stopped"] = True
    with pytest.raises(Stopped) as caught:
        check_progress(A, known, [5.0], 1)
    assert caught.value.final
