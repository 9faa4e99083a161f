"""A W&B run in a thread of its own: no step waits for it, and whatever happens to it is said in one line."""

from __future__ import annotations

import contextlib
import queue
import shlex
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from digitdist.errors import in_one_line
from digitdist.runs.metrics import METRICS
from digitdist.runs.wandb_media import Media
from digitdist.runs.wandb_record import begin_record, keep_media, stored_rows
from digitdist.runs.wandb_server import wandb_mode
from digitdist.runs.wandb_session import Session, prepare_environment, remove_service_folder

INIT_TIMEOUT_S = 3.0  # wandb adds up to 10 s to this before it gives up
UPLOAD_TIMEOUT_S = 6.0  # for what is left to send at the end
FINISH_TIMEOUT_S = 8.0  # the longest that training ever waits for W&B
CLOSE_TIMEOUT_S = 1.0  # for the connection to a process that was killed
SETTINGS = {"init_timeout": INIT_TIMEOUT_S, "finish_timeout": UPLOAD_TIMEOUT_S}


class WandbRun:
    """A W&B run, started by its first event, or at once where an earlier attempt had one; its methods never raise.

    A step is sent once, when all its metrics are there. What an earlier attempt has recorded and W&B does not have is sent
    first. All of it is also kept in the run's folder, from where `sync_wandb` can send it later.
    """

    def __init__(
        self, requested: str, folder: Path, run_id: str, init_options: Mapping[str, Any], report: Callable[[str], None]
    ):
        self._requested, self._folder, self._report = requested, folder, report
        self._options = {"id": run_id, **init_options}  # arguments of wandb.init
        self._tasks: queue.SimpleQueue[Callable[[Session], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._wandb: Any = None
        self._abandoned = self._complained = False
        self._keep(lambda: begin_record(folder, run_id, init_options, report))
        self._stored = stored_rows(folder)
        self._last_step = max(self._stored, default=0)
        if self._stored:  # a run that only has to end would not have the time
            self._begin()

    def log(self, event: Mapping[str, float], step: int, media: Mapping[str, Media]) -> None:
        self._last_step = step
        if media:
            self._keep(lambda: keep_media(self._folder, step, media))
        self._give(lambda session: session.add(event, step, media))

    def finish(self, result: Mapping[str, Any], media: Mapping[str, Media], weights: Path | None) -> None:
        """Sends what is left, and `result` as the summary; waits at most `FINISH_TIMEOUT_S`."""
        if media:
            self.log({}, self._last_step, media)
        self._end(lambda session: session.finish(result, weights, stopped=False))

    def stop(self) -> None:
        """Ends the run as one that was asked to stop and goes on later; waits as `finish` does."""
        self._end(lambda session: session.finish({}, None, stopped=True))

    def close(self) -> None:
        """Ends the run as one that has failed, if it has begun; waits as `finish` does."""
        if self._thread is not None:
            self._end(lambda session: session.finish({}, None, stopped=False))

    def _keep(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            if not self._complained:
                self._report(f"W&B: what could be sent later cannot be kept in {self._folder / 'wandb'} ({in_one_line(error)})")
            self._complained = True

    def _begin(self) -> None:
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def _give(self, task: Callable[[Session], None] | None) -> None:
        if self._thread is None:
            self._begin()
        self._tasks.put(task)

    def _end(self, task: Callable[[Session], None]) -> None:
        self._give(task)
        self._give(None)
        if self._thread is not None:
            self._thread.join(FINISH_TIMEOUT_S)
            if self._thread.is_alive():
                self._abandoned = True
                self._report(f"W&B does not answer and is left; {self._how_to_send_later()}")
                self._kill_service()

    def _work(self) -> None:
        """The thread: carries out tasks until one fails or all are done."""
        try:
            session = self._start()
            for task in iter(self._tasks.get, None):
                if session:
                    task(session)
            if session:
                self._wandb.teardown()
                remove_service_folder()
        except Exception as error:  # whatever W&B raises does not matter to training; metrics.jsonl has everything
            if self._abandoned:
                return
            self._report(f"W&B failed and is left out from here on ({in_one_line(error)}); {self._how_to_send_later()}")
            self._kill_service()

    def _start(self) -> Session | None:
        mode, reason = wandb_mode(self._requested)
        if mode == "disabled":
            return None
        prepare_environment(self._folder / "wandb", mode)
        import wandb  # takes 0.7 s, and is never imported where it is disabled

        self._wandb = wandb
        try:
            session = self._open(mode)
        except Exception as error:
            if mode == "offline":
                raise
            session, reason = self._open("offline"), in_one_line(error)
        if reason:
            self._report(f"W&B is offline: {reason}; {self._how_to_send_later()}")
        session.replay(self._stored)
        self._stored = {}
        if session.mode == "offline":
            session.remove_older(self._folder / "wandb")
        return session

    def _open(self, mode: str) -> Session:
        return Session(self._wandb, self._folder, mode, self._options, SETTINGS)

    def _how_to_send_later(self) -> str:
        command = f"python -m digitdist.report sync {shlex.quote(str(self._folder))}"
        return f"{METRICS} has it all; later: {command}"

    def _kill_service(self) -> None:
        """Ends wandb's own process, which holds the terminal or pipe that it was given; what it has written stays."""
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if child.name().startswith("wandb"):
                    child.kill()
        # Or wandb would look for its process when this one ends. It raises, since that is gone.
        closing = threading.Thread(target=self._close_connection, daemon=True)
        closing.start()
        closing.join(CLOSE_TIMEOUT_S)
        remove_service_folder()

    def _close_connection(self) -> None:
        with contextlib.suppress(Exception):
            if self._wandb is not None:
                self._wandb.teardown()
