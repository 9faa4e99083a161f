"""A training from its command line to its result."""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from digitdist.config import Parser, describe_keys
from digitdist.distributed import (
    LEFT,
    NOTICED,
    RAISED,
    FailedRank,
    Heartbeat,
    PeerWatch,
    StopRequest,
    find_failed_rank,
    is_collective_failure,
    is_command,
    launcher_start_time,
    make_expendable,
    process_restored,
    raise_on_all_ranks,
    run_preflight,
    start_accelerator,
    wait_for_others,
    work_on_main,
)
from digitdist.errors import Fault, PeerFailed, Stopped, UserError
from digitdist.runs import RESULT, Run, fetch_run, open_run, record_end
from digitdist.train.display import first_lines
from digitdist.train.resuming import fitting
from digitdist.train.setup import Setup, prepare
from digitdist.train.trainer import Trainer
from digitdist.world import is_main, print_main


def main() -> None:
    """The command; a process that calls it and goes on is left as it was. Collective: every rank must call it."""
    if not is_command():
        train(sys.argv[1:])
        return
    make_expendable("stdout")
    run_training(sys.argv[1:], contextlib.ExitStack())  # which is never closed: all ends with this process


def train(arguments: Sequence[str] = ()) -> dict[str, Any]:
    """The command in this process, which goes on afterwards as it was: in a notebook, in a program, or on several processes
    by ``accelerate.notebook_launcher(train, args=(arguments,), num_processes=2)``. Collective: every rank must call it.

    `arguments`: as on the command line, such as ``["--config", "quick", "train.epochs=1"]``.

    Returns what ``result.json`` holds, and the run's folder, a `Path`, as ``folder``; the folder alone off the main rank.

    Raises:
        UserError: a mistake in the arguments, or ranks differ in what they are to do, or the run cannot be opened.
        Stopped: on request (SIGINT, which a notebook's stop button sends), after a checkpoint; the same call goes on.
        Fault, PeerFailed: the training cannot go on.
    """
    with process_restored(["digitdist.train.train", *arguments]), contextlib.ExitStack() as closing:
        return run_training(arguments, closing)


def run_training(arguments: Sequence[str], closing: contextlib.ExitStack) -> dict[str, Any]:
    """Reads the command line `arguments`, and trains as they say; see `train`. Collective: every rank must call it.

    `closing` gets what must end with the training, unless the process ends with it.
    """
    parser = Parser(
        "accelerate launch -m digitdist.train",
        "Trains a digit CNN on whatever the launcher gives: one CPU, one GPU, many of them, many hosts.",
        "--config quick train.epochs=1",
        more=describe_keys(),
    )
    parser.add_config()
    parsed = parser.parse_args(arguments)
    try:
        setup = prepare(parsed.config, parsed.overrides)
    except UserError as error:
        raise_on_all_ranks(error)
    folder = train_setup(setup, closing)
    return {"folder": folder} | (json.loads((folder / RESULT).read_text()) if is_main() else {})


def train_setup(setup: Setup, closing: contextlib.ExitStack) -> Path:
    """Opens the run, trains it to its end, and returns its folder. Collective: every rank must call it.

    Raises:
        UserError: ranks differ in what they are to do, or the run cannot be opened.
        Stopped, Fault, PeerFailed: the training has not come to its end.
    """
    config, plan = setup.config, setup.plan
    if plan.world.size > 1:
        run_preflight(plan.world, setup.fingerprint(), config.sync.join_timeout_s)
    accelerator = start_accelerator(config, plan)
    launchers = sorted({time for time in gather_object([launcher_start_time()]) if time})
    fetch_run(config, plan, launchers)
    fit = partial(fitting, setup)
    run = work_on_main(accelerator, lambda: open_run(config, plan, setup.splits, setup.ending, launchers, fit))
    closing.callback(run.close)
    if run.finished and run.stored:
        step, key = run.stored.step, setup.ending(run.stored.step, run.stored.state["best"])
        advice = "raise it, or set it to 0," if key == "train.patience" else "raise train.epochs or train.max_steps"
        print_main(f"{run.folder} is finished, at step {step:,}, by {key}; {advice} to train on")
        accelerator.end_training()
        return run.folder
    print_main(first_lines(setup, run))
    heartbeat, stop_request = Heartbeat(run.heartbeat, plan.world, accelerator.device), StopRequest()
    stop_request.listen()
    closing.callback(stop_request.close)
    with failures_named(heartbeat, run, config.sync.timeout_s):
        trainer = Trainer(setup, accelerator, run, heartbeat, stop_request)
        closing.callback(trainer.recorder.close)
        trainer.train()
        run.heartbeat.unlink(missing_ok=True)
        accelerator.end_training()
        if is_main() and config.run.report:
            write_report(run.folder)
    return run.folder


@contextlib.contextmanager
def failures_named(heartbeat: Heartbeat, run: Run, timeout_s: float) -> Iterator[None]:
    """Records in the run which rank ended it, if one did, and reports it once a host, also where this rank's main thread waits
    for a device: then `PeerWatch` does it.

    Raises:
        PeerFailed: another rank did; that error's own rank raises the error itself.
    """

    def report(failed: FailedRank) -> None:
        if failed.reported_here:
            slow = f"; if it was only slow, raise sync.timeout_s={timeout_s:g}" if failed.silent else ""
            line = f"fault: {failed.description}; the run ends{slow}; to resume it, {run.resuming}"
            print(line, file=sys.stderr, flush=True)  # first: the disk may be full
            record_end(run.folder, fault=failed.description)

    watch = PeerWatch(heartbeat, timeout_s, report)
    watch.start()
    cause = None
    try:
        yield
        watch.take_over(LEFT)
        failed = wait_for_others(heartbeat, timeout_s)
    except (UserError, Stopped, Fault):
        watch.take_over(LEFT)
        raise
    except Exception as error:
        if not is_collective_failure(error):
            watch.take_over(RAISED)
            record_end(run.folder, fault=f"rank {heartbeat.rank} raised {error!r} at {heartbeat.position}")
            raise
        watch.take_over(NOTICED)
        failed, cause = find_failed_rank(heartbeat), error
    if failed:
        report(failed)
        raise PeerFailed(failed.description) from cause


def write_report(folder: Path) -> None:
    """Makes plots and page of a run in a process of its own: whatever becomes of it, the training is done."""
    command = [sys.executable, "-m", "digitdist.report", str(folder)]
    made = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if made.returncode:
        print_main(f"no report: {made.stderr.strip()[-300:]}; later: python -m digitdist.report {shlex.quote(str(folder))}")
    else:
        print_main(f"report in {folder / 'report.html'}")
