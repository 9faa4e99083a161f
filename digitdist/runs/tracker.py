"""Where the events of a training go: to ``metrics.jsonl`` always, to W&B when wanted, to nothing off the main rank."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from digitdist.config import Config, as_dict
from digitdist.runs.attempts import read_attempts
from digitdist.runs.folder import Run
from digitdist.runs.metrics import MetricsLog
from digitdist.runs.wandb_media import NO_MEDIA, Media
from digitdist.runs.wandb_run import WandbRun
from digitdist.world import is_main


class Tracker(Protocol):
    """What a training tells of itself."""

    def log(self, values: Mapping[str, float], step: int, epoch: float, media: Mapping[str, Media] = NO_MEDIA) -> None:
        """Records one event; `media` go to W&B alone."""

    def finish(self, summary: Mapping[str, Any], media: Mapping[str, Media] = NO_MEDIA, weights: Path | None = None) -> None:
        """Ends the tracking; the file `weights` becomes an artifact of W&B's."""


class NullTracker:
    """Stands in for the tracker on all ranks but the main one."""

    def log(self, values: Mapping[str, float], step: int, epoch: float, media: Mapping[str, Media] = NO_MEDIA) -> None:
        pass

    def finish(self, summary: Mapping[str, Any], media: Mapping[str, Media] = NO_MEDIA, weights: Path | None = None) -> None:
        pass


class RunTracker:
    """Writes each event to ``metrics.jsonl`` in `folder`, then hands it to `wandb`, which may hold up the end only."""

    def __init__(self, folder: Path, wandb: WandbRun | None, report: Callable[[str], None] = print):
        self._metrics, self._wandb = MetricsLog(folder, report), wandb

    def log(self, values: Mapping[str, float], step: int, epoch: float, media: Mapping[str, Media] = NO_MEDIA) -> None:
        event = {"step": step, "epoch": round(epoch, 6), "time": round(time.time(), 3), **values}
        self._metrics.append(event)
        if self._wandb:
            self._wandb.log(event, step, media)

    def finish(self, summary: Mapping[str, Any], media: Mapping[str, Media] = NO_MEDIA, weights: Path | None = None) -> None:
        self._metrics.close()
        if self._wandb:
            self._wandb.finish(summary, media, weights)
            self._wandb = None  # a second call has nothing to end


def start_tracker(run: Run, config: Config, report: Callable[[str], None]) -> Tracker:
    """The tracker of a training in `run`; `report` prints a line."""
    if not is_main():
        return NullTracker()
    if config.tracking.wandb == "disabled":
        return RunTracker(run.folder, None, report)
    options = {name: getattr(config.tracking, name) for name in ("project", "entity", "group", "tags", "notes")}
    options["name"] = config.tracking.name or run.folder.name
    options["config"] = as_dict(config) | {"environment": read_attempts(run.folder)[-1]}
    return RunTracker(run.folder, WandbRun(config.tracking.wandb, run.folder, run.wandb_id, options, report), report)
