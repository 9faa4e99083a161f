"""`train` in a process that goes on: a program, a notebook's kernel, and the processes that either launches."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from helpers.launching import CLEAN, QUIET, python, torchrun
from helpers.runs import assert_same_run, attempts, result, wait_for_step

from digitdist.errors import Stopped, UserError
from digitdist.train import train

SHORT = (*QUIET, "train.max_steps=5", "train.log_every=1", "data.eval_batch_size=10000")
EXACT = (*SHORT, "sync.mode=exact")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
Execute = Callable[[str], str]


def settings() -> dict[str, object]:
    """What a training changes in its process."""
    states = (PartialState._shared_state, AcceleratorState._shared_state, GradientState._shared_state)
    return {
        "environment": dict(os.environ),
        "handlers": [signal.getsignal(number) for number in SIGNALS],
        "warnings": list(warnings.filters),
        "command": sys.argv,
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "precision of float32": torch.get_float32_matmul_precision(),
        "random": torch.get_rng_state().tolist(),
        "accelerate": [dict(state) for state in states],
    }


@pytest.mark.slow
def test_a_training_leaves_its_process_as_it_was(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(place)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_num_threads(2)
    try:
        before = settings()
        exact = train([*EXACT, "run.name=a"])
        assert settings() == before
        other = train([*SHORT, "train.threads=1", "run.name=b", "train.max_steps=1"])
        assert settings() == before
        again = train([*EXACT, "run.name=c"])
        assert settings() == before
    finally:
        torch.use_deterministic_algorithms(False)
    assert (other["steps"], other["folder"]) == (1, Path("runs/b"))
    assert exact == result(place / "runs/a") | {"folder": Path("runs/a")}
    assert exact["weights_sha256"] == again["weights_sha256"]
    assert attempts(place / "runs/a")[0]["command"][:2] == ["digitdist.train.train", EXACT[0]]
    assert train([*EXACT, "run.name=a"]) == exact, "a run that is finished has its result"


def test_a_training_in_a_process_ends_by_exceptions_that_leave_it_as_it_was(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(place)
    before = settings()
    with pytest.raises(UserError, match=r"did you mean(.|\n)*optim.lr=-1 is not allowed"):
        train(["optim.lr=-1", "data.rot=x"])
    with pytest.raises(UserError, match="--bogus"):
        train(["--bogus"])
    (place / "runs/a").mkdir(parents=True)
    (place / "runs/a/STOP").touch()
    with pytest.raises(Stopped, match=r"after step 1, saved in runs/a; to resume it, run the same command") as caught:
        train([*SHORT, "run.name=a"])
    with pytest.raises(UserError, match=r"runs/a/.*: optim.lr was 0.001 and is now 0.1"):
        train([*SHORT, "run.name=a", "optim.lr=0.1"])
    assert train([*SHORT, "run.name=a"])["steps"] == 5, "the run is not locked, although its exception lives"
    assert caught.value
    assert "resumes at step 1" in capsys.readouterr().out
    assert settings() == before


def test_a_training_in_another_thread_than_the_main_one_handles_no_signal(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(place)
    results = []
    handlers = settings()["handlers"]
    thread = threading.Thread(target=lambda: results.append((train([*SHORT, "run.name=a"]), settings()["handlers"])))
    thread.start()
    thread.join()
    assert [(values["steps"], seen) for values, seen in results] == [(5, handlers)]


@pytest.fixture
def execute(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Execute]:
    """Executes a cell in a kernel of Jupyter's that works in `place`; returns what it prints, with the text of its error."""
    from jupyter_client.manager import start_new_kernel

    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(place))
    manager, client = start_new_kernel(cwd=str(place), env=CLEAN)

    def cell(code: str) -> str:
        shown: list[str] = []

        def show(message: dict) -> None:
            content = message["content"]
            if message["msg_type"] == "stream":
                shown.append(content["text"])
            elif message["msg_type"] == "error":
                shown.append(f"{content['ename']}: {content['evalue']}")

        client.execute_interactive(code, output_hook=show, timeout=100)
        return "".join(shown)

    yield cell
    client.stop_channels()
    manager.shutdown_kernel(now=True)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_kernel_trains_again_and_again_with_the_bits_of_the_command(place: Path, execute: Execute):
    for name, options in (("e", EXACT), ("d", SHORT)):
        assert python("-m", "digitdist.train", *options, f"run.name={name}", cwd=place).code == 0
    shown = execute(f"from digitdist.train import train\nresult = train({[*EXACT, 'run.name=e1']})")
    assert "Train epoch 1 [   500/60,000 (  1 %)] loss" in shown
    assert "Error" not in shown
    assert "UserError: optim.lr=-1 is not allowed; optim.lr takes" in execute("train(['optim.lr=-1'])")
    other = ["train.precision=bf16", "data.batch_size=10", "train.max_steps=1", "run.name=other"]
    execute(f"train({[*SHORT, *other]})\ntrain({[*SHORT, 'run.name=d1']})")
    execute(f"import threading\nt = threading.Thread(target=train, args=({[*EXACT, 'run.name=e2']},))\nt.start(); t.join()")
    # The kernel has used torch's threads by now, which its forks do not have.
    execute("import torch; torch.set_num_threads(2); torch.randn(400, 400).exp().sum()")
    for name in ("e3", "e4"):
        launch = f"notebook_launcher(train, args=({[*EXACT, 'train.threads=1', f'run.name={name}']},), num_processes=2)"
        shown = execute(f"from accelerate import notebook_launcher\n{launch}")
        assert "world size 2: 2 processes" in shown, shown
    assert execute("print(result['steps'], result['folder'])") == "5 runs/e1\n"
    for name in ("e1", "e2", "e3", "e4"):
        assert_same_run(place / "runs" / name, place / "runs/e")
    assert_same_run(place / "runs/d1", place / "runs/d")
    assert result(place / "runs/other")["precision"] == "bf16"
    assert [result(place / "runs" / name)["world_size"] for name in ("e1", "e3")] == [1, 2]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_notebooks_stop_button_saves_and_the_same_cell_goes_on(place: Path):
    """SIGINT, which the button sends; with two processes it reaches each of them."""
    options = [*QUIET, "sync.mode=exact", "train.max_steps=60", "train.log_every=1", "run.name=a"]
    program = (
        "import sys, digitdist.errors\nfrom accelerate import notebook_launcher\nfrom digitdist.train import train\n"
        f"def go(): notebook_launcher(train, args=({options},), num_processes=int(sys.argv[1]))\n"
        "try: go()\nexcept BaseException as error: print('ended by', type(error).__name__, error)\n"
        "print('goes on', flush=True)\ngo()\n"
    )
    for number, processes in enumerate(("1", "2")):
        options[-1] = f"run.name=run{processes}"
        code = program.replace("run.name=a", options[-1])
        process = subprocess.Popen(
            [sys.executable, "-c", code, processes],
            cwd=place,
            env=CLEAN,
            stdout=-1,
            stderr=-1,
            text=True,
            start_new_session=True,
        )
        folder = place / "runs" / f"run{processes}"
        wait_for_step(folder, 5, process)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
        assert "goes on" in out
        assert re.search(r"resumes at step \d", out), out
        assert ("ended by Stopped stopped on request" in out) == (number == 0)
        assert result(folder)["steps"] == 60


@pytest.mark.slow
def test_a_program_trains_several_times_in_the_processes_of_one_launch(place: Path):
    (place / "several.py").write_text(
        "from digitdist.train import train\n"
        f"for name, more in (('a', {EXACT}), ('b', {SHORT}), ('c', {EXACT})):\n    train([*more, 'run.name=' + name])\n"
    )
    done = torchrun(2, "several.py", cwd=place)
    assert done.code == 0, done.err
    assert_same_run(place / "runs/c", place / "runs/a")
    assert result(place / "runs/b")["world_size"] == 2
