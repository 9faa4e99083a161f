"""However a training is asked to end, and whatever has started it: it ends saved, and leaves nobody behind."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from filelock import FileLock, Timeout
from helpers.launching import BIN, CLEAN, QUIET, python, start_process, torchrun
from helpers.runs import attempts, reached, result, wait_for_step, wait_until
from helpers.variants import soak

from digitdist.checkpoint import folders

pytestmark = pytest.mark.slow
SHORT = ("-m", "digitdist.train", *QUIET, "run.name=a", "train.log_every=5", "data.eval_batch_size=5000")
ENDLESS = (*SHORT, "checkpoint.every_steps=0", "train.max_steps=5000")


def launched(launcher: str, *arguments: str) -> list[str]:
    starts = {
        "python": [sys.executable],
        "accelerate": [str(BIN / "accelerate"), "launch"],
        "torchrun": [str(BIN / "torchrun"), "--nproc_per_node", "2"],
    }
    return [*starts[launcher], *arguments]


def is_free(run: Path) -> bool:
    try:
        FileLock(run / ".lock").acquire(timeout=0).lock.release()
    except Timeout:
        return False
    return True


def is_saved(run: Path) -> bool:
    """Whether the run was stopped on request, with a checkpoint."""
    return bool(attempts(run)[-1].get("stopped")) and len(folders(run / "checkpoints")) == 1


@pytest.mark.parametrize(
    ("launcher", "name"), [("accelerate", "SIGUSR1"), soak("accelerate", "SIGKILL"), ("torchrun", "SIGKILL")]
)
def test_a_training_ends_saved_with_its_launcher(place: Path, launcher: str, name: str):
    process = start_process(launched(launcher, *ENDLESS), place, CLEAN)
    wait_for_step(place / "runs/a", 5, process)
    process.send_signal(getattr(signal, name))
    process.wait(timeout=30)
    wait_until(lambda: is_free(place / "runs/a"), timeout=30)
    process.communicate(timeout=30)  # no rank is left that holds its output
    assert is_saved(place / "runs/a")


def test_a_rank_whose_last_save_fails_does_not_wait_for_a_launcher_that_has_ended(place: Path):
    process = start_process(launched("torchrun", *ENDLESS), place, CLEAN)
    wait_for_step(place / "runs/a", 5, process)
    shutil.rmtree(place / "runs/a/checkpoints", ignore_errors=True)
    (place / "runs/a/checkpoints").touch()
    process.kill()
    out, _ = process.communicate(timeout=20)  # no rank is left that holds its output
    assert "the last checkpoint, of step" in out
    assert out.count("Traceback (most recent call last)") == 1


def test_a_training_goes_on_without_the_shell_that_has_started_it(place: Path):
    command = " ".join([sys.executable, *SHORT, "train.max_steps=40"])
    shell = subprocess.Popen(["sh", "-c", f"{command} & exit 0"], cwd=place, env=CLEAN, stdout=-1, start_new_session=True)
    assert shell.wait(timeout=30) == 0
    shell.communicate(timeout=100)
    assert result(place / "runs/a")["steps"] == 40


def test_a_closed_terminal_stops_it_saved_and_under_nohup_it_goes_on(place: Path):
    """The terminal is gone, so that a bar or a line that is drawn fails."""
    for name, ignored in (("a", False), ("b", True)):
        run = place / "runs" / name
        main, secondary = pty.openpty()
        options = [*SHORT, f"run.name={name}", "train.max_steps=40", "checkpoint.every_steps=0"]
        process = subprocess.Popen(
            [sys.executable, *options],
            cwd=place,
            env=CLEAN | {"DIGITDIST_FAULT": "slow rank=0 step=8 phase=update"},
            stdin=secondary,
            stdout=secondary,
            stderr=secondary,
            start_new_session=True,
            preexec_fn=lambda ignored=ignored: on_terminal(ignored),
        )
        os.close(secondary)
        wait_until(lambda run=run: reached(run) >= 5)
        os.close(main)  # the kernel sends SIGHUP
        assert process.wait(timeout=60) == (0 if ignored else 75)
        if ignored:
            assert result(run)["steps"] == 40
        else:
            assert is_saved(run)


def on_terminal(ignored: bool) -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    if ignored:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


# ^C while it starts


@pytest.mark.timeout(300)
def test_one_interrupt_ends_a_command_wherever_its_imports_are(place: Path):
    """Moments spread over the imports, by the libraries that are mapped into memory; some libraries catch everything."""
    moments: list[Callable[[psutil.Process], bool]] = [
        lambda process: has_mapped(process, "libtorch_cpu"),
        lambda process: has_mapped(process, "libtorch_python"),
        lambda process: has_mapped(process, "_psutil"),
        lambda process: has_mapped(process, "scipy"),
    ]
    for moment in moments:
        process = start_process(launched("python", *ENDLESS), place, CLEAN)
        wait_until(lambda process=process, moment=moment: moment(psutil.Process(process.pid)))
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        process.communicate(timeout=30)
        assert time.monotonic() - began < 5
        assert process.returncode == -signal.SIGINT


def has_mapped(process: psutil.Process, library: str) -> bool:
    return any(library in entry.path for entry in process.memory_maps())


@pytest.mark.timeout(300)
@pytest.mark.parametrize("at_step", [0, 5])
def test_two_interrupts_end_torchrun_and_its_workers(place: Path, at_step: int):
    """While the workers import, and while they train: then one is in a step that takes long."""
    env = CLEAN | {"DIGITDIST_FAULT": "; ".join(f"block rank={rank} step=8 phase=update" for rank in (0, 1))}
    process = start_process(launched("torchrun", *ENDLESS), place, env)
    if at_step:
        wait_for_step(place / "runs/a", at_step, process)
    workers = wait_until(lambda: [child for child in psutil.Process(process.pid).children() if has_mapped(child, "libtorch")])
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    wait_until(lambda: not any(map(runs, workers)), timeout=5)
    process.communicate(timeout=15)  # what is left is torchrun's own


def test_two_interrupts_at_once_leave_time_to_save_and_then_end_it(place: Path):
    """The second may be the first, passed on by a launcher. Here the step never ends."""
    env = CLEAN | {"DIGITDIST_FAULT": "block rank=0 step=8 phase=update"}
    process = start_process(launched("python", *ENDLESS), place, env)
    wait_for_step(place / "runs/a", 5, process)
    time.sleep(1)
    began = time.monotonic()
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT
    assert 2 < time.monotonic() - began < 5


def runs(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


# What takes long


def test_a_rank_that_saves_longer_than_the_timeout_is_not_frozen(place: Path):
    files = "; ".join(f"slow rank=0 step=20 phase=save nth={n}" for n in (2, 3, 4))  # 2 s each
    options = (*SHORT, "train.max_steps=40", "checkpoint.every_steps=20", "sync.timeout_s=4")
    done = torchrun(2, *options, cwd=place, env={"DIGITDIST_FAULT": files})
    assert done.code == 0, done.err
    assert [event for event in attempts(place / "runs/a") if "fault" in event] == []
    assert result(place / "runs/a")["steps"] == 40


def test_opening_a_run_may_take_longer_than_the_timeout(place: Path):
    (place / "slow_disk.py").write_text(
        "import time\nfrom digitdist.distributed import run_command\nfrom digitdist.train import command\n"
        "opened = command.open_run\n"
        "command.open_run = lambda *arguments: time.sleep(6) or opened(*arguments)\n"
        "run_command(command.main)\n"
    )
    done = torchrun(2, "slow_disk.py", *SHORT[2:], "train.max_steps=20", "sync.timeout_s=3", cwd=place)
    assert done.code == 0, done.err


# A process that goes on


def test_after_main_was_called_in_a_program_its_signal_handlers_and_streams_are_those_of_before(place: Path):
    program = (
        "import signal, sys\nfrom digitdist.train.command import main\n"
        "def mine(number, frame): pass\n"
        "numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP]\n"
        "for number in numbers: signal.signal(number, mine)\n"
        "streams = sys.stdout, sys.stderr\n"
        f"sys.argv[1:] = {[*SHORT[2:], 'train.max_steps=3']}\n"
        "main()\nsys.argv[-1] = 'train.max_steps=5'\nmain()\n"  # the first has let the run's lock go
        "assert all(signal.getsignal(number) is mine for number in numbers)\n"
        "assert (sys.stdout, sys.stderr) == streams\n"
    )
    done = python("-c", program, cwd=place)
    assert done.code == 0, done.err
    assert result(place / "runs/a")["steps"] == 5
