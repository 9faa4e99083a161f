"""A run that is broken at random moments ends as the unbroken one does; and the soak would see it if it did not."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.disk import small_disk

from digitdist.checkpoint import Checkpoint, write
from soak import damage, faults
from soak.checks import Attempt, Record, final_problems
from soak.checks import problems as attempt_problems
from soak.damage import Damage
from soak.driver import Soak
from soak.faults import Fault
from soak.launches import LAST_STEP, Launch
from soak.processes import Position


@pytest.fixture
def soak_place(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "runs"):
        yield tmp_path


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_fifteen_faults_leave_no_trace(soak_place: Path):
    soak = Soak(soak_place, seed=3, trainings=("exact", "ddp", "local"))
    soak.run(15)
    assert soak.num_survived >= 15


@pytest.mark.soak
@pytest.mark.timeout(24_000)
def test_two_hundred_faults_leave_no_trace(soak_place: Path):
    soak = Soak(soak_place, seed=int(time.time()))
    print(f"seed {soak.seed}")
    soak.run(200)
    assert soak.num_survived >= 200


# The soak itself


def test_the_seed_says_which_faults_happen_and_each_deal_has_every_kind():
    def drawn(seed: int) -> list[tuple[str, str, float]]:
        return [(f.kind, f.phase, f.fraction) for f in (faults.draw(seed, number) for number in range(30))]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    for first in (0, 15):
        assert {kind for kind, _, _ in drawn(1)[first : first + 15]} == set(faults.DEAL)
    assert "freeze" not in {faults.draw(1, number, frozenset(["freeze"])).kind for number in range(30)}


def event(step: int) -> dict:
    return {"step": step, "epoch": step / 8, "time": time.time(), "train/loss": 1 / (1 + step), "time/total": time.time()}


def write_run(folder: Path) -> Path:
    """A finished run as the checks look at it."""
    folder.mkdir(parents=True)
    (folder / ".lock").touch()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event(step)) + "\n" for step in (10, 20, 30, 40)))
    result = {"test_correct": 9, "test_total": 10, "test_loss": 0.5, "test_accuracy": 0.9, "steps": 40, "epochs": 5.0}
    (folder / "result.json").write_text(json.dumps(result | {"weights_sha256": "ab"}, indent=1))
    images = np.arange(10)
    np.savez(folder / "predictions.npz", index=images, label=images, prediction=images, probability=np.ones(10))
    for step in (30, LAST_STEP):
        write(folder / "checkpoints", Checkpoint({}, {"step": step}), keep=2)
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write_run(tmp_path / "runs/a"), write_run(tmp_path / "unbroken/runs/a")


def problems(pair: tuple[Path, Path], record: Record | None = None) -> list[str]:
    return list(final_problems(*pair, record or Record(damage.lines(pair[1])), set()))


def test_equal_runs_have_no_problems(pair: tuple[Path, Path]):
    assert problems(pair) == []


def drop_line(folder: Path) -> None:
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:1] + lines[2:]))


def repeat_line(folder: Path) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(event(40)) + "\n")


def change_line(folder: Path) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(event(40) | {"train/loss": 2}) + "\n")


def change_result(folder: Path) -> None:
    (folder / "result.json").write_text((folder / "result.json").read_text().replace("ab", "cd"))


def change_predictions(folder: Path) -> None:
    with np.load(folder / "predictions.npz") as saved:
        np.savez(folder / "predictions.npz", **dict(saved) | {"prediction": np.zeros(10, np.int64)})


def break_checkpoint(folder: Path) -> None:
    (folder / f"checkpoints/step-{LAST_STEP:09d}/state.json").write_text("{}")


def leave_temporary(folder: Path) -> None:
    (folder / ".result.json.x7").touch()


def write_through_link(folder: Path) -> None:
    damage.outside(folder / "result.json").write_text("something else")


@pytest.mark.parametrize(
    ("harm", "found"),
    [
        (drop_line, "1 metric lines are missing"),
        (repeat_line, "a metric line is there twice"),
        (change_line, "metric lines differ"),
        (change_result, "weights_sha256 is cd"),
        (change_predictions, "predictions differ"),
        (break_checkpoint, "the last checkpoint is not intact"),
        (write_through_link, "ours.txt"),
        (leave_temporary, "temporary files are left"),
    ],
)
def test_what_differs_from_the_unbroken_run_is_seen(pair: tuple[Path, Path], harm: Callable[[Path], None], found: str):
    harm(pair[0])
    assert any(found in problem for problem in problems(pair))


def test_only_lines_that_damage_has_hit_and_no_attempt_repeats_may_be_missing(pair: tuple[Path, Path]):
    folder, record = pair[0], Record(damage.lines(pair[1]))
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text(lines[0] + lines[1][:20])
    record.note(folder, Damage("truncated", ("metrics.jsonl",), replaced=False))
    record.opened(20)
    assert {damage.step_of(line) for line in record.excused} == {20}
    assert problems(pair, record) == [f"2 metric lines are missing: {damage.lines(pair[1])[2:]}"]
    (folder / "metrics.jsonl").write_text("".join([lines[0], *lines[2:]]))
    assert problems(pair, record) == []


TRACEBACK = 'Traceback (most recent call last):\n  File "/x/digitdist/train/trainer.py", line 3, in save\nKeyError: 3\n'
AT = Position(22, "forward")
STOPPED = Fault(0, "stop", random.Random(), "training", 0.5, "SIGTERM", AT, None, "rank", "TERM", ends=True)
KILLED = Fault(0, "kill a rank", random.Random(), "training", 0.5, "SIGKILL", AT, None, "rank", ends=True)
FROZEN = Fault(0, "freeze", random.Random(), "training", 0.5, "rank 0 frozen for good", AT, None, "rank")
PAUSED = Fault(0, "pause", random.Random(), "training", 0.5, "paused", AT)


@pytest.mark.parametrize(
    ("attempt", "found"),
    [
        (Attempt(Launch("python", 1), [], 0, "run        runs/a resumes at step 20", 1, [15, 20], [35, 40], []), None),
        (Attempt(Launch("python", 1), [PAUSED], None, "", 99, [], [], []), "it hangs"),
        (Attempt(Launch("python", 1), [PAUSED], 0, "", 1, [], [], ["77 python"]), "processes are left"),
        (Attempt(Launch("python", 1), [PAUSED], 1, "", 1, [], [], []), "exit code 1 where nothing has ended it"),
        (Attempt(Launch("python", 1), [], 2, "error: runs/a: another training", 1, [], [], []), "a mistake of the user's"),
        (Attempt(Launch("python", 1), [], 0, "run        runs/a starts", 1, [15, 20], [35, 40], []), "it began at step 0"),
        (Attempt(Launch("python", 1), [], 0, "", 1, [15, 20], [15], []), "the intact checkpoint of step 20 has gone"),
        (Attempt(Launch("python", 1), [STOPPED], 75, "", 1, [15, 20], [20, 22], []), None),
        (Attempt(Launch("python", 1), [STOPPED], 75, "", 1, [15, 20], [15, 20], []), "it was asked to stop at step 22"),
        (Attempt(Launch("python", 1), [STOPPED], -15, "", 1, [15, 20], [20, 22], []), "exit code -15 after a request"),
        (Attempt(Launch("torchrun that restarts", 2), [FROZEN, STOPPED], 1, "", 1, [15, 20], [15, 20], []), None),
        (Attempt(Launch("torchrun", 2), [KILLED], 1, "fault: rank 1 was killed", 1, [20], [20], []), None),
        (Attempt(Launch("torchrun", 2), [KILLED], 1, "", 1, [20], [20], []), "no line names the rank"),
        (Attempt(Launch("torchrun that restarts", 2), [KILLED], 0, "", 1, [20], [40], []), None),
        (Attempt(Launch("python", 1), [PAUSED], 0, TRACEBACK, 1, [], [40], []), "a traceback: KeyError: 3"),
        (Attempt(Launch("python", 1), [], 0, "", 1, [], [40], [], ["tmp4wandb"]), "left in TMPDIR"),
    ],
)
def test_an_attempt_that_does_not_end_as_its_faults_explain_is_seen(attempt: Attempt, found: str | None):
    seen = list(attempt_problems(attempt))
    assert any(problem.startswith(found) for problem in seen) if found else not seen


@pytest.mark.parametrize("kind", [*damage.KINDS, damage.SWAPPED, damage.EXTRA])
def test_each_kind_of_damage_is_done_and_seen_in_a_checkpoint_but_an_extra_file_is_none(tmp_path: Path, kind: str):
    others = {*damage.KINDS, damage.SWAPPED, damage.EXTRA} - {kind}
    without = frozenset({".lock", "metrics.jsonl", "result.json", "predictions.npz", *others})
    write_run(tmp_path / "whole")
    folder, seen, seed = tmp_path / "runs/a", 0, 0
    while seen < 5:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", folder)
        found, seed = damage.do(folder, random.Random(seed), without), seed + 1
        if found:
            seen += 1
            assert found.hits("checkpoints") or kind == damage.EXTRA
            assert (damage.intact_steps(folder) == [30, LAST_STEP]) == (kind == damage.EXTRA), found


def test_what_is_drawn_reaches_every_sort_of_file_and_every_kind(tmp_path: Path):
    folder = write_run(tmp_path / "runs/a")
    sorts = {damage.choose(folder, random.Random(seed), frozenset()) for seed in range(200)}
    names = {path.relative_to(folder).as_posix() for path in sorts if path}
    assert {"metrics.jsonl", "result.json", "predictions.npz"} < names
    assert {f"checkpoints/step-{step:09d}/{name}" for step in (30, 40) for name in ("state.json", "manifest.json")} < names
