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
from digitdist.runs.wandb_settings import chosen_mode, init_options
from digitdist.world import is_main


class Tracker(Protocol):
    """What a training tells of itself."""

    def log(self, values: Mapping[str, float], step: int, epoch: float, media: Mapping[str, Media] = NO_MEDIA) -> None:
        """Records one event; `media` go to W&B alone."""

    def finish(self, result: Mapping[str, Any], media: Mapping[str, Media] = NO_MEDIA, weights: Path | None = None) -> None:
        """Ends the tracking of a training that has a result; the file `weights` becomes an artifact of W&B's."""

    def flush(self) -> None:
        """Has all events in ``metrics.jsonl`` on the disk.

        Raises:
            OSError: the disk does not take them.
        """

    def stop(self) -> None:
        """Ends the tracking of a training that was asked to stop, and goes on later."""

    def close(self) -> None:
        """Ends the tracking of a training that has failed; nothing where it has ended."""


class NullTracker:
    """Stands in for the tracker on all ranks but the main one."""

    def log(self, values: Mapping[str, float], step: int, epoch: float, media: Mapping[str, Media] = NO_MEDIA) -> None:
        pass

    def finish(self, result: Mapping[str, Any], media: Mapping[str, Media] = NO_MEDIA, weights: Path | None = None) -> None:
        pass

    def flush(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def close(self) -> None:
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

    def finish(self, result: Mapping[str, Any], media: Mapping[str, Media] = NO_MEDIA, weights: Path | None = None) -> None:
        self._end(lambda wandb: wandb.finish(result, media, weights))

    def flush(self) -> None:
        self._metrics.flush()

    def stop(self) -> None:
        self._end(WandbRun.stop)

    def close(self) -> None:
        self._end(WandbRun.close)

    def _end(self, how: Callable[[WandbRun], None]) -> None:
        self._metrics.close()
        wandb, self._wandb = self._wandb, None  # a second call has nothing to end
        if wandb:
            how(wandb)


def start_tracker(run: Run, config: Config, report: Callable[[str], None]) -> Tracker:
    """The tracker of a training in `run`; `report` prints a line."""
    if not is_main():
        return NullTracker()
    wanted = config.tracking.wandb
    if wanted == "disabled" or (wanted == "auto" and chosen_mode()[0] == "disabled"):
        return RunTracker(run.folder, None, report)
    options = init_options(config.tracking, run.folder.name)
    options["config"] = as_dict(config) | {"environment": read_attempts(run.folder)[-1]}
    return RunTracker(run.folder, WandbRun(wanted, run.folder, run.wandb_id, options, report), report)
