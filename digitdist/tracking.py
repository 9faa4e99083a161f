"""Metrics of a run: one JSON line an event always, Weights & Biases when wanted, nothing off the main rank.

``metrics.jsonl`` is the truth: a line is flushed before anything else is tried with it. W&B works in a thread of its own, and
whatever happens to it is told in one line and training goes on.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import netrc
import os
import queue
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

import numpy as np
import psutil

from digitdist.checkpoint import write_whole
from digitdist.config import UserError

METRICS = "metrics.jsonl"
PROBE_TIMEOUT_S = 3.0  # for one HTTP answer of the W&B server
INIT_TIMEOUT_S = 3.0  # wandb adds up to 10 s to this before it gives up
UPLOAD_TIMEOUT_S = 6.0  # for what is left to send at the end
FINISH_TIMEOUT_S = 8.0  # for all that training ever waits for W&B

Say = Callable[[str], None]
Media = Callable[[Any], Any]  # makes an object of W&B's from the module wandb, which is imported only in W&B's thread
NO_MEDIA: Mapping[str, Media] = {}


class Tracker(Protocol):
    def log(self, values: Mapping[str, float], step: int, epoch: float, media: Mapping[str, Media] = NO_MEDIA) -> None: ...

    def finish(
        self, summary: Mapping[str, Any], media: Mapping[str, Media] = NO_MEDIA, weights: Path | None = None
    ) -> None: ...


class NullTracker:
    """Stands in for the tracker on all ranks but the main one."""

    def log(self, values: Mapping[str, float], step: int, epoch: float, media: Mapping[str, Media] = NO_MEDIA) -> None:
        pass

    def finish(self, summary: Mapping[str, Any], media: Mapping[str, Media] = NO_MEDIA, weights: Path | None = None) -> None:
        pass


class RunTracker:
    """Appends events to ``metrics.jsonl`` in `folder`, and to W&B through `wandb`."""

    def __init__(self, folder: Path, wandb: Wandb | None, say: Say = print):
        self._file = (folder / METRICS).open("ab", buffering=0)
        self._pending = b""
        self._wandb, self._say = wandb, say

    def log(self, values: Mapping[str, float], step: int, epoch: float, media: Mapping[str, Media] = NO_MEDIA) -> None:
        """One event; `media` go to W&B alone."""
        event = {"step": step, "epoch": round(epoch, 6), "time": round(time.time(), 3), **values}
        self._pending += json.dumps(event).encode() + b"\n"
        self._write()
        if self._wandb:
            self._wandb.log(event, step, media)

    def _write(self) -> None:
        """Appends what is pending; what a full disk does not take waits for the next event."""
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            self._say(f"{METRICS} cannot be written now ({error.strerror}); its lines wait in memory")

    def finish(self, summary: Mapping[str, Any], media: Mapping[str, Media] = NO_MEDIA, weights: Path | None = None) -> None:
        """The end, which W&B may hold up by `FINISH_TIMEOUT_S`; the file `weights` becomes an artifact of W&B's."""
        self._write()
        self._file.close()
        if self._wandb:
            self._wandb.finish(summary, media, weights)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The events of a run, in order; a last line that a crash cut short is left out."""
    try:
        lines = (folder / METRICS).read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def cut_metrics(folder: Path, last_step: int) -> None:
    """Removes what was logged after `last_step`, and a line that a crash cut short: the run is gone through again."""
    kept = [event for event in read_metrics(folder) if event["step"] <= last_step]
    write_whole(folder / METRICS, b"".join(json.dumps(event).encode() + b"\n" for event in kept))


class Wandb:
    """A W&B run in a thread of its own, so that no step waits for it, started by the first event; it never raises.

    A step is sent once, when all of it is there, and its number is put into a file of the run's folder before: when a run
    goes on from an earlier step, W&B gets what is new alone, and its steps rise.
    """

    def __init__(self, asked: str, folder: Path, run_id: str, settings: Mapping[str, Any], say: Say):
        self._asked, self._folder, self._run_id, self._say = asked, folder, run_id, say
        self._settings = settings  # arguments of wandb.init
        self._todo: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._wandb: Any = None
        self._run: Any = None
        self._mode, self._left = "offline", False
        self._row: dict[str, Any] = {}
        self._mark = folder / "wandb" / "last-step"
        self._sent = int(self._mark.read_text()) if self._mark.exists() else -1
        self._missed = [event for event in read_metrics(folder) if event["step"] > self._sent]  # as by a kill, or disabled

    def log(self, event: Mapping[str, float], step: int, media: Mapping[str, Media]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
            self._thread.start()
        self._todo.put(lambda: self._add(event, step, media))

    def finish(self, summary: Mapping[str, Any], media: Mapping[str, Media], weights: Path | None) -> None:
        if self._thread is None:
            return
        self._todo.put(lambda: self._finish(summary, media, weights))
        self._todo.put(None)
        self._thread.join(FINISH_TIMEOUT_S)
        if self._thread.is_alive():
            self._left = True
            self._say(f"W&B does not answer and is left; {self._later()}")
            _kill_service()

    def _work(self) -> None:
        """The thread: does what is to do until one thing fails, or all is done."""
        try:
            self._start()
            for act in iter(self._todo.get, None):
                act()
        except Exception as error:  # whatever W&B raises is not worth a training; metrics.jsonl has it all
            if self._left:
                return
            self._say(f"W&B failed and is left out from here on ({_in_a_line(error)}); {self._later()}")
            _kill_service()

    def _start(self) -> None:
        self._mode, reason = wandb_mode(self._asked)
        if self._mode == "disabled":
            return
        os.environ.setdefault("WANDB_DATA_DIR", str(self._mark.parent.resolve()))  # where an artifact waits for a sync
        os.environ.setdefault("WANDB_SILENT", "true")  # it speaks before it has seen its settings
        import wandb  # 0.7 s, and never imported where it is disabled

        self._wandb = wandb
        try:
            self._run = self._init()
        except Exception as error:
            if self._mode == "offline":
                raise
            self._mode, reason = "offline", _in_a_line(error)
            self._run = self._init()
        if reason:
            self._say(f"W&B is offline: {reason}; {self._later()}")
        self._run.define_metric("*", step_metric="step")
        for event in self._missed:
            self._add(event, event["step"], NO_MEDIA)

    def _init(self) -> Any:
        fields = {
            "silent": True,
            "console": "off",
            "init_timeout": INIT_TIMEOUT_S,
            "finish_timeout": UPLOAD_TIMEOUT_S,
            "finish_timeout_raises": True,
            "x_transaction_log_flush_interval": 1.0,  # what a kill may cost
        }
        known = getattr(self._wandb.Settings, "model_fields", fields)
        return self._wandb.init(
            **self._settings,
            dir=str(self._folder),
            id=self._run_id,
            mode=self._mode,
            resume="allow" if self._mode == "online" else None,
            settings=self._wandb.Settings(**{name: value for name, value in fields.items() if name in known}),
        )

    def _add(self, values: Mapping[str, Any], step: int, media: Mapping[str, Media]) -> None:
        """Adds to the row of `step`, which is sent when a later one begins."""
        if self._run is None or step <= self._sent:
            return
        if self._row and self._row["step"] != step:
            self._send()
        self._row |= {"step": step, **values, **{name: make(self._wandb) for name, make in media.items()}}

    def _send(self) -> None:
        row, self._row = self._row, {}
        self._sent = row["step"]
        write_whole(self._mark, str(self._sent).encode())
        self._run.log(row, step=self._sent, commit=True)

    def _finish(self, summary: Mapping[str, Any], media: Mapping[str, Media], weights: Path | None) -> None:
        if self._run is None:
            return
        if media:
            self._add({}, self._row.get("step", self._sent + 1), media)
        if self._row:
            self._send()
        self._run.summary.update(dict(summary))
        if weights:
            name = re.sub(r"[^\w.-]", "-", f"{self._settings['name']}-weights")
            artifact = self._wandb.Artifact(name, type="model", metadata=dict(summary))
            artifact.add_file(str(weights), name="weights.safetensors")
            self._run.log_artifact(artifact)
        self._run.finish()
        self._wandb.teardown()

    def _later(self) -> str:
        what = "--include-online {}/run-*" if self._mode == "online" else "{}/offline-run-*"
        return f"{METRICS} has it all; later: wandb sync {what.format(self._mark.parent)}"


def _kill_service() -> None:
    """Ends wandb's own process, which holds the terminal or pipe that it was given; what it has written stays."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if child.name().startswith("wandb"):
                child.kill()


def confusion_chart(counts: np.ndarray, classes: Sequence[str]) -> Media:
    """A chart of `counts` int [n, n]: how many images of class `row` were predicted as `column`."""
    columns = ["Actual", "Predicted", "nPredictions"]  # those of W&B's own chart, which counts images one by one
    rows = [[classes[i], classes[j], int(count)] for (i, j), count in np.ndenumerate(counts)]
    return lambda wandb: wandb.plot_table(
        "wandb/confusion_matrix/v1",
        wandb.Table(columns=columns, data=rows),
        {column: column for column in columns},
        {"title": "confusion"},
    )


def image_table(images: np.ndarray, rows: Mapping[str, Sequence[Any]]) -> Media:
    """A table of `images` uint8 [n, 28, 28] and what is known of each: a column of n values a name."""
    lines = list(zip(*rows.values(), strict=True))
    return lambda wandb: wandb.Table(
        columns=["image", *rows], data=[[wandb.Image(image), *line] for image, line in zip(images, lines, strict=True)]
    )


def sync(folder: Path, say: Say) -> None:
    """Sends what a run's folder holds for W&B by ``wandb sync``; the segments of one run become one run there.

    Raises:
        UserError: there is nothing to send, no key or no server, or it fails.
    """
    segments = sorted((folder / "wandb").glob("offline-run-*"))
    if not segments:
        raise UserError(f"{folder}: there is no offline W&B run to send; train with tracking.wandb=offline or auto")
    reason = _why_offline()
    if reason:
        raise UserError(f"{folder} cannot be sent to W&B: {reason}")
    command = [sys.executable, "-m", "wandb", "sync", *map(str, segments)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise UserError(f"{folder} cannot be sent to W&B: {' '.join(done.stdout.split())}")
    say(f"{folder}: {len(segments)} segment{'s' if len(segments) > 1 else ''} of its W&B run sent")


def wandb_mode(asked: str) -> tuple[str, str | None]:
    """How W&B is used: ``online``, ``offline`` or ``disabled``, and why it is not online where it was to be.

    Decided without a prompt and within seconds. As a person would expect, ``auto`` takes WANDB_MODE's word where it has one.
    """
    if asked == "auto" and os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        asked = os.environ["WANDB_MODE"]
    if asked in ("offline", "disabled"):
        return asked, None
    reason = _why_offline()
    return ("offline", reason) if reason else ("online", None)


def _why_offline() -> str | None:
    return _unreachable() if has_wandb_key() else "no key (wandb login)"


def has_wandb_key() -> bool:
    """True where wandb would find a key by itself, looked up without the network."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    for file in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            if file and netrc.netrc(os.path.expanduser(file)).authenticators(str(urlparse(_base_url()).hostname)):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _base_url() -> str:
    return os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"


def _unreachable() -> str | None:
    """Why the W&B server does not answer, or None where it does."""
    try:
        request = urllib.request.Request(
            f"{_base_url().rstrip('/')}/graphql", b'{"query": "{__typename}"}', {"Content-Type": "application/json"}
        )
        # An opener of its own: the one behind urlopen keeps the proxies of its first use.
        with urllib.request.build_opener().open(request, timeout=PROBE_TIMEOUT_S):
            return None
    except urllib.error.HTTPError as error:  # an answer, if perhaps not a good one
        return None if error.code < 500 else f"{_base_url()} answers {error.code}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"{_base_url()} is out of reach ({_in_a_line(getattr(error, 'reason', error))})"


def _in_a_line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__
