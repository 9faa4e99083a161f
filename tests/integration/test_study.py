"""The command of a study as a person types it: killed and gone on with, stopped, failing, in parts, compared, over a grid."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers.launching import CLEAN, on_a_terminal, python, start_process
from helpers.runs import assert_same_run, attempts, reached, result, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

COMMAND = ("-m", "digitdist.study")
SHORT = ("--config", "fast", "train.max_steps=40", "train.log_every=1", "checkpoint.every_steps=10", "tracking.wandb=disabled")


def study(*arguments: str, cwd: Path, env: dict[str, str] | None = None):
    return python(*COMMAND, *arguments, cwd=cwd, env=env, timeout=200)


def is_training(place: Path) -> bool:
    """Whether a training of this folder is left."""
    return any(process.cwd() == str(place) for process in own_processes())


def own_processes() -> list[psutil.Process]:
    return [process for process in psutil.process_iter(["cmdline"]) if "digitdist.train" in (process.info["cmdline"] or [])]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, mnist_root: Path) -> Path:
    """A folder with the study ``whole`` of three seeds, of 40 steps each, and what its command printed."""
    place = tmp_path_factory.mktemp("unbroken")
    (place / "data").symlink_to(mnist_root)
    done = study("whole", "--seeds", "3", *SHORT, cwd=place)
    assert done.code == 0, done.err
    (place / "printed").write_text(done.out)
    return place


def test_a_study_is_ordinary_runs_a_table_and_a_page(unbroken: Path):
    runs = [unbroken / f"runs/whole/seed-{seed}" for seed in range(3)]
    assert [len(attempts(run)) for run in runs] == [1, 1, 1]
    assert len({result(run)["weights_sha256"] for run in runs}) == 3
    assert "group: whole" in (runs[1] / "config.yaml").read_text()
    lines = (unbroken / "printed").read_text().splitlines()
    head, row = lines[-3:-1]
    assert " ".join(head.split()) == "test images runs mean deviation 95 % interval least greatest train_seconds"
    mean = sum(result(run)["test_accuracy"] for run in runs) / 3
    assert re.match(rf"whole +3 +{100 * mean:.3f} % ", row), row
    assert lines[-1] == "report in runs/whole/report.html"
    html = (unbroken / "runs/whole/report.html").read_text()
    assert html.count("<img ") == 3
    evaluated = python("-m", "digitdist.evaluate", "whole/seed-1", "--json", cwd=unbroken)
    assert json.loads(evaluated.out)["correct"] == result(runs[1])["test_correct"]


def test_a_finished_study_trains_nothing_again(unbroken: Path):
    done = study("whole", "--seeds", "3", "--json", *SHORT, cwd=unbroken)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    counts = [result(unbroken / f"runs/whole/seed-{seed}")["test_correct"] / 10000 for seed in range(3)]
    assert found["test_accuracy"]["values"] == counts
    assert [len(attempts(unbroken / f"runs/whole/seed-{seed}")) for seed in range(3)] == [1, 1, 1]


def test_a_grid_has_no_room_in_a_study(unbroken: Path):
    done = study("whole", "--seeds", "1", *SHORT, "data.validation=500", "--grid", "optim.lr=0.1,0.2", cwd=unbroken)
    assert done.code == 2
    assert done.errors == ["error: runs/whole is a study or a run, in which no grid has room; give another NAME"]


def test_killed_twice_and_gone_on_with_it_is_the_same_study(place: Path, unbroken: Path):
    """Once by SIGKILL, which leaves its trainings to end by themselves, and once by SIGTERM."""
    command = [sys.executable, *COMMAND, "a", "--seeds", "3", "--jobs", "1", "train.threads=1", *SHORT]
    folder = place / "runs/a"
    killed = start_process(command, place, CLEAN)
    wait_until(lambda: (folder / "seed-0").exists() and reached(folder / "seed-0") >= 4)
    killed.kill()
    killed.wait()
    wait_until(lambda: not is_training(place))
    assert "stopped" in attempts(folder / "seed-0")[-1], "its training has noticed, and is saved"

    stopped = start_process(command, place, CLEAN)
    wait_until(lambda: (folder / "seed-1").exists() and reached(folder / "seed-1") >= 4)
    stopped.send_signal(signal.SIGTERM)
    output = stopped.communicate(timeout=60)[0]
    assert stopped.returncode == 75, output
    assert not is_training(place)
    assert "stopped on request, 2 of 3 runs are left; to go on: " in output
    assert not (folder / "seed-2").exists()

    done = python(*command[1:], cwd=place, timeout=200)
    assert done.code == 0, done.err
    assert "a: 3 runs, 1 of them done, 1 at a time" in done.out
    assert [len(attempts(folder / f"seed-{seed}")) for seed in range(3)] == [2, 2, 1]
    assert (folder / "report.html").exists()
    for seed in range(3):
        assert_same_run(folder / f"seed-{seed}", unbroken / f"runs/whole/seed-{seed}")


def test_control_c_twice_ends_it_at_once(place: Path):
    process = start_process([sys.executable, *COMMAND, "a", "--seeds", "2", "train.epochs=50", *SHORT[3:]], place, CLEAN)
    wait_until(lambda: (place / "runs/a/seed-0").exists() and reached(place / "runs/a/seed-0") >= 1)
    process.send_signal(signal.SIGINT)
    time.sleep(0.7)  # a second one that follows at once may be the same
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=30)[0]
    assert process.returncode in (75, 130), output
    wait_until(lambda: not is_training(place), timeout=10)


def test_a_run_that_fails_is_told_and_the_others_go_on(place: Path):
    (place / "runs/a").mkdir(parents=True)
    (place / "runs/a/seed-1").touch()
    done = study("a", "--seeds", "3", "--jobs", "1", *SHORT, cwd=place)
    assert done.code == 1
    assert "Traceback" not in done.err
    (line,) = done.errors
    assert line.startswith("error: runs/a/seed-1 failed: run.dir=runs/a: runs/a/seed-1")
    assert "runs/a/seed-2: " in done.out
    assert re.search(r"^a +2 +\d", done.out, re.MULTILINE), "the table has those that are done"


def test_a_fault_of_a_run_is_told_with_its_last_words(place: Path):
    env = {"DIGITDIST_FAULT": "raise rank=0 step=3 phase=backward"}
    done = study("a", "--seeds", "1", *SHORT, cwd=place, env=env)
    assert done.code == 1
    assert "Traceback" in done.out, "the training's own"
    assert "Traceback" not in done.err
    assert done.errors[0].startswith("error: runs/a/seed-0 failed: exit code 1: ")


def test_a_mistake_of_all_runs_is_told_once_and_ends_it(place: Path):
    done = study("a", "--seeds", "4", *SHORT, "data.name=folder", "data.root=nowhere", cwd=place)
    assert done.code == 2
    assert len(done.errors) == 1
    assert not (place / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("a/b",), "a/b: no run of that folder or name"),
        (("a", "--seeds", "0"), "--seeds 0 is not allowed; it takes a whole number from 1 to 100,000"),
        (("a", "--part", "0/2"), "--part is of the runs that --seeds N trains; give both"),
        (("a", "--seeds", "2", "--part", "2/2"), "--part 2/2 is not allowed; it takes I/M"),
        (("a", "--seeds", "2", "--grid", "optim.lr=1,2"), "data.validation=0 holds none out"),
        (("a", "--seeds", "2", "--grid", "optim.lr=1,2", "--against", "b"), "--against is not allowed with --grid"),
        (("a", "--seeds", "2", "--against", "b"), "b: no run of that folder or name"),
        (("a", "--seeds", "2", "optim.lr=0"), "optim.lr=0 is not allowed"),
        (("a", "--seeds", "2", "--against", "b", "seed=3"), "b: no run"),
        (("a/", "--seeds", "2", "--against", "b", "model.args.widht=3", "optim.lr=0"), "optim.lr=0 is not allowed"),
        (("a", "--seeds", "2", "data.validation=500", "--grid", "optim.lr=1"), "--grid has no key with several values"),
        (("..", "--seeds", "2"), "run.name='..' is not allowed"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(tmp_path: Path, arguments: tuple[str, ...], why: str):
    done = study(*arguments, cwd=tmp_path)
    assert done.code == 2, done.err
    assert why in done.errors[0]
    assert not [*tmp_path.iterdir()]


def test_parts_trained_anywhere_are_collected_by_the_same_command(place: Path):
    for part, seeds in (("0/2", [0, 2]), ("1/2", [0, 1, 2])):
        done = study("a", "--seeds", "3", *SHORT, "--part", part, cwd=place)
        assert done.code == 0, done.err
        assert done.out.splitlines()[-1] == f"part {part} is done; the same command without --part collects all parts"
        assert sorted(int(file.parent.name[5:]) for file in place.glob("runs/a/*/result.json")) == seeds
    done = study("a", "--seeds", "3", *SHORT, cwd=place)
    assert re.search(r"^a +3 +\d", done.out, re.MULTILINE)
    assert all(len(attempts(place / f"runs/a/seed-{seed}")) == 1 for seed in range(3))


def test_a_grid_is_chosen_by_held_out_images_best_first(place: Path):
    grid = ("--grid", "optim.lr=0.03,0.0001", "data.validation=500")
    done = study("g", "--seeds", "2", *SHORT, *grid, "run.report=false", "--json", cwd=place)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["chosen"] == "optim.lr=0.03"
    best, other = found["combinations"]
    assert (best["study"], other["study"]) == ("optim.lr=0.03", "optim.lr=0.0001")
    assert best["validation_accuracy"]["mean"] > other["validation_accuracy"]["mean"]
    assert "test_accuracy" in best
    assert "test_accuracy" not in other
    told = study("g/optim.lr=0.03", "--against", "g/optim.lr=0.0001", "run.report=false", cwd=place)
    assert told.code == 0, told.err
    assert "optim.lr=0.03 minus g/optim.lr=0.0001: +" in told.out
    assert "(they differ in optim.lr (0.03, 0.0001))" in told.out


def test_a_study_shows_one_bar_over_all_its_runs_on_a_terminal(place: Path):
    code, shown = on_a_terminal(*COMMAND, "a", "--seeds", "2", *SHORT, cwd=place)
    assert code == 0, shown
    shares = [int(share) for share in re.findall(r"a: \d/2 runs, +(\d+) %\|", shown)]
    assert shares[0] == 0
    assert shares == sorted(shares)
    assert any(0 < share < 100 for share in shares), "also within a run"
    assert "runs/a/seed-1: " in shown


def test_the_runs_of_a_study_share_no_wandb_id(place: Path):
    env = {"WANDB_RUN_ID": "same", "WANDB_MODE": "offline"}
    done = study("a", "--seeds", "2", *SHORT[:-1], cwd=place, env=env)
    assert done.code == 0, done.err
    ids = {attempts(place / f"runs/a/seed-{seed}")[0]["wandb_id"] for seed in range(2)}
    assert len(ids) == 2
    assert "same" not in ids


def test_a_study_is_started_once_not_on_ranks(place: Path):
    launcher = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    launcher |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    done = study("a", "--seeds", "2", cwd=place, env=launcher)
    assert done.code == 2
    assert "start it once, by python -m digitdist.study" in done.errors[0]


def test_the_command_of_the_installed_program_is_the_same(place: Path):
    done = python("-m", "digitdist", "study", "--help", cwd=place)
    assert done.code == 0
    assert "--seeds N" in done.out
    assert os.listdir(place) == ["data"]
