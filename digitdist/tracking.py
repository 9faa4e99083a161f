"""Metrics of a run: one JSON line an event always, Weights & Biases when wanted, nothing off the main rank.

``metrics.jsonl`` is the truth: a line is flushed before anything else is tried with it. Whatever happens to W&B is told in
one line and training goes on.
"""

from __future__ import annotations

import json
import netrc
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

METRICS = "metrics.jsonl"
PROBE_TIMEOUT_S = 3.0  # for one HTTP answer of the W&B server
INIT_TIMEOUT_S = 5.0  # wandb adds up to 10 s to this before it gives up
FINISH_TIMEOUT_S = 10.0

Say = Callable[[str], None]


class Tracker(Protocol):
    def log(self, values: Mapping[str, float], step: int, epoch: float) -> None: ...

    def finish(self, summary: Mapping[str, Any]) -> None: ...


class NullTracker:
    """Stands in for the tracker on all ranks but the main one."""

    def log(self, values: Mapping[str, float], step: int, epoch: float) -> None:
        pass

    def finish(self, summary: Mapping[str, Any]) -> None:
        pass


class RunTracker:
    """Appends events to ``metrics.jsonl`` in `folder`, and to W&B through `wandb`."""

    def __init__(self, folder: Path, wandb: Wandb | None, say: Say):
        self._file = (folder / METRICS).open("ab", buffering=0)
        self._pending = b""
        self._wandb, self._say = wandb, say

    def log(self, values: Mapping[str, float], step: int, epoch: float) -> None:
        event = {"step": step, "epoch": round(epoch, 6), "time": round(time.time(), 3), **values}
        self._pending += json.dumps(event).encode() + b"\n"
        self._write()
        if self._wandb:
            self._wandb.log(event, step)

    def _write(self) -> None:
        """Appends what is pending; what a full disk does not take waits for the next event."""
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            self._say(f"{METRICS} cannot be written now ({error.strerror}); its lines wait in memory")

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._write()
        self._file.close()
        if self._wandb:
            self._wandb.finish(summary)


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
    temporary = folder / f".{METRICS}.tmp"
    temporary.write_text("".join(json.dumps(event) + "\n" for event in kept))
    os.replace(temporary, folder / METRICS)


class Wandb:
    """A W&B run that starts with the first event, so that the first step does not wait for it, and never raises."""

    def __init__(self, mode: str, folder: Path, run_id: str, settings: Mapping[str, Any], say: Say):
        self._mode, self._folder, self._run_id, self._settings, self._say = mode, folder, run_id, settings, say
        self._run: Any = None
        self._broken = False

    def log(self, event: Mapping[str, float], step: int) -> None:
        self._guarded(lambda: self._started().log(dict(event), step=step))

    def finish(self, summary: Mapping[str, Any]) -> None:
        if self._run is not None:
            self._guarded(lambda: self._run.summary.update(dict(summary)))
            self._guarded(lambda: self._run.finish())

    def _guarded(self, act: Callable[[], Any]) -> None:
        if self._broken:
            return
        try:
            act()
        except Exception as error:  # whatever W&B raises is not worth a training; metrics.jsonl has it all
            self._broken = True
            self._say(f"W&B failed and is left out from here on ({' '.join(str(error).split())}); metrics.jsonl has it all")

    def _started(self) -> Any:
        if self._run is None:
            import wandb  # 0.7 s, and never imported where it is disabled

            try:
                self._run = self._init(wandb, self._mode)
            except wandb.errors.Error as error:
                if self._mode == "offline":
                    raise
                reason = " ".join(str(error).split())
                self._say(f"W&B is offline: {reason}; later: wandb sync {self._folder}/wandb/offline-run-*")
                self._run = self._init(wandb, "offline")
        return self._run

    def _init(self, wandb: Any, mode: str) -> Any:
        return wandb.init(
            **self._settings,
            dir=str(self._folder),
            id=self._run_id,
            mode=mode,
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(silent=True, console="off", init_timeout=INIT_TIMEOUT_S, finish_timeout=FINISH_TIMEOUT_S),
        )


def wandb_mode(asked: str, folder: Path, say: Say) -> str | None:
    """How W&B is used: ``online``, ``offline`` or None, decided without a prompt and within seconds."""
    if asked == "disabled":
        return None
    if asked == "offline":
        return "offline"
    reason = "no key (wandb login)" if not has_wandb_key() else _unreachable()
    if reason is None:
        return "online"
    say(f"W&B is offline: {reason}; later: wandb sync {folder}/wandb/offline-run-*")
    return "offline"


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
        with urllib.request.urlopen(_base_url(), timeout=PROBE_TIMEOUT_S):
            return None
    except urllib.error.HTTPError as error:  # an answer, if perhaps not a good one
        return None if error.code < 500 else f"{_base_url()} answers {error.code}"
    except (OSError, ValueError) as error:
        return f"{_base_url()} is out of reach ({getattr(error, 'reason', error)})"
