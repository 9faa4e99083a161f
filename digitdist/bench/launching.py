"""Starts what is measured in processes of its own, and ends them with this one."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from digitdist.errors import Fault
from digitdist.runs import RESULT

END_GRACE_S = 3.0  # in which what was started ends by the ^C that a terminal sends to it too
STOP_GRACE_S = 15.0  # in which it ends when it is asked to; then it is killed
LAST_WORDS = 10_000  # characters of what has failed: torchrun adds some thousand to those of a rank


def launch(arguments: Sequence[str], world_size: int = 1, env: Mapping[str, str] | None = None) -> str:
    """Runs ``python ARGUMENTS``, on several processes by torchrun, and returns what it prints.

    `env`: environment variables beside this process's own. Whatever ends the wait, such as ^C, ends what was started.

    Raises:
        Fault: it has failed; the message has its exit code and its last words.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size)]
    command = [sys.executable, *(torchrun if world_size > 1 else []), *arguments]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    with subprocess.Popen(command, env=os.environ | (env or {}), **streams) as process:
        try:
            output, errors = process.communicate()
        except BaseException:
            _end(process)
            raise
    if process.returncode:
        last_words = errors.strip()[-LAST_WORDS:]
        raise Fault(f"{shlex.join(command)} ended with exit code {process.returncode}:\n{last_words}")
    return output


def result_of_training(arguments: Sequence[str], world_size: int = 1, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The result of one training by the trainer's own command, in a run folder that is removed, without W&B and without the
    page of plots.

    Raises:
        Fault: it has failed; the message says why.
    """
    with tempfile.TemporaryDirectory() as folder:
        fixed = [f"run.dir={folder}", "run.name=a", "run.report=false", "tracking.wandb=disabled"]
        launch(["-m", "digitdist.train", *arguments, *fixed], world_size, env)
        return json.loads((Path(folder) / "a" / RESULT).read_text())


def _end(process: subprocess.Popen[str]) -> None:
    for ask, patience_s in ((None, END_GRACE_S), (process.terminate, STOP_GRACE_S), (process.kill, None)):
        if ask:
            ask()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
            return
