"""A W&B run in a thread of its own: no step waits for it, and whatever happens to it is said in one line."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from digitdist.checkpoint import atomic_write
from digitdist.errors import in_one_line
from digitdist.runs.metrics import METRICS, read_metrics
from digitdist.runs.wandb_media import NO_MEDIA, Media
from digitdist.runs.wandb_server import wandb_mode

INIT_TIMEOUT_S = 3.0  # wandb adds up to 10 s to this before it gives up
UPLOAD_TIMEOUT_S = 6.0  # for what is left to send at the end
FINISH_TIMEOUT_S = 8.0  # the longest that training ever waits for W&B
CLOSE_TIMEOUT_S = 1.0  # for the connection to a process that was killed
SETTINGS = {
    "silent": True,
    "console": "off",
    "init_timeout": INIT_TIMEOUT_S,
    "finish_timeout": UPLOAD_TIMEOUT_S,
    "finish_timeout_raises": True,
    "x_transaction_log_flush_interval": 1.0,  # the seconds of metrics that a kill may cost
}


class WandbRun:
    """A W&B run, started by its first event; its methods never raise.

    A step is sent once, when all its metrics are there, and its number is first written into a file of the run's folder: a run
    that is resumed from an earlier step sends only what is new, and its steps rise.
    """

    def __init__(
        self, requested: str, folder: Path, run_id: str, init_options: Mapping[str, Any], report: Callable[[str], None]
    ):
        self._requested, self._folder, self._run_id, self._report = requested, folder, run_id, report
        self._init_options = init_options  # arguments of wandb.init
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._wandb: Any = None
        self._run: Any = None
        self._mode, self._abandoned = "offline", False
        self._row: dict[str, Any] = {}
        self._last_step_file = folder / "wandb" / "last-step"
        self._last_step = int(self._last_step_file.read_text()) if self._last_step_file.exists() else -1
        # What an earlier attempt could not send, because it was killed or W&B was disabled.
        self._unsent = [event for event in read_metrics(folder) if event["step"] > self._last_step]

    def log(self, event: Mapping[str, float], step: int, media: Mapping[str, Media]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
            self._thread.start()
        self._tasks.put(lambda: self._add(event, step, media))

    def finish(self, summary: Mapping[str, Any], media: Mapping[str, Media], weights: Path | None) -> None:
        """Sends what is left, and the summary; waits at most `FINISH_TIMEOUT_S`."""
        if self._thread is None:
            return
        self._tasks.put(lambda: self._finish(summary, media, weights))
        self._tasks.put(None)
        self._thread.join(FINISH_TIMEOUT_S)
        if self._thread.is_alive():
            self._abandoned = True
            self._report(f"W&B does not answer and is left; {self._how_to_send_later()}")
            self._kill_service()

    def _work(self) -> None:
        """The thread: carries out tasks until one fails or all are done."""
        try:
            self._start()
            for task in iter(self._tasks.get, None):
                task()
        except Exception as error:  # whatever W&B raises does not matter to training; metrics.jsonl has everything
            if self._abandoned:
                return
            self._report(f"W&B failed and is left out from here on ({in_one_line(error)}); {self._how_to_send_later()}")
            self._kill_service()

    def _start(self) -> None:
        self._mode, reason = wandb_mode(self._requested)
        if self._mode == "disabled":
            return
        # Where an artifact waits for a sync.
        os.environ.setdefault("WANDB_DATA_DIR", str(self._last_step_file.parent.resolve()))
        os.environ.setdefault("WANDB_SILENT", "true")  # wandb prints before it has seen its settings
        # At the end of the process, its telemetry waits 10 s for a server that hangs.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb  # takes 0.7 s, and is never imported where it is disabled

        self._wandb = wandb
        try:
            self._run = self._init()
        except Exception as error:
            if self._mode == "offline":
                raise
            self._mode, reason = "offline", in_one_line(error)
            self._run = self._init()
        if reason:
            self._report(f"W&B is offline: {reason}; {self._how_to_send_later()}")
        self._run.define_metric("*", step_metric="step")
        for event in self._unsent:
            self._add(event, event["step"], NO_MEDIA)

    def _init(self) -> Any:
        known = getattr(self._wandb.Settings, "model_fields", SETTINGS)
        return self._wandb.init(
            **self._init_options,
            dir=str(self._folder),
            id=self._run_id,
            mode=self._mode,
            resume="allow" if self._mode == "online" else None,
            settings=self._wandb.Settings(**{name: value for name, value in SETTINGS.items() if name in known}),
        )

    def _add(self, values: Mapping[str, Any], step: int, media: Mapping[str, Media]) -> None:
        """Adds to the row of `step`, which is sent when a later step begins."""
        if self._run is None or step <= self._last_step:
            return
        if self._row and self._row["step"] != step:
            self._send()
        self._row |= {"step": step, **values, **{name: make(self._wandb) for name, make in media.items()}}

    def _send(self) -> None:
        row, self._row = self._row, {}
        self._last_step = row["step"]
        atomic_write(self._last_step_file, str(self._last_step).encode())
        self._run.log(row, step=self._last_step, commit=True)

    def _finish(self, summary: Mapping[str, Any], media: Mapping[str, Media], weights: Path | None) -> None:
        if self._run is None:
            return
        if media:
            self._add({}, self._row.get("step", self._last_step + 1), media)
        if self._row:
            self._send()
        self._run.summary.update(dict(summary))
        if weights:
            name = re.sub(r"[^\w.-]", "-", f"{self._init_options['name']}-weights")
            artifact = self._wandb.Artifact(name, type="model", metadata=dict(summary))
            artifact.add_file(str(weights), name="weights.safetensors")
            self._run.log_artifact(artifact)
        self._run.finish()
        self._wandb.teardown()

    def _how_to_send_later(self) -> str:
        what = "--include-online {}/run-*" if self._mode == "online" else "{}/offline-run-*"
        return f"{METRICS} has it all; later: wandb sync {what.format(self._last_step_file.parent)}"

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

    def _close_connection(self) -> None:
        with contextlib.suppress(Exception):
            if self._wandb is not None:
                self._wandb.teardown()
