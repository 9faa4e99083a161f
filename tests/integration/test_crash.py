"""A crash costs time, never the result: runs that are killed, frozen, stopped and damaged end as the unbroken run does."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers.launching import BIN, CLEAN, QUIET, ROOT, accelerate, python, run, start_process, torchrun
from helpers.runs import ask_to_stop, assert_same_run, attempts, events, result, wait_for_phase, wait_for_step
from helpers.variants import soak

from digitdist.checkpoint import folders

TRAIN = ("-m", "digitdist.train", *QUIET, "run.name=a", "train.log_every=5")
EXACT = (*TRAIN, "sync.mode=exact", "checkpoint.every_steps=20", "train.max_steps=60", "sync.shards=4")
RESTARTS = ("--max_restarts", "4", "--rdzv_backend", "c10d")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, mnist_root: Path) -> Path:
    """The folder of an exact run of 60 steps that nothing has happened to."""
    place = tmp_path_factory.mktemp("unbroken")
    (place / "data").symlink_to(mnist_root)
    done = python(*EXACT, cwd=place)
    assert done.code == 0, done.err
    return place / "runs/a"


def fault(text: str) -> dict[str, str]:
    return {"DIGITDIST_FAULT": text}


def start(processes: int, *arguments: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.Popen:
    """Starts a launch in a process group of its own."""
    command = [str(BIN / "torchrun"), "--nproc_per_node", str(processes), *arguments]
    if processes == 1:
        command = [sys.executable, *arguments]
    return start_process(command, cwd, CLEAN | (env or {}))


# What is stopped


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", soak("SIGINT"), soak("SIGUSR1"), soak("SIGUSR2"), soak("SIGHUP"), "STOP"])
def test_a_stop_saves_and_ends_with_75_and_the_same_command_goes_on(place: Path, unbroken: Path, name: str):
    process = start(1, *EXACT, cwd=place)
    wait_for_step(place / "runs/a", 10, process)
    began = time.monotonic()
    ask_to_stop(process, place / "runs/a", name)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 75, out
    assert time.monotonic() - began < 5
    assert "run the same command again" in out
    assert not (place / "runs/a/STOP").exists()
    assert python(*EXACT, cwd=place).code == 0
    assert_same_run(place / "runs/a", unbroken)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all(place: Path, unbroken: Path):
    process = start(3, *EXACT, cwd=place)
    wait_for_step(place / "runs/a", 10, process)
    workers = [child.pid for child in psutil.Process(process.pid).children()]
    assert len(workers) == 3
    os.kill(max(workers), signal.SIGUSR1)
    out, _ = process.communicate(timeout=30)
    assert "stopped on request" in out
    assert "exitcode  : 75" in out
    assert torchrun(2, *EXACT, cwd=place).code == 0
    assert_same_run(place / "runs/a", unbroken)


@pytest.mark.slow
def test_a_second_interrupt_stops_at_once(place: Path):
    process = start(1, *EXACT, cwd=place, env=fault("slow rank=0 step=11 phase=update"))  # which begins at once
    wait_for_step(place / "runs/a", 10, process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.7)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130


# What dies


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "phase", "step"),
    [
        *(("kill", "forward", 30), soak("kill", "save", 40), ("raise", "sync", 30)),
        *(soak("freeze", "backward", 30), ("freeze", "eval", 60), soak("freeze", "save", 40)),
    ],
)
def test_a_rank_that_ends_is_named_and_ends_the_others(place: Path, unbroken: Path, kind: str, phase: str, step: int):
    rank = 0 if phase == "save" else 1
    began = time.monotonic()
    env = fault(f"{kind} rank={rank} step={step} phase={phase} nth={2 if phase == 'save' else 1}")
    done = torchrun(3, *EXACT, "sync.timeout_s=5", cwd=place, env=env)
    assert time.monotonic() - began < 60, "start, steps, and 5 + 5 seconds, on a busy machine"
    assert done.code == 1
    reported = [line for line in done.err.splitlines() if line.startswith("fault:")]
    assert len(reported) == 1, done.err
    how = {"kill": "was killed", "raise": "raised an error", "freeze": "is frozen"}[kind]
    assert f"rank {rank} {how} at step {step}, phase {phase}" in reported[0]
    assert python(*EXACT, cwd=place).code == 0
    assert_same_run(place / "runs/a", unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_freezes_after_the_last_step_is_named_and_ended(place: Path, unbroken: Path, rank: int):
    """Though no rank needs it any more, the launcher waits for it."""
    done = torchrun(2, *EXACT, "sync.timeout_s=3", cwd=place, env=fault(f"freeze rank={rank} step=60 phase=end"))
    assert done.code == 1
    (reported,) = [line for line in done.err.splitlines() if line.startswith("fault:")]
    assert f"rank {rank} is frozen at step 60, phase end" in reported
    assert python(*EXACT, cwd=place).code == 0
    assert_same_run(place / "runs/a", unbroken)


BLOCKED = ("block rank=0 step=30 phase=sync", "block rank=2 step=30 phase=sync")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("faults", "reported", "within"),
    [
        ([*BLOCKED, "kill rank=1 step=30 phase=sync"], "rank 1 was killed at step 30, phase sync", 5),
        soak([*BLOCKED, "raise rank=1 step=30 phase=sync"], "rank 1 raised an error at step 30, phase sync", 5),
        soak([*BLOCKED, "freeze rank=1 step=30 phase=sync"], "rank 1 is frozen at step 30, phase sync", 5 + 5),
        ([*BLOCKED, "block rank=1 step=30 phase=forward"], "rank 1 did not answer, last seen at step 30, phase forward", 5 + 5),
        (["block rank=1 step=30 phase=forward"], "rank 1 did not answer, last seen at step 30, phase forward", 5 + 5),
    ],
)
def test_a_rank_is_named_in_time_also_by_ranks_whose_main_thread_waits_in_cpp(
    place: Path, faults: list[str], reported: str, within: float
):
    """As it does for a GPU that waits for the rank that has failed."""
    done = torchrun(3, *EXACT, "sync.timeout_s=5", cwd=place, env=fault("; ".join(faults)))
    last_line = (place / "runs/a/metrics.jsonl").stat().st_mtime  # of step 25, five steps before
    assert time.time() - last_line < within + 2, "and what the launcher and the last steps take"
    assert done.code == 1
    advice = "; if it was only slow, raise sync.timeout_s=5" if "did not answer" in reported else ""
    assert [line for line in done.err.splitlines() if line.startswith("fault:")] == [
        f"fault: {reported}; the run ends{advice}; to resume it, run the same command again with run.name=a"
    ]


@pytest.mark.slow
def test_a_signal_is_heard_while_the_main_thread_waits_in_cpp(place: Path):
    process = start(1, *EXACT, cwd=place, env=fault("block rank=0 step=12 phase=update"))
    wait_for_step(place / "runs/a", 10, process)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "")
    assert any(line == "SIGTERM: asked to stop after this step\n" for line in lines)
    assert time.monotonic() - began < 2
    time.sleep(0.6)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130
    assert time.monotonic() - began < 2


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_a_run_killed_three_times_ends_as_the_unbroken_one_on_other_worlds(place: Path, tmp_path_factory):
    """The whole process group with -9, and the run resumed on 2, 1, 3 and 2 processes."""
    arguments = (*TRAIN, "sync.mode=exact", "checkpoint.every_steps=25", "train.max_steps=300")
    other = tmp_path_factory.mktemp("other")
    (other / "data").symlink_to((place / "data").resolve())
    assert python(*arguments, cwd=other).code == 0
    for world_size, step in ((2, 40), (1, 120), (3, 205)):
        process = start(world_size, *arguments, cwd=place)
        wait_for_step(place / "runs/a", step, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert torchrun(2, *arguments, cwd=place).code == 0
    assert_same_run(place / "runs/a", other / "runs/a")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", soak("accelerate launch")])
def test_a_launcher_brings_a_killed_run_back(place: Path, unbroken: Path, launcher: str):
    env = fault("kill rank=1 step=30 phase=backward")
    if launcher == "torchrun":
        path = {"PATH": f"{BIN}:{os.environ['PATH']}"}
        done = run([str(ROOT / "launch/elastic.sh"), "2", *EXACT[2:]], cwd=place, env=env | path, timeout=100)
    else:
        where = ("--config_file", str(ROOT / "launch/elastic.yaml"), "--max_restarts", "10")
        done = accelerate(*where, *EXACT, cwd=place, env=env)
    assert done.code == 0, done.err
    assert "resumes at step 20" in done.out
    assert_same_run(place / "runs/a", unbroken)


@pytest.mark.slow
def test_restarts_without_progress_stop_with_the_cause(place: Path):
    env = fault("raise rank=1 step=30 phase=forward always=1")
    done = torchrun(2, *RESTARTS, "--rdzv_endpoint", "127.0.0.1:0", *EXACT, cwd=place, env=env)
    assert done.code == 1
    assert "restarted twice without a step of progress" in done.err
    assert "a fault that a test has asked for" in done.err.rpartition("without a step of progress")[2]


LATE = """
import os, runpy, sys, time
if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == (sys.argv.pop(1), "0"):
    time.sleep(600)
runpy.run_module("digitdist.train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [soak(0), 1])
def test_a_rank_that_has_not_joined_is_named_and_a_launcher_may_start_it_again(place: Path, unbroken: Path, rank: int):
    (place / "late.py").write_text(LATE)
    options = (*EXACT[2:], "sync.join_timeout_s=4")
    done = torchrun(2, *RESTARTS, "--rdzv_endpoint", "127.0.0.1:0", "late.py", str(rank), *options, cwd=place)
    assert done.code == 0, done.err
    assert len(done.errors) == 1
    assert "within sync.join_timeout_s=4" in done.errors[0]
    assert_same_run(place / "runs/a", unbroken)


@pytest.mark.slow
def test_a_launcher_that_is_to_start_over_does_so_once(place: Path, unbroken: Path):
    shutil.copytree(unbroken, place / "runs/a")
    never = (*EXACT, "checkpoint.resume=never")
    env = fault("kill rank=1 step=50 phase=backward")
    done = torchrun(2, *RESTARTS, "--rdzv_endpoint", "127.0.0.1:0", *never, cwd=place, env=env)
    assert done.code == 0, done.err
    assert [attempt["step"] for attempt in attempts(place / "runs/a")] == [0, 40]
    assert "to resume it, run the same command again with run.name=a and checkpoint.resume=auto" in done.err
    assert_same_run(place / "runs/a", unbroken)


@pytest.mark.slow
def test_a_file_stop_also_ends_a_launcher_that_would_restart(place: Path):
    command = [str(BIN / "torchrun"), "--nproc_per_node=2", *RESTARTS, "--rdzv_endpoint", "127.0.0.1:0", *EXACT]
    process = start_process(command, place, CLEAN | fault("slow rank=0 step=12 phase=update"))
    wait_for_phase(place / "runs/a", 0, 12, "update", process)
    (place / "runs/a/STOP").touch()
    began = time.monotonic()
    out, _ = process.communicate(timeout=60)
    assert time.monotonic() - began < 20
    assert process.returncode not in (0, None)
    assert out.count("stopped on request after step") == 1, out
    assert out.count("device  ") == 1, "no worker has started again"
    assert len(attempts(place / "runs/a")) == 1


# What is damaged


@pytest.mark.slow
@pytest.mark.parametrize("file", ["model.safetensors", *map(soak, ("optimizer.safetensors", "state.json", "manifest.json"))])
def test_a_damaged_checkpoint_is_said_and_skipped(place: Path, unbroken: Path, file: str):
    assert python(*EXACT, "train.max_steps=40", cwd=place).code == 0
    newest = folders(place / "runs/a/checkpoints")[-1]
    content = bytearray((newest / file).read_bytes())
    content[len(content) // 2] ^= 1
    (newest / file).write_bytes(content)
    reported = python("-m", "digitdist.checkpoint", "verify", "a", cwd=place)
    assert reported.code == 1
    assert f"damaged: runs/a/checkpoints/{newest.name}" in reported.out
    done = torchrun(2, *EXACT, cwd=place)
    assert done.code == 0, done.err
    assert newest.name in done.out
    assert "resumes at step 20" in done.out
    lines = [e for e in events(place / "runs/a") if e["step"] != 40 or "train/loss" in e]
    assert lines == events(unbroken)
    assert result(place / "runs/a")["weights_sha256"] == result(unbroken)["weights_sha256"]


@pytest.mark.slow
def test_a_failing_write_does_not_end_the_run_but_a_failing_last_one_does(place: Path, unbroken: Path):
    done = python(*EXACT, cwd=place, env=fault("full rank=0 step=40 phase=save nth=3"))
    assert done.code == 0, done.err
    assert "the checkpoint of step 40 cannot be written" in done.out
    assert "No space left on device" in done.out
    assert [f.name for f in folders(place / "runs/a/checkpoints")] == ["step-000000020", "step-000000060"]
    assert_same_run(place / "runs/a", unbroken)

    shutil.rmtree(place / "runs")
    done = torchrun(2, *EXACT, cwd=place, env=fault("full rank=0 step=60 phase=save nth=2"))
    assert done.code == 1
    assert done.err.count("the last checkpoint, of step 60, cannot be written") == 1
    assert not (place / "runs/a/result.json").exists()
    assert python(*EXACT, cwd=place).code == 0
    assert_same_run(place / "runs/a", unbroken)


# What is resumed

# Of 15 steps an epoch: the stop is within a pass of the second one.
FOCUS = ("data.focus=4", "data.validation=50000", "data.batch_size=700", "train.eval_every=0")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        soak(1, ("checkpoint.every_steps=0",)),
        (3, ("checkpoint.every_steps=0", *FOCUS)),
        soak(2, ("checkpoint.every_steps=0", "sync.compress=powersgd")),
        soak(2, ("checkpoint.every_steps=0", "sync.mode=local", "sync.every=10", *FOCUS)),
        (2, ("checkpoint.every_steps=0", "sync.mode=local", "sync.every=5", "sync.overlap=true")),
    ],
)
def test_in_other_modes_too_stopping_and_going_on_changes_no_bit(
    place: Path, tmp_path_factory, world_size: int, options: tuple[str, ...]
):
    arguments = (*TRAIN, "model.name=cnn_batchnorm", "optim.ema=0.9", *options)
    other = tmp_path_factory.mktemp("other")
    (other / "data").symlink_to((place / "data").resolve())
    assert torchrun(world_size, *arguments, "train.max_steps=45", cwd=other).code == 0
    for steps in (17, 45):
        assert torchrun(world_size, *arguments, f"train.max_steps={steps}", cwd=place).code == 0
    assert result(place / "runs/a")["weights_sha256"] == result(other / "runs/a")["weights_sha256"]


@pytest.mark.slow
def test_a_finished_run_says_so_and_a_changed_one_is_refused(place: Path):
    short = (*TRAIN, "train.max_steps=10")
    assert python(*short, cwd=place).code == 0
    again = python(*short, cwd=place)
    assert again.code == 0
    assert "is finished" in again.out
    assert "Train" not in again.out
    before = (place / "runs/a/metrics.jsonl").read_bytes()
    changed = python(*short, "train.max_steps=20", "seed=1", "data.batch_size=50", cwd=place)
    assert changed.code == 2
    assert len(changed.errors) == 1
    assert "seed was 0 and is now 1" in changed.err
    assert "data.batch_size was 100 and is now 50" in changed.err
    assert (place / "runs/a/metrics.jsonl").read_bytes() == before
    allowed = python(*short, "train.max_steps=20", "optim.lr=0.01", "checkpoint.allow_change=true", cwd=place)
    assert allowed.code == 0
    assert result(place / "runs/a")["steps"] == 20
    fresh = python(*short, "checkpoint.resume=never", "seed=1", cwd=place)
    assert fresh.code == 0
    assert [event["step"] for event in events(place / "runs/a")] == [5, 10, 10]


@pytest.mark.slow
def test_a_run_goes_on_from_another_ones_checkpoint(place: Path, unbroken: Path):
    source = place / "source"
    shutil.copytree(unbroken / "checkpoints" / "step-000000040", source)
    assert python(*EXACT, "run.name=b", f"checkpoint.resume={source}", cwd=place).code == 0
    assert result(place / "runs/b")["weights_sha256"] == result(unbroken)["weights_sha256"]


def test_a_second_training_in_the_same_run_is_refused(place: Path):
    first = start(1, *TRAIN, cwd=place)
    try:
        wait_for_step(place / "runs/a", 10, first)
        second = python(*TRAIN, cwd=place)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()
    assert second.code == 2
    assert "another training works in this run" in second.errors[0]
